"""The reader of CoNLL files: one word per line with its tags in columns, and an empty line after each sentence."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError
from regraft.task.labels import format_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CONLL_SUFFIXES = (".conll", ".bio", ".iob", ".iob2")
"""The suffixes of CoNLL files."""
_COLUMN = re.compile(r"-?\d+")
_COMMENT = re.compile(r"#\s*(?:id\s|\S+\s*=)")
"""Matches the comments before a sentence in CoNLL-U and in the files of SemEval; `#` may also be a word."""


def are_column_numbers(columns: Sequence[str]) -> bool:
    """Return whether names of columns are numbers, by which the columns of CoNLL files are named."""
    return all(_COLUMN.fullmatch(column) for column in columns)


def read_conll(path: Path, text: str, columns: Sequence[str]) -> tuple[dict[str, list[Any]], list[int]]:
    """Read columns of a CoNLL file.

    Columns are separated by tabs if a line has any, else by spaces. Lines that start with `-DOCSTART-` are skipped.

    Args:
        path: The file, for messages.
        text: The content of the file.
        columns: The numbers of columns, counted from 0, or from -1 for the last column backwards.

    Returns:
        For each column, the list of its fields in each sentence; and the number of each sentence's first line.

    Raises:
        DataError: The columns are names, or a line has too few columns, or two numbers mean the same column of it.
    """
    if not are_column_numbers(columns):
        raise DataError(
            f"{path}: the columns of a CoNLL file have numbers, not names (requested: {format_names(columns)}). Count "
            "them from 0, or from -1 for the last: words: 0, tags: -1."
        )
    numbers = [int(column) for column in columns]
    sentences: list[list[list[str]]] = []
    row_numbers: list[int] = []
    is_inside = False
    for row, line in enumerate(text.split("\n"), start=1):  # `splitlines` would also divide words
        stripped = line.strip(" \t\r")
        if not stripped or stripped.startswith("-DOCSTART-"):
            is_inside = False
            continue
        if not is_inside and _COMMENT.match(stripped):
            continue
        fields = line.rstrip("\r").split("\t") if "\t" in stripped else re.split(" +", stripped)
        if not all(-len(fields) <= number < len(fields) for number in numbers):
            raise DataError(
                f"{path}, row {row}: has {len(fields)} columns ({stripped!r:.80}), but columns {', '.join(columns)} "
                "are requested. Correct the row, or the numbers of the columns, which are counted from 0."
            )
        if len({number % len(fields) for number in numbers}) < len(numbers):
            raise DataError(
                f"{path}, row {row}: has {len(fields)} columns ({stripped!r:.80}), of which {', '.join(columns)} are "
                "the same one. Use the columns of words and of tags."
            )
        if not is_inside:
            sentences.append([])
            row_numbers.append(row)
            is_inside = True
        sentences[-1].append([fields[number] for number in numbers])
    values = {
        column: [[fields[index] for fields in sentence] for sentence in sentences]
        for index, column in enumerate(columns)
    }
    return values, row_numbers
