"""The names of all columns of a source, for task types that detect the format of the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regraft.errors import DataError
from regraft.task.conll import CONLL_SUFFIXES
from regraft.task.delimited import read_header
from regraft.task.file import data_suffix, first_line, read_json_rows
from regraft.task.source import check_format, load_split, read_text

if TYPE_CHECKING:
    from regraft.task.delimited import Quoting
    from regraft.task.source import HubSplit


def list_columns(source: str | HubSplit, quoting: Quoting | None = None) -> list[str]:
    """Return the names of all columns of a source.

    Args:
        source: The path of a file, or a split of a data set.
        quoting: The interpretation of quotes in CSV and TSV files; see `Task`.

    Returns:
        The names in the order of the source; for JSON, the keys that any object has. Columns of CoNLL files have no
        names, so there are none.

    Raises:
        DataError: The source is missing, malformed, or of a format that is not read.
    """
    if not isinstance(source, str):
        return list(load_split(source).column_names)
    path = Path(source)
    suffix = data_suffix(path)
    check_format(path, suffix)
    if suffix == ".parquet":
        return _parquet_columns(path)
    if suffix in (".json", ".jsonl"):
        return list(dict.fromkeys(key for _, row in read_json_rows(path) if isinstance(row, dict) for key in row))
    if suffix in CONLL_SUFFIXES:
        return []
    return read_header(path, read_text(path), "\t" if suffix == ".tsv" else ",", quoting)


def _parquet_columns(path: Path) -> list[str]:
    """Return the names of the columns in the schema of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)}). Write it again.") from error
