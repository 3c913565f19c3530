"""Views: tables, charts and marked texts of any task type, as values that reports and the command line render."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

if TYPE_CHECKING:
    from collections.abc import Sequence

Cell = str | int | float | None
Size = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=40)]
"""A name in lower case that is used in anchors of a page and in file names."""


@dataclasses.dataclass(frozen=True)
class ModelPredictions:
    """A model's predictions for some examples.

    Args:
        predictions: One prediction per example.
        confidence: The probability that the model gives to each prediction; None if it is the same for all of them.
        right: Whether each prediction is right.
    """

    predictions: Sequence[Any]
    confidence: Sequence[float] | None
    right: Sequence[bool | None]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        name: The heading.
        form: The format of the cells: text, whole numbers, numbers, signed numbers, or fractions of 1 shown in %.
    """

    name: str
    form: Literal["text", "count", "number", "change", "share"]


_NUMBER = ("a number or null", (int, float, type(None)))
CELL_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "text": ("a text", (str,)),
    "count": ("a whole number or null", (int, type(None))),
    "number": _NUMBER,
    "change": _NUMBER,
    "share": _NUMBER,
}
"""The description and the types of a column's cells, by the column's form."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of figures.

    Args:
        title: The heading above the table.
        columns: The columns; the first names the rows.
        rows: The rows, with one cell per column.
        view: The kind of view, by which JSON files tell views apart.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    view: Literal["table"] = "table"

    def __post_init__(self) -> None:
        """Refuse rows without one cell per column, or with a cell of a type that the column's form does not allow."""
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{index}]: expected {len(self.columns)} values, found {len(row)} values")
            for column, cell in zip(self.columns, row, strict=True):
                expected, types = CELL_TYPES[column.form]
                if not isinstance(cell, types):
                    raise ValueError(f"rows[{index}]: {column.name}: expected {expected}, found {cell!r:.80}")


@dataclasses.dataclass(frozen=True)
class Series:
    """A series of points in a chart.

    Args:
        name: The name in the legend.
        x: The horizontal coordinate of each point.
        y: The vertical coordinate of each point.
        sizes: The number of examples that each point stands for.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    sizes: tuple[Size, ...]

    def __post_init__(self) -> None:
        """Refuse a different number of x, y and sizes."""
        if not len(self.x) == len(self.y) == len(self.sizes):
            raise ValueError(f"{len(self.x)} x, {len(self.y)} y and {len(self.sizes)} sizes: expected equal numbers")


@dataclasses.dataclass(frozen=True)
class Scatter:
    """A scatter chart.

    Args:
        name: The name, unique among the views of a task type: lower-case words joined by hyphens.
        title: The heading above the chart.
        lead: An explanation of the axes and marks, in one or two sentences.
        finding: The result that the chart shows, in a sentence.
        brief: The finding for a terminal, as a name and its figures.
        x: The label of the horizontal axis.
        y: The label of the vertical axis.
        diagonal: The meaning of the line x = y; empty to draw no line.
        joined: Whether a line joins the points of each series, in their order.
        series: The points, by the series of the legend.
        table: The coordinates of the points in figures.
        view: The kind of view, by which JSON files tell views apart.
    """

    name: Name
    title: str
    lead: str
    finding: str
    brief: tuple[str, str]
    x: str
    y: str
    diagonal: str
    joined: bool
    series: tuple[Series, ...]
    table: Table
    view: Literal["scatter"] = "scatter"


@dataclasses.dataclass(frozen=True)
class Span:
    """A span of a text.

    Args:
        text: The characters of the span.
        mark: The mark, such as a tag; empty for plain text.
    """

    text: str
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class MarkedText:
    """Texts with marked spans, such as words with their tags.

    Args:
        title: The heading above the texts.
        texts: The consecutive spans of each text.
        view: The kind of view, by which JSON files tell views apart.
    """

    title: str
    texts: tuple[tuple[Span, ...], ...]
    view: Literal["marked-text"] = "marked-text"


Change = Literal["negative", "positive", "changed", "same"]
"""What an upgrade did to an answer: it flipped, or the text changed or stayed the same."""


@dataclasses.dataclass(frozen=True)
class AnswerPair:
    """The answers of an old and a new model to a prompt.

    Args:
        row: The row number of the example.
        change: What the upgrade did to the answer.
        prompt: The prompt, in words.
        reference: The reference answer; None if there is none.
        before: The old model's answer; None if it was not generated.
        after: The new model's answer; None if it was not generated.
    """

    row: Size
    change: Change
    prompt: str
    reference: str | None
    before: str | None
    after: str | None

    @property
    def texts(self) -> tuple[tuple[str, str], ...]:
        """The name and the text of the reference and of each answer, as far as they exist."""
        texts = (("reference", self.reference), ("before", self.before), ("after", self.after))
        return tuple((name, text) for name, text in texts if text is not None)


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of two models side by side.

    Args:
        title: The heading above the answers.
        pairs: The answers to each prompt, in order.
        view: The kind of view, by which JSON files tell views apart.
    """

    title: str
    pairs: tuple[AnswerPair, ...]
    view: Literal["answers"] = "answers"


View = Annotated[Table | Scatter | MarkedText | Answers, Field(discriminator="view")]
