"""Tasks whose inputs are one text or two."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator

from regraft.errors import DataError
from regraft.task.file import is_unicode
from regraft.task.types.examples import Examples
from regraft.task.types.type import Task

if TYPE_CHECKING:
    from regraft.task.source import Table
    from regraft.task.split import Split

Column = Annotated[str, Field(min_length=1)]


def _kind_of_text(value: Any) -> str:
    return "<pair>" if isinstance(value, list | tuple) else "<column>"


_Text = Annotated[
    Annotated[Column, Tag("<column>")] | Annotated[tuple[Column, Column], Tag("<pair>")],
    Discriminator(_kind_of_text),
]


class TextTask(Task, ABC):
    """A task whose inputs are one text or two.

    Args:
        text: The column that holds the text, or two columns for a pair of texts.
    """

    text: _Text = Field(description="the column that holds the text, or a list of two columns for a pair of texts")

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns that hold text, one or two."""
        return (self.text,) if isinstance(self.text, str) else self.text

    def texts(self, table: Table) -> list[tuple[str, ...]]:
        """Return the texts of a table.

        Args:
            table: What was read.

        Returns:
            One or two texts a row.

        Raises:
            DataError: A text is missing, empty or no text.
        """
        return list(zip(*(_checked(table, column) for column in self.input_columns), strict=True))

    def as_text(self, inputs: tuple[str, ...]) -> str:
        """Return the text, with a mark between the two of a pair."""
        return " ⏎ ".join(inputs)

    def as_inputs(self, text: str) -> tuple[str]:
        """Return the text alone, also where the task is one of pairs."""
        return (text,)

    def count_words(self, inputs: tuple[str, ...]) -> int:
        """Count what stands between blanks, in a pair's texts together."""
        return sum(len(text.split()) for text in inputs)

    def encode(self, split: Split, tokenizer: Any, pad: int, max_length: int) -> Examples:
        """Tokenise texts, whose row is at the token that the head reads; see `Task.encode`."""
        first = [texts[0] for texts in split.inputs]
        second = [texts[1] for texts in split.inputs] if len(split.inputs[0]) == 2 else None
        encoded = tokenizer(first, second, truncation=True, max_length=max_length, return_attention_mask=False)
        padding = {name: pad if name == "input_ids" else 0 for name in encoded}
        return Examples({name: list(encoded[name]) for name in encoded}, split.targets, padding)

    @field_validator("text")
    @classmethod
    def _two_columns(cls, text: str | tuple[str, str]) -> str | tuple[str, str]:
        if not isinstance(text, str) and text[0] == text[1]:
            raise ValueError(f"names {text[0]!r} twice. Give two columns, or one alone.")
        return text


def _checked(table: Table, column: str) -> list[str]:
    """Return the texts of a column if all of them can be used."""
    texts: list[Any] = table.columns[column]
    if bad := [row for row, text in zip(table.rows, texts, strict=True) if _fault(text)]:
        fault = _fault(next(text for text in texts if _fault(text)))
        count = f" (and so in {len(bad):,} rows)" if len(bad) > 1 else ""
        raise DataError(
            f"{table.source}, row {bad[0]}: the text in column {column!r} is {fault}{count}. "
            "Give every row a text, or remove the row."
        )
    return texts


def _fault(text: object) -> str | None:
    if text is None:
        return "missing"
    if not isinstance(text, str):
        return f"of type {type(text).__name__} ({text!r}), not text"
    if not text.strip():
        return "empty"
    return None if is_unicode(text) else "not valid Unicode"
