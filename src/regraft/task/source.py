"""Readers of columns from data files and Hugging Face data sets; task types interpret the values."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from regraft.errors import DataError
from regraft.task.conll import CONLL_SUFFIXES, are_column_numbers, read_conll
from regraft.task.delimited import read_delimited, require_columns
from regraft.task.file import (
    COMPRESSED_SUFFIXES,
    check_folder,
    check_regular_file,
    data_suffix,
    first_line,
    read_bytes,
    read_json_rows,
)
from regraft.task.labels import format_names, label_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset, Features

    from regraft.task.delimited import Quoting

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", *CONLL_SUFFIXES)
"""The suffixes of the file formats that are read; text formats may be compressed."""


class HubSplit(BaseModel):
    """A split of a data set that `datasets` loads: one of the Hugging Face Hub, or a local folder.

    The folder holds data files, or was written by `save_to_disk`.

    Args:
        dataset: The name of the data set on the Hub, or a folder.
        split: The split, or a slice of it such as `train[:1000]`.
        config: The configuration (subset), if the data set has several.
        revision: A branch, tag or commit on the Hub.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(min_length=1, description="the name of a data set on the Hugging Face Hub, or a folder")
    split: str = Field(min_length=1, description="a split of the data set, such as train")
    config: str | None = Field(default=None, description="the name of a configuration of the data set")
    revision: str | None = Field(default=None, description="a branch, tag or commit of the data set")

    def __str__(self) -> str:
        config = f", config {self.config}" if self.config else ""
        return f"{self.dataset}{config}, split {self.split}"


def _path_as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, Path) else value


_File = Annotated[str, Field(min_length=1), BeforeValidator(_path_as_text)]


def _source_tag(value: Any) -> str:
    return "<data set>" if isinstance(value, dict | HubSplit) else "<file>"


Source = Annotated[Annotated[_File, Tag("<file>")] | Annotated[HubSplit, Tag("<data set>")], Discriminator(_source_tag)]
"""The source of a split in a task file: the path of a file, or a split of a data set."""
SOURCE_DESCRIPTION = f"a file ({', '.join(SUFFIXES)}) or {{dataset: NAME, split: SPLIT}}"
"""The description of a source in error messages."""


def resolve_source(source: str | HubSplit | None, folder: Path) -> str | HubSplit | None:
    """Make the path of a source absolute.

    Args:
        source: The path of a file, a split of a data set, or None.
        folder: The folder that relative paths start from.

    Returns:
        The source with an absolute path; the name of a data set that is not a folder is unchanged.
    """
    if isinstance(source, str):
        return os.path.abspath(folder / os.path.expanduser(source))
    if source is None:
        return None
    dataset_folder = folder / os.path.expanduser(source.dataset)
    if not os.path.isdir(dataset_folder):
        return source
    return source.model_copy(update={"dataset": os.path.abspath(dataset_folder)})


@dataclasses.dataclass(frozen=True)
class SourceTable:
    """The columns of a source that a task needs.

    Args:
        source: The source as messages name it: a path, or the data set with its split.
        columns: The values of each column, one per row.
        row_numbers: The number of each row in the source, counted from 1.
        classes: The class names of each target column that holds indices of named classes.
    """

    source: str
    columns: dict[str, list[Any]]
    row_numbers: Sequence[int]
    classes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def read_table(
    source: str | HubSplit, input_columns: Sequence[str], target_columns: Sequence[str], quoting: Quoting | None = None
) -> SourceTable:
    """Read the columns of a task.

    Args:
        source: The path of a file, or a split of a data set.
        input_columns: The names of the columns that a model reads.
        target_columns: The names of the columns that a model is to predict; empty for unlabelled data.
        quoting: The interpretation of quotes in CSV and TSV files; see `Task`.

    Returns:
        The requested columns, with at least one row.

    Raises:
        DataError: The source is missing, malformed, empty, of an unsupported format, or lacks or repeats a column.
    """
    if isinstance(source, str):
        table = _read_file(Path(source), input_columns, target_columns, quoting)
    else:
        table = _read_dataset(source, input_columns, target_columns)
    if not table.row_numbers:
        raise DataError(f"{table.source}: there are no rows. Use a source with examples.")
    return table


