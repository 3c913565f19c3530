"""Columns of a file or a data set, as they stand there."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError
from regraft.task.labels import label_name
from regraft.task.yaml_file import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.task.task import HubSplit


@dataclasses.dataclass(frozen=True)
class Table:
    """Some columns of a source.

    Args:
        source: How messages name it.
        columns: The values of each column.
        rows: Where each row stands in the source, from 1.
        classes: The label names where the source stores labels as numbers together with their names.
    """

    source: str
    columns: dict[str, list[Any]]
    rows: Sequence[int]
    classes: tuple[str, ...] | None = None


def read_table(source: str | HubSplit, texts: Sequence[str], label: str | None) -> Table:
    """Read the columns of a task.

    Args:
        source: A file, or a split of a data set.
        texts: The columns of text.
        label: The column of labels, if there is one.

    Returns:
        These columns; there is at least one row.

    Raises:
        DataError: The source is missing, malformed or empty, of a kind that is not read, or lacks a column.
    """
    table = _read_file(Path(source), texts, label) if isinstance(source, str) else _read_hub(source, texts, label)
    if not table.rows:
        raise DataError(f"{table.source}: holds no rows. Give a source with examples.")
    return table


def _read_file(path: Path, texts: Sequence[str], label: str | None) -> Table:
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        raise DataError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} are not read as a task. Give a .csv, .tsv, "
            ".jsonl, .json (an object a line) or .parquet file; for a data set of the Hub or a folder, write "
            f"{{dataset: {path.name}, split: train}}."
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file. Correct the path; relative ones start from the task file's folder.")
    if ending == ".parquet":
        return _read_parquet(path, texts, label)
    wanted = _wanted(texts, label)
    return _read_jsonl(path, wanted) if ending.startswith(".json") else _read_csv(path, wanted)


def _read_csv(path: Path, wanted: Sequence[str]) -> Table:
    text, rows = _decoded(path), 0
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KiB that csv allows
    try:
        # The csv module rather than pandas: pandas fills up rows that are too short and shifts those that are too long.
        records = (
            record for record in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if record
        )
        header = next(records, None)
        if header is None:
            return Table(str(path), {}, ())
        places = [header.index(column) for column in _require(wanted, header, str(path))]
        columns: list[list[Any]] = [[] for _ in places]
        for rows, record in enumerate(records, start=1):
            if len(record) != len(header):
                raise DataError(
                    f"{path}, row {rows}: the header names {len(header)} columns, the row has {len(record)}. "
                    f"Put fields that hold a {delimiter!r} or a line break in double quotes."
                )
            for column, place in zip(columns, places, strict=True):
                column.append(record[place])
    except csv.Error as error:
        raise DataError(
            f"{path}, row {rows + 1}: not valid CSV ({error}). Close every double quote; double those in a text."
        ) from error
    finally:
        csv.field_size_limit(limit)
    return Table(str(path), dict(zip(wanted, columns, strict=True)), range(1, rows + 1))


def _read_jsonl(path: Path, wanted: Sequence[str]) -> Table:
    entries, rows = [], []
    for row, line in enumerate(_decoded(path).split("\n"), start=1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, row {row}: not JSON ({error}). Write one JSON object a line.") from error
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}, row {row}: a JSON {type(entry).__name__}, not an object. Write one object a line."
            )
        entries.append(entry)
        rows.append(row)
    if entries:
        _require(wanted, list(dict.fromkeys(key for entry in entries for key in entry)), str(path))
    return Table(str(path), {column: [entry.get(column) for entry in entries] for column in wanted}, rows)


def _read_parquet(path: Path, texts: Sequence[str], label: str | None) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            table = file.read(columns=_require(_wanted(texts, label), schema.names, str(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({_reason(error)}). Write it anew.") from error
    classes = None
    if b"huggingface" in (schema.metadata or {}):  # written by `datasets`, which keeps the names of classes there
        from datasets import Features

        classes = _classes(Features.from_arrow_schema(schema), label)
    return Table(str(path), table.to_pydict(), range(1, table.num_rows + 1), classes)


def _read_hub(source: HubSplit, texts: Sequence[str], label: str | None) -> Table:
    from datasets import load_dataset

    try:
        loaded = load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # datasets and its readers raise many kinds
        raise DataError(
            f"{source}: `datasets` cannot load it ({_reason(error)}). Check its name, config, split and revision."
        ) from error
    wanted = _require(_wanted(texts, label), loaded.column_names, str(source))
    columns = loaded.select_columns(wanted).with_format(None)[:]
    return Table(str(source), columns, range(1, len(loaded) + 1), _classes(loaded.features, label))


def _wanted(texts: Sequence[str], label: str | None) -> list[str]:
    return [*texts] if label is None else [*texts, label]


def _classes(features: Any, label: str | None) -> tuple[str, ...] | None:
    names = getattr(features[label], "names", None) if label is not None else None
    return tuple(label_name(name) or name for name in names) if names else None


def _require(wanted: Sequence[str], present: Sequence[str], source: str) -> list[str]:
    for column in wanted:
        if column not in present:
            found = ", ".join(map(repr, present)) or "none"
            raise DataError(f"{source}: no column {column!r}.{did_you_mean(column, present)} The columns are: {found}.")
        if list(present).count(column) > 1:
            raise DataError(f"{source}: the column {column!r} stands there twice. Rename one of them.")
    return list(wanted)


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check its permissions.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: is not UTF-8 text ({error.reason}). Save the file as UTF-8.") from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
