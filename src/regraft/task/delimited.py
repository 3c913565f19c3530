"""A reader of CSV and TSV files, in which double quotes may delimit fields or be ordinary characters."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from regraft.errors import DataError, did_you_mean
from regraft.task.labels import format_names, label_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Quoting = Literal["quoted", "plain"]

_DECLARE_QUOTING = (
    "Declare in the task file whether fields are in double quotes (`quoting: quoted`) or not (`quoting: plain`)"
)
_MAX_FIELD_SIZE = 2**31 - 1
"""The largest field in characters, the maximum of a 32-bit C long: some texts exceed the default of 131,072."""


class _Span(NamedTuple):
    """The lines of a row that extends over several of them, counted from 0; `end_line` is excluded."""

    row: int
    first_line: int
    end_line: int


@dataclasses.dataclass(frozen=True)
class _Parsed:
    """The content of a file under one interpretation of its quotes.

    Args:
        header: The names of all columns.
        columns: The values of the requested columns.
        spans: The rows that extend over several lines.
    """

    header: list[str]
    columns: dict[str, list[Any]]
    spans: list[_Span]


@dataclasses.dataclass(frozen=True)
class _File:
    """A file to parse.

    Args:
        path: The path, which messages name.
        text: The decoded content of the file.
        delimiter: The character between fields.
        columns: The names of the requested columns.
        label_column: The name of the column of labels, if there is one.
    """

    path: Path
    text: str
    delimiter: str
    columns: Sequence[str]
    label_column: str | None


def read_delimited(
    path: Path, text: str, delimiter: str, columns: Sequence[str], label_column: str | None, quoting: Quoting | None
) -> tuple[dict[str, list[Any]], range]:
    """Parse columns of CSV or TSV.

    A TSV file does not say whether a double quote at the start of a field opens a quoted field (as pandas writes it) or
    is an ordinary character (as in GLUE and most corpora). If nothing is declared, the quotes decide.
    If every quote that opens a field is also closed, fields are taken as quoted; a field that seems to contain several
    rows is then an error. Otherwise, quotes are taken as characters; doubled quotes, which writers of quoted fields
    write, are then an error.

    Args:
        path: The path of the file, which messages name.
        text: The decoded content of the file.
        delimiter: The character between fields, a comma or a tab.
        columns: The names of the columns to read.
        label_column: The name of the column of labels, if there is one.
        quoting: The declared interpretation of quotes; None to infer it for TSV, and to read CSV as `quoted`.

    Returns:
        The values of each column, and the row numbers, counted from 1 after the header.

    Raises:
        DataError: A row is malformed, a column is missing, or the interpretation of quotes is ambiguous.
    """
    file = _File(path, text, delimiter, columns, label_column)
    if quoting or delimiter != "\t" or '"' not in text:
        parsed = _parse(file, quoting or "quoted")
    else:
        parsed = _parse_undeclared(file)
    num_rows = len(next(iter(parsed.columns.values()), ()))
    return parsed.columns, range(1, num_rows + 1)


def read_header(path: Path, text: str, delimiter: str, quoting: Quoting | None) -> list[str]:
    """Return the names of all columns of CSV or TSV.

    Args:
        path: The path of the file, which messages name.
        text: The decoded content of the file.
        delimiter: The character between fields, a comma or a tab.
        quoting: The declared interpretation of quotes; None to read them as `quoted`.

    Raises:
        DataError: The header is malformed.
    """
    try:
        records = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            strict=True,
            quoting=csv.QUOTE_NONE if quoting == "plain" else csv.QUOTE_MINIMAL,
        )
        return next((record for record in records if record), [])
    except csv.Error as error:
        raise DataError(f"{path}: the header is not valid CSV ({error}). Correct its quotes.") from error


def _parse_undeclared(file: _File) -> _Parsed:
    """Parse a file whose quotes are not declared, under the interpretation that `read_delimited` describes."""
    quoted, plain = _parse_or_error(file, "quoted"), _parse_or_error(file, "plain")
    if isinstance(quoted, _Parsed):
        span = _find_swallowed_rows(file, quoted, is_plain_valid=isinstance(plain, _Parsed))
        if span is not None:
            num_lines = span.end_line - span.first_line
            raise DataError(
                f"{file.path}, row {span.row}: a double quote opens a field that goes on for {num_lines} lines, but "
                f"the first and the last of them look like rows of their own. {_DECLARE_QUOTING}."
            )
        return quoted
    if isinstance(plain, _Parsed):
        if '""' in file.text:
            raise DataError(
                f"{quoted} Doubled quotes suggest that fields are quoted, but this one is not. {_DECLARE_QUOTING}."
            )
        return plain
    if str(quoted) == str(plain):
        raise quoted
    raise DataError(f"{quoted} With quotes as characters: {plain} {_DECLARE_QUOTING}, and correct the row.")


def _parse_or_error(file: _File, quoting: Quoting) -> _Parsed | DataError:
    """Parse a file, and return the error instead of raising it, so that two interpretations can be compared."""
    try:
        return _parse(file, quoting)
    except DataError as error:
        return error


def _parse(file: _File, quoting: Quoting) -> _Parsed:
    """Parse a file under one interpretation of its quotes; raise DataError if a row is malformed."""
    header: list[str] = []
    field_indices: list[int] = []
    values: list[list[Any]] = [[] for _ in file.columns]
    spans = []
    row = 0
    line = 0
    # pandas would pad rows that are too short, and shift rows that are too long
    reader = csv.reader(
        io.StringIO(file.text, newline=""),
        delimiter=file.delimiter,
        strict=True,
        quoting=csv.QUOTE_NONE if quoting == "plain" else csv.QUOTE_MINIMAL,
    )
    size_limit = csv.field_size_limit(_MAX_FIELD_SIZE)
    try:
        for record in reader:
            first_line = line
            line = reader.line_num
            if not record:
                continue
            if not header:
                header = record
                _check_delimiter(file, header)
                require_columns(file.columns, header, str(file.path))
                field_indices = [header.index(column) for column in file.columns]
                continue
            row += 1
            if len(record) != len(header):
                raise DataError(_explain_field_count(file, quoting, row, len(header), len(record)))
            if line - first_line > 1:
                spans.append(_Span(row, first_line, line))
            for column, index in zip(values, field_indices, strict=True):
                column.append(record[index])
    except csv.Error as error:
        raise DataError(
            f"{file.path}, row {row + 1}: not valid CSV ({error}). Close every double quote, and double those inside a "
            "text. If quotes are ordinary characters, declare `quoting: plain` in the task file."
        ) from error
    finally:
        csv.field_size_limit(size_limit)
    return _Parsed(header, dict(zip(file.columns, values, strict=True)) if header else {}, spans)


def _explain_field_count(file: _File, quoting: Quoting, row: int, num_columns: int, num_fields: int) -> str:
    if quoting == "quoted":
        remedy = f"Put fields that contain a {file.delimiter!r} or a line break in double quotes."
    else:
        remedy = f"No field may contain a {file.delimiter!r} or a line break."
    return f"{file.path}, row {row}: the header names {num_columns} columns, the row has {num_fields}. {remedy}"


def _check_delimiter(file: _File, header: list[str]) -> None:
    """Refuse a file whose header is a single field: all requested columns, separated by a different delimiter."""
    if len(header) > 1 or len(file.columns) == 1:
        return
    for delimiter in ",;\t|":
        if delimiter != file.delimiter and {*file.columns} <= {*header[0].split(delimiter)}:
            remedy = {"\t": "Name it .tsv.", ",": "Name it .csv."}.get(delimiter, f"Write it with {file.delimiter!r}.")
            raise DataError(
                f"{file.path}: columns are separated by {delimiter!r}, but {file.delimiter!r} was expected. {remedy}"
            )


def _find_swallowed_rows(file: _File, quoted: _Parsed, *, is_plain_valid: bool) -> _Span | None:
    """Find a row that seems to consist of several rows between two unrelated quotes.

    A quoted text that spans lines begins in one line and ends in another, and neither of these lines is a row by
    itself. Both seem to be rows if they have as many fields as the header. If the file cannot be parsed with quotes as
    characters, delimiters inside the text may explain that number of fields. Both lines must then also have a known
    label in the label's field.

    Args:
        file: The file, with its label column if it has one.
        quoted: The content of the file if quotes delimit fields.
        is_plain_valid: Whether the file can also be parsed with quotes as ordinary characters.

    Returns:
        The lines of the first such row; None if there is no such row.
    """
    if not quoted.spans:
        return None
    lines = list(io.StringIO(file.text, newline=""))
    labels = {label_name(value) for value in quoted.columns[file.label_column]} if file.label_column else set()

    def is_row(line: str) -> bool:
        fields = line.rstrip("\r\n").split(file.delimiter)
        if len(fields) != len(quoted.header):
            return False
        if is_plain_valid or not file.label_column:
            return True
        return label_name(fields[quoted.header.index(file.label_column)]) in labels

    for span in quoted.spans:
        if is_row(lines[span.first_line]) and is_row(lines[span.end_line - 1]):
            return span
    return None


def require_columns(columns: Sequence[str], available: Sequence[str], source: str) -> None:
    """Check that a source has each of some columns exactly once.

    Args:
        columns: The names of the columns to read.
        available: The names of all columns of the source.
        source: The source as messages name it, such as the path of a file.

    Raises:
        DataError: A column is missing or repeated.
    """
    for column in columns:
        if column not in available:
            suggestion = did_you_mean(column, available)
            raise DataError(f"{source}: no column {column!r}.{suggestion} The columns are: {format_names(available)}.")
        if list(available).count(column) > 1:
            raise DataError(f"{source}: there are several columns {column!r}. Rename all but one.")
