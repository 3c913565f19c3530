"""What a type of task wants shown, as values; report and command line draw them, whatever the type."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

if TYPE_CHECKING:
    from collections.abc import Sequence

Cell = str | int | float | None
Size = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=40)]
"""A name that is part of an anchor on the page, and of a file's."""


@dataclasses.dataclass(frozen=True)
class ModelPredictions:
    """What a model predicts of some examples.

    Args:
        predictions: A prediction an example.
        confidence: How probable each is by the model itself; None where the task's outputs do not say so.
        right: Which are right.
    """

    predictions: Sequence[Any]
    confidence: Sequence[float] | None
    right: Sequence[bool]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        name: Its heading.
        form: How its cells are written: words, whole numbers, numbers, numbers with their sign, or shares of 1 in %.
    """

    name: str
    form: Literal["text", "count", "number", "change", "share"]


_NUMBER = ("a number or null", (int, float, type(None)))
FORMS: dict[str, tuple[str, tuple[type, ...]]] = {
    "text": ("a text", (str,)), "count": ("a whole number or null", (int, type(None))), "number": _NUMBER,
    "change": _NUMBER, "share": _NUMBER,
}  # fmt: skip
"""By form of a column, what its cells are, in words and as types."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures in rows and columns.

    Args:
        title: What the table shows.
        columns: The columns; the first names its row.
        rows: A cell a column.
        view: Which view this is.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    view: Literal["table"] = "table"

    def __post_init__(self) -> None:
        """Check that each row has a cell a column, and that each is of the column's form."""
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{number}]: expected {len(self.columns)} values, found {len(row)} values")
            for column, cell in zip(self.columns, row, strict=True):
                expected, types = FORMS[column.form]
                if not isinstance(cell, types):
                    raise ValueError(f"rows[{number}]: {column.name}: expected {expected}, found {cell!r:.80}")


@dataclasses.dataclass(frozen=True)
class Series:
    """Points that belong together.

    Args:
        name: What they are.
        x: Where each is across.
        y: Where each is upwards.
        sizes: How many examples each stands for.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    sizes: tuple[Size, ...]

    def __post_init__(self) -> None:
        """Check that every point has both places and a size."""
        if not len(self.x) == len(self.y) == len(self.sizes):
            raise ValueError(f"{len(self.x)} x, {len(self.y)} y and {len(self.sizes)} sizes: expected as many of each")


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Points in the plane, in series.

    Args:
        name: Unique among the views of a task type; lower-case words with hyphens between.
        title: What is drawn, in a few words.
        lead: How to read it.
        finding: What it shows, in a sentence.
        brief: The same for a terminal: a name and the figures.
        x: What is across.
        y: What is upwards.
        diagonal: What the line of equal x and y means; empty for no line.
        joined: Whether a line joins the points of a series, in their order.
        series: The points.
        table: The figures behind them.
        view: Which view this is.
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
    """A stretch of a text.

    Args:
        text: What it says.
        mark: What it is marked as, as a tag; empty for plain text.
    """

    text: str
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class MarkedText:
    """Texts of which stretches are marked, as words by their tags.

    Args:
        title: What is marked.
        texts: The stretches of each text, in their order.
        view: Which view this is.
    """

    title: str
    texts: tuple[tuple[Span, ...], ...]
    view: Literal["marked-text"] = "marked-text"


View = Annotated[Table | Scatter | MarkedText, Field(discriminator="view")]