def _read_file(
    path: Path, input_columns: Sequence[str], target_columns: Sequence[str], quoting: Quoting | None
) -> SourceTable:
    """Read columns of a file in the format that its suffix names."""
    suffix = data_suffix(path)
    columns = [*input_columns, *target_columns]
    if suffix == ".txt" and are_column_numbers(columns):
        suffix = CONLL_SUFFIXES[0]
    check_format(path, suffix)
    if suffix == ".parquet":
        return _read_parquet(path, input_columns, target_columns)
    if suffix in (".json", ".jsonl"):
        return _read_json(path, columns)
    if suffix in CONLL_SUFFIXES:
        return SourceTable(str(path), *read_conll(path, read_text(path), columns))
    delimiter = "\t" if suffix == ".tsv" else ","
    label_column = target_columns[0] if target_columns else None
    values, row_numbers = read_delimited(path, read_text(path), delimiter, columns, label_column, quoting)
    return SourceTable(str(path), values, row_numbers)


def check_format(path: Path, suffix: str) -> None:
    """Check that a path is a file of a format that is read.

    Args:
        path: The path of a file.
        suffix: The suffix of its format, such as `.csv` for `a.csv.gz`.

    Raises:
        DataError: The format is not read, or the path is missing, inaccessible or not a file.
    """
    if suffix == ".arrow" or (suffix not in SUFFIXES and os.path.isdir(path)):
        folder = path if os.path.isdir(path) else path.parent
        raise DataError(
            f"{path}: is a data set folder or a file in one; data sets are read by split. Write {{dataset: "
            f"{folder.name}, split: train}} instead of {path.name}."
        )
    if suffix not in SUFFIXES:
        files = f"files ending in {path.suffix!r}" if path.suffix else "files without a suffix"
        raise DataError(
            f"{path}: cannot read a task from {files}. Use a .csv, .tsv, .jsonl, "
            ".json (one object per line, or a list of objects), .parquet or .conll file; text files may be compressed "
            f"({', '.join(COMPRESSED_SUFFIXES)}). For a data set of the Hub, write "
            f"{{dataset: {'NAME' if path.suffix else path.name}, split: train}}."
        )
    check_regular_file(path)


def _read_json(path: Path, columns: Sequence[str]) -> SourceTable:
    """Read keys of JSON objects as columns; a key that only some objects lack is None there."""
    entries = []
    row_numbers = []
    for row, entry in read_json_rows(path):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}, row {row}: a JSON {type(entry).__name__}, not an object. Write one list of objects, or one "
                "object per line."
            )
        entries.append(entry)
        row_numbers.append(row)
    # pandas writes a single object of columns unless it is asked for records; a list of objects is a conversation
    value = entries[0].get(columns[0], {}) if len(entries) == 1 else None
    if isinstance(value, dict) or (isinstance(value, list) and not any(isinstance(item, dict) for item in value)):
        raise DataError(
            f"{path}: is a single object with the keys {format_names(list(entries[0]))}, not one object per example. "
            "Write a list of objects (in pandas, orient='records')."
        )
    if entries:
        keys = dict.fromkeys(key for entry in entries for key in entry)
        require_columns(columns, list(keys), str(path))
    values = {column: [entry.get(column) for entry in entries] for column in columns}
    return SourceTable(str(path), values, row_numbers)


def _read_parquet(path: Path, input_columns: Sequence[str], target_columns: Sequence[str]) -> SourceTable:
    """Read columns of a Parquet file, and the class names that `datasets` stores in its metadata."""
    import pyarrow
    import pyarrow.parquet

    columns = [*input_columns, *target_columns]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            require_columns(columns, schema.names, str(path))
            table = file.read(columns=columns)
        values = table.to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: text not in UTF-8
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)}). Write it again.") from error
    classes = {}
    if b"huggingface" in (schema.metadata or {}):  # `datasets` stores class names there
        from datasets import Features

        try:
            features = Features.from_arrow_schema(schema)
        except Exception as error:  # the metadata may be any JSON, which `datasets` does not check
            raise DataError(
                f"{path}: its metadata for `datasets` is invalid ({first_line(error)}). Write the file again, or "
                "without that metadata."
            ) from error
        classes = _class_names(features, target_columns, str(path))
    return SourceTable(str(path), values, range(1, table.num_rows + 1), classes)


