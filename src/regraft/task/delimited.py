"""CSV and TSV files, whose quotes may delimit fields or be characters of them."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import TYPE_CHECKING, Any, Literal

from regraft.errors import DataError
from regraft.task.labels import label_name, listing
from regraft.task.yaml_file import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Quoting = Literal["quoted", "plain"]


_DECLARE = "Declare in the task file whether fields are in double quotes (`quoting: quoted`) or not (`quoting: plain`)"


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What a file holds if its quotes are taken in one way.

    Args:
        header: The names of all columns.
        columns: The values of those asked for.
        spans: Of each row that spans several lines: its number, its first line and the one past its last, from 0.
    """

    header: list[str]
    columns: dict[str, list[Any]]
    spans: list[tuple[int, int, int]]


def read_delimited(
    path: Path, text: str, delimiter: str, columns: Sequence[str], label: str | None, quoting: Quoting | None
) -> tuple[dict[str, list[Any]], range]:
    """Read columns of CSV or TSV.

    A TSV file does not say whether a double quote begins a field in quotes (pandas) or is a character (GLUE and most
    corpora). Where nothing is declared and the two readings differ, the quotes decide: if each that begins a field
    has its end, fields are quoted, unless one swallows what reads as rows; else they are characters, unless some are
    doubled, as writers of quoted fields do.

    Args:
        path: The file, for messages.
        text: Its content.
        delimiter: Between fields.
        columns: The columns to read.
        label: The one that holds labels.
        quoting: `quoted` or `plain` where the user declares it.

    Returns:
        The values of each column, and the number of each row.

    Raises:
        DataError: A row is malformed, a column is missing, or neither reading is sure.
    """
    if quoting or delimiter != "\t" or '"' not in text:
        reading = _read(path, text, delimiter, columns, quoting or "quoted")
    else:
        reading = _decided(path, text, delimiter, columns, label)
    return reading.columns, range(1, len(next(iter(reading.columns.values()), ())) + 1)


def _decided(path: Path, text: str, delimiter: str, columns: Sequence[str], label: str | None) -> _Reading:
    quoted = _read_or_problem(path, text, delimiter, columns, "quoted")
    plain = _read_or_problem(path, text, delimiter, columns, "plain")
    if isinstance(quoted, _Reading):
        if plain_rows := _swallowed(text, delimiter, quoted, label, isinstance(plain, _Reading)):
            row, lines = plain_rows
            raise DataError(
                f"{path}, row {row}: a double quote opens a field that goes on for {lines} lines, and the first and "
                f"the last of them read as rows of their own. {_DECLARE}."
            )
        return quoted
    if isinstance(plain, _Reading):
        if '""' in text:
            raise DataError(f"{quoted} Doubled quotes say that fields are in quotes, and this one is not. {_DECLARE}.")
        return plain
    if str(quoted) == str(plain):
        raise quoted
    raise DataError(f"{quoted} With quotes as characters: {plain} {_DECLARE}, and correct the row.")


def _read_or_problem(
    path: Path, text: str, delimiter: str, columns: Sequence[str], quoting: Quoting
) -> _Reading | DataError:
    try:
        return _read(path, text, delimiter, columns, quoting)
    except DataError as error:
        return error


def _read(path: Path, text: str, delimiter: str, columns: Sequence[str], quoting: Quoting) -> _Reading:
    rows, line, header, places, spans = 0, 0, list[str](), list[int](), []
    values: list[list[Any]] = [[] for _ in columns]
    limit = csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KiB that csv allows
    try:
        # The csv module rather than pandas: pandas fills up rows that are too short and shifts those that are too long.
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
            quoting=csv.QUOTE_NONE if quoting == "plain" else csv.QUOTE_MINIMAL,
        )  # fmt: skip
        for record in reader:
            first_line, line = line, reader.line_num
            if not record:
                continue
            if not header:
                header = record
                _check_delimiter(path, header, delimiter, columns)
                places = [header.index(column) for column in require_columns(columns, header, str(path))]
                continue
            rows += 1
            if len(record) != len(header):
                remedy = (
                    f"Put fields that hold a {delimiter!r} or a line break in double quotes."
                    if quoting == "quoted"
                    else f"No field may hold a {delimiter!r} or a line break."
                )
                raise DataError(
                    f"{path}, row {rows}: the header names {len(header)} columns, the row has {len(record)}. {remedy}"
                )
            if line - first_line > 1:
                spans.append((rows, first_line, line))
            for column, place in zip(values, places, strict=True):
                column.append(record[place])
    except csv.Error as error:
        raise DataError(
            f"{path}, row {rows + 1}: not valid CSV ({error}). Close every double quote; double those in a text; where "
            "quotes are characters, declare `quoting: plain` in the task file."
        ) from error
    finally:
        csv.field_size_limit(limit)
    return _Reading(header, dict(zip(columns, values, strict=True)) if header else {}, spans)


def _check_delimiter(path: Path, header: list[str], delimiter: str, columns: Sequence[str]) -> None:
    """Refuse a file whose header has all columns in one field, apart by what separates fields in other files."""
    others = (other for other in ",;\t|" if other != delimiter and {*columns} <= {*header[0].split(other)})
    if len(header) == 1 and len(columns) > 1 and (separator := next(others, None)):
        remedy = {"\t": "Name it .tsv.", ",": "Name it .csv."}.get(separator, f"Write it with {delimiter!r}.")
        raise DataError(f"{path}: its columns are separated by {separator!r}, and {delimiter!r} was expected. {remedy}")


def _swallowed(
    text: str, delimiter: str, quoted: _Reading, label: str | None, plain_is_valid: bool
) -> tuple[int, int] | None:
    """Find a row that looks like several rows between two quotes that do not belong together.

    A text in quotes that spans lines begins in one line and ends in another, so that neither has all fields of a row,
    or, if the text holds delimiters, what stands at the label's is no label.

    Returns:
        The number of the row, and of its lines.
    """
    if not quoted.spans:
        return None
    lines = list(io.StringIO(text, newline=""))
    labels = {label_name(name) for name in quoted.columns[label]} if label else set()

    def is_row(line: str) -> bool:
        fields = line.rstrip("\r\n").split(delimiter)
        if len(fields) != len(quoted.header):
            return False
        return plain_is_valid or not label or label_name(fields[quoted.header.index(label)]) in labels

    for row, first, end in quoted.spans:
        if is_row(lines[first]) and is_row(lines[end - 1]):
            return row, end - first
    return None


def require_columns(columns: Sequence[str], present: Sequence[str], source: str) -> list[str]:
    """Check that a source has each column once.

    Args:
        columns: The columns to read.
        present: Those it has.
        source: How messages name it.

    Returns:
        The columns to read.

    Raises:
        DataError: One is missing or there twice.
    """
    for column in columns:
        if column not in present:
            near = did_you_mean(column, present)
            raise DataError(f"{source}: no column {column!r}.{near} The columns are: {listing(present)}.")
        if list(present).count(column) > 1:
            raise DataError(f"{source}: the column {column!r} stands there twice. Rename one of them.")
    return list(columns)
