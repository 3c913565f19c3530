"""The base class of task types whose inputs are a text or a pair of texts."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from regraft.errors import DataError
from regraft.task.file import is_unicode
from regraft.task.types.examples import Examples
from regraft.task.types.type import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from regraft.task.source import SourceTable
    from regraft.task.split import Split

ColumnName = Annotated[str, Field(min_length=1)]


def _text_tag(value: Any) -> str:
    return "<pair>" if isinstance(value, list | tuple) else "<column>"


_Text = Annotated[
    Annotated[ColumnName, Tag("<column>")] | Annotated[tuple[ColumnName, ColumnName], Tag("<pair>")],
    Discriminator(_text_tag),
]


class TextTask(Task, ABC):
    """A task whose inputs are a text or a pair of texts.

    Args:
        text: The column of the text, or the two columns of a pair of texts.
    """

    text: _Text = Field(description="the column that holds the text, or a list of two columns for a pair of texts")

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The column of the text, or the two columns of a pair."""
        return (self.text,) if isinstance(self.text, str) else self.text

    def texts(self, table: SourceTable) -> list[tuple[str, ...]]:
        """Return the texts of a table.

        Args:
            table: Columns of a source, among them `input_columns`.

        Returns:
            A tuple of one or two texts per row.

        Raises:
            DataError: A value is missing, empty, not a text, or not valid Unicode.
        """
        return list(zip(*(_checked_texts(table, column) for column in self.input_columns), strict=True))

    def as_text(self, inputs: tuple[str, ...]) -> str:
        """Return the text, or the two texts of a pair with a mark between them; see `Task.as_text`."""
        return " ⏎ ".join(inputs)

    def as_inputs(self, text: str) -> tuple[str]:
        """Return the text alone, even for a task of pairs; see `Task.as_inputs`."""
        return (text,)

    def count_words(self, inputs: tuple[str, ...]) -> int:
        """Count the words, separated by whitespace, in all texts of an example; see `Task.count_words`."""
        return sum(len(text.split()) for text in inputs)

    def encode(self, split: Split, tokenizer: PreTrainedTokenizerBase, pad: int, max_length: int) -> Examples:
        """Tokenise texts, with one row per example, at the token that the head reads; see `Task.encode`."""
        first_texts = [texts[0] for texts in split.inputs]
        is_pair = len(split.inputs[0]) == 2
        second_texts = [texts[1] for texts in split.inputs] if is_pair else None
        encoded = tokenizer(
            first_texts, second_texts, truncation=True, max_length=max_length, return_attention_mask=False
        )
        columns = {name: list(encoded[name]) for name in encoded}
        padding = {name: pad if name == "input_ids" else 0 for name in columns}  # 0 is the first token type
        return Examples(columns, split.targets, padding)

    @field_validator("text")
    @classmethod
    def _refuse_repeated_column(cls, text: str | tuple[str, str]) -> str | tuple[str, str]:
        if not isinstance(text, str) and text[0] == text[1]:
            raise ValueError(f"names {text[0]!r} twice. Use one column, or two different ones.")
        return text

    @field_validator("label", check_fields=False)  # task types without this key are not validated
    @classmethod
    def _refuse_text_columns(cls, label: Any, validation: ValidationInfo) -> Any:
        text, columns = (
            (value,) if isinstance(value, str) else value or () for value in (validation.data.get("text"), label)
        )
        shared = [column for column in columns if column in text]
        if shared:
            raise ValueError(f"names {shared[0]!r}, which is already a column of text. Use the column to predict.")
        return label


def _checked_texts(table: SourceTable, column: str) -> list[str]:
    """Return the texts of a column; raise DataError if a text is invalid."""
    texts: list[Any] = table.columns[column]
    problems = []
    for row, text in zip(table.row_numbers, texts, strict=True):
        problem = _problem(text)
        if problem is not None:
            problems.append((row, problem))
    if problems:
        row, first_problem = problems[0]
        count = f" (invalid texts in {len(problems):,} rows)" if len(problems) > 1 else ""
        raise DataError(
            f"{table.source}, row {row}: the text in column {column!r} is {first_problem}{count}. "
            "Give every row a text, or remove the row."
        )
    return texts


def _problem(text: object) -> str | None:
    """Describe why a value is not a valid text; return None if it is."""
    if text is None:
        return "missing"
    if not isinstance(text, str):
        return f"of type {type(text).__name__} ({text!r}), not text"
    if not text.strip():
        return "empty"
    return None if is_unicode(text) else "not valid Unicode"