def _read_dataset(source: HubSplit, input_columns: Sequence[str], target_columns: Sequence[str]) -> SourceTable:
    """Read columns of a split of a data set, and the class names in its features."""
    dataset = load_split(source)
    columns = [*input_columns, *target_columns]
    require_columns(columns, dataset.column_names, str(source))
    try:
        values = dataset.select_columns(columns).with_format(None)[:]
    except Exception as error:  # decoders of rows may raise anything
        raise DataError(
            f"{source}: its rows cannot be read ({first_line(error)}). Write the data set again."
        ) from error
    classes = _class_names(dataset.features, target_columns, str(source))
    return SourceTable(str(source), values, range(1, len(dataset) + 1), classes)


def load_split(source: HubSplit) -> Dataset:
    """Load a Dataset from the Hub or a folder; raise DataError if `datasets` cannot."""
    from datasets import load_dataset

    folder = Path(source.dataset)
    try:
        if is_saved_dataset(folder):
            return load_saved_dataset(source)
        check_folder(folder)
        return load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except DataError:
        raise
    except Exception as error:  # `datasets` and its readers raise exceptions of many types
        raise DataError(
            f"{source}: `datasets` cannot load it ({first_line(error)}). Check its name, config, split and revision."
        ) from error


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of a Dataset or DatasetDict."""
    is_dict = os.path.isfile(folder / "dataset_dict.json")
    return is_dict or all(os.path.isfile(folder / name) for name in ("state.json", "dataset_info.json"))


def load_saved_dataset(source: HubSplit) -> Dataset:
    """Load a split, or slices of splits, from a folder that `save_to_disk` wrote.

    Args:
        source: The folder and the split; a Dataset without a split name is loaded under any name.

    Returns:
        The `datasets.Dataset` of the requested rows.

    Raises:
        DataError: The folder contains a pipe or device, or refers to files outside; or the source names a config or a
            revision.
    """
    from datasets import Dataset, ReadInstruction, concatenate_datasets, load_from_disk

    folder = Path(source.dataset)
    if source.config or source.revision:
        raise DataError(f"{source}: a folder from save_to_disk has no `config` and no `revision`. Leave them out.")
    check_folder(folder)
    for state in folder.rglob("state.json"):
        for file in json.loads(state.read_bytes())["_data_files"]:
            if Path(file["filename"]).name != file["filename"]:
                raise DataError(f"{state}: names {file['filename']!r:.200}, which is outside of its folder.")
    splits = load_from_disk(str(folder))
    if isinstance(splits, Dataset):
        requested_name = re.findall(r"\w*", source.split)[0]  # `train` for `train[:10%]`
        splits = {str(splits.split or requested_name): splits}
    sizes = {name: len(split) for name, split in splits.items()}
    slices = ReadInstruction.from_spec(source.split).to_absolute(sizes)
    return concatenate_datasets([splits[rows.splitname].select(range(rows.from_, rows.to)) for rows in slices])


def _class_names(features: Features, target_columns: Sequence[str], source: str) -> dict[str, tuple[str, ...]]:
    """Return the class names by target column; columns without class names are omitted."""
    classes: dict[str, tuple[str, ...]] = {}
    for column in target_columns:
        feature = features.get(column)
        item_feature = getattr(feature, "feature", feature)  # a column of lists names the classes of its items
        names = getattr(item_feature, "names", None)
        if not names:
            continue
        if not all(isinstance(name, str) for name in names):
            raise DataError(f"{source}: the class names of {column!r} are {names!r:.200}, not text. Correct them.")
        classes[column] = tuple(label_name(name) or name for name in names)
        repeated = [name for name, count in Counter(classes[column]).items() if count > 1]
        if repeated:
            raise DataError(
                f"{source}: several classes of {column!r} are called {repeated[0]!r}. Give each a different name."
            )
    return classes


def read_text(path: Path) -> str:
    """Read a file of UTF-8 text, with or without a byte order mark."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: is not UTF-8 text ({error.reason}). Save the file as UTF-8; if it is compressed, "
            f"give it the matching suffix ({', '.join(COMPRESSED_SUFFIXES)})."
        ) from error
