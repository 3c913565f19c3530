"""Columns of a file or a data set, as they stand there."""

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
from regraft.task.delimited import read_delimited, require_columns
from regraft.task.file import COMPRESSED, check_folder, check_regular_file, data_suffix, read_bytes, read_json_rows
from regraft.task.labels import label_name, listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.task.delimited import Quoting

READ = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


class HubSplit(BaseModel):
    """A split of a data set that `datasets` loads: one of the Hugging Face Hub, or a local folder of data files.

    Args:
        dataset: Its name on the Hub, or a folder.
        split: The split, also a slice of it such as `train[:1000]`.
        config: The configuration (subset), where it has several.
        revision: A branch, tag or commit on the Hub.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(min_length=1, description="the name of a data set on the Hugging Face Hub, or a folder")
    split: str = Field(min_length=1, description="a split of the data set, such as train")
    config: str | None = Field(default=None, description="the name of a configuration of the data set")
    revision: str | None = Field(default=None, description="a branch, tag or commit of the data set")

    def __str__(self) -> str:
        parts = [self.dataset, self.config and f"config {self.config}", f"split {self.split}"]
        return ", ".join(part for part in parts if part)


_File = Annotated[str, Field(min_length=1), BeforeValidator(lambda at: os.fspath(at) if isinstance(at, Path) else at)]


def _kind_of_source(value: Any) -> str:
    return "<data set>" if isinstance(value, dict | HubSplit) else "<file>"


Source = Annotated[
    Annotated[_File, Tag("<file>")] | Annotated[HubSplit, Tag("<data set>")], Discriminator(_kind_of_source)
]
"""Where a split is read from, as a task file names it."""
SOURCE = "a file (.csv, .tsv, .jsonl, .json, .parquet) or {dataset: NAME, split: SPLIT}"


def resolved(source: str | HubSplit | None, folder: Path) -> str | HubSplit | None:
    """Return a source with its path absolute.

    Args:
        source: A file, or a split of a data set; None stays None.
        folder: Where relative paths start from.

    Returns:
        The source.
    """
    if isinstance(source, str):
        return os.path.abspath(folder / os.path.expanduser(source))
    if source is not None and os.path.isdir(beside := folder / os.path.expanduser(source.dataset)):
        return source.model_copy(update={"dataset": os.path.abspath(beside)})
    return source


@dataclasses.dataclass(frozen=True)
class Table:
    """Some columns of a source.

    Args:
        source: How messages name it.
        columns: The values of each column.
        rows: Where each row stands in the source, from 1.
        classes: By column, the label names where the source stores labels as numbers together with their names.
    """

    source: str
    columns: dict[str, list[Any]]
    rows: Sequence[int]
    classes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def read_table(
    source: str | HubSplit, inputs: Sequence[str], targets: Sequence[str], quoting: Quoting | None = None
) -> Table:
    """Read the columns of a task.

    Args:
        source: A file, or a split of a data set.
        inputs: The columns that a model reads.
        targets: The columns of what it is to predict, if there are any.
        quoting: How CSV and TSV files are written, as `Task` has it.

    Returns:
        These columns; there is at least one row.

    Raises:
        DataError: The source is missing, malformed or empty, of a kind that is not read, or lacks a column.
    """
    if isinstance(source, str):
        table = _read_file(Path(source), inputs, targets, quoting)
    else:
        table = _read_dataset(source, inputs, targets)
    if not table.rows:
        raise DataError(f"{table.source}: holds no rows. Give a source with examples.")
    return table


def _read_file(path: Path, inputs: Sequence[str], targets: Sequence[str], quoting: Quoting | None) -> Table:
    ending = data_suffix(path)
    if ending == ".arrow" or (ending not in READ and os.path.isdir(path)):
        folder = path if os.path.isdir(path) else path.parent
        raise DataError(
            f"{path}: is a folder, or a file of one, and a folder is read by its splits. Write {{dataset: "
            f"{folder.name}, split: train}} in place of {path.name}."
        )
    if ending not in READ:
        raise DataError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} are not read as a task. Give a .csv, .tsv, "
            ".jsonl, .json (an object a line, or a list of objects) or .parquet file, the text files also compressed "
            f"({', '.join(COMPRESSED)}); for a data set of the Hub, write "
            f"{{dataset: {'NAME' if path.suffix else path.name}, split: train}}."
        )
    check_regular_file(path)
    if ending == ".parquet":
        return _read_parquet(path, inputs, targets)
    columns = [*inputs, *targets]
    if ending.startswith(".json"):
        return _read_json(path, columns)
    delimiter = "\t" if ending == ".tsv" else ","
    return Table(
        str(path), *read_delimited(path, _decoded(path), delimiter, columns, targets[0] if targets else None, quoting)
    )


def _read_json(path: Path, columns: Sequence[str]) -> Table:
    entries, rows = [], []
    for row, entry in read_json_rows(path):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}, row {row}: a JSON {type(entry).__name__}, not an object. Write one list of objects, or one "
                "object a line."
            )
        entries.append(entry)
        rows.append(row)
    if len(entries) == 1 and isinstance(entries[0].get(columns[0], {}), dict | list):
        raise DataError(
            f"{path}: is one object, whose keys are {listing(list(entries[0]))}, not an object for each example. Write "
            "it as a list of those (pandas: orient='records')."
        )
    if entries:
        require_columns(columns, list(dict.fromkeys(key for entry in entries for key in entry)), str(path))
    return Table(str(path), {column: [entry.get(column) for entry in entries] for column in columns}, rows)


def _read_parquet(path: Path, inputs: Sequence[str], targets: Sequence[str]) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            table = file.read(columns=require_columns([*inputs, *targets], schema.names, str(path)))
        columns = table.to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: text that is not UTF-8
        raise DataError(f"{path}: not a Parquet file that can be read ({_reason(error)}). Write it anew.") from error
    classes = {}
    if b"huggingface" in (schema.metadata or {}):  # written by `datasets`, which keeps the names of classes there
        from datasets import Features

        try:
            features = Features.from_arrow_schema(schema)
        except Exception as error:  # the metadata is JSON of any shape, and `datasets` takes it for its own
            raise DataError(
                f"{path}: what it says of its columns for `datasets` cannot be used ({_reason(error)}). "
                "Write it anew, or without that metadata."
            ) from error
        classes = _classes(features, targets, str(path))
    return Table(str(path), columns, range(1, table.num_rows + 1), classes)


def _read_dataset(source: HubSplit, inputs: Sequence[str], targets: Sequence[str]) -> Table:
    dataset = _load_dataset(source)
    columns = require_columns([*inputs, *targets], dataset.column_names, str(source))
    try:
        values = dataset.select_columns(columns).with_format(None)[:]
    except Exception as error:  # rows are decoded only now, by code for each type of column
        raise DataError(f"{source}: its rows cannot be read ({_reason(error)}). Write the data set anew.") from error
    return Table(str(source), values, range(1, len(dataset) + 1), _classes(dataset.features, targets, str(source)))


def _load_dataset(source: HubSplit) -> Any:
    from datasets import load_dataset

    folder = Path(source.dataset)
    try:
        if is_saved_dataset(folder):
            return load_saved_dataset(source)
        check_folder(folder)
        return load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except DataError:
        raise
    except Exception as error:  # datasets and its readers raise many kinds
        raise DataError(
            f"{source}: `datasets` cannot load it ({_reason(error)}). Check its name, config, split and revision."
        ) from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of a Dataset or DatasetDict wrote a folder."""
    names = ("dataset_dict.json",), ("state.json", "dataset_info.json")
    return any(all(os.path.isfile(folder / name) for name in group) for group in names)


def load_saved_dataset(source: HubSplit) -> Any:
    """Load a split, or slices of splits, of what `save_to_disk` wrote.

    Args:
        source: The folder and the split. A Dataset that does not know the name of its split has any.

    Returns:
        A Dataset.

    Raises:
        DataError: A file in it is no regular file or outside of it, or the source has a config or a revision.
    """
    from datasets import Dataset, ReadInstruction, concatenate_datasets, load_from_disk

    folder = Path(source.dataset)
    if source.config or source.revision:
        raise DataError(f"{source}: a folder of save_to_disk has no `config` and no `revision`. Leave them out.")
    check_folder(folder)
    for state in folder.rglob("state.json"):
        for file in json.loads(state.read_bytes())["_data_files"]:
            if Path(file["filename"]).name != file["filename"]:
                raise DataError(f"{state}: names {file['filename']!r:.200}, which is outside of its folder.")
    content = load_from_disk(str(folder))
    if isinstance(content, Dataset):
        content = {str(content.split or re.findall(r"\w*", source.split)[0]): content}
    parts = ReadInstruction.from_spec(source.split).to_absolute({name: len(split) for name, split in content.items()})
    return concatenate_datasets([content[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _classes(features: Any, targets: Sequence[str], source: str) -> dict[str, tuple[str, ...]]:
    """Return the class names of target columns, also of those that are lists of classes."""
    classes: dict[str, tuple[str, ...]] = {}
    for column in targets:
        feature = features.get(column)
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if not names:
            continue
        if not all(isinstance(name, str) for name in names):
            raise DataError(f"{source}: the class names of {column!r} are {names!r:.200}, not text. Write them anew.")
        classes[column] = tuple(label_name(name) or name for name in names)
        if twins := [name for name, count in Counter(classes[column]).items() if count > 1]:
            raise DataError(f"{source}: several classes of {column!r} are called {twins[0]!r}. Give each its own name.")
    return classes


def _decoded(path: Path) -> str:
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: is not UTF-8 text ({error.reason}). Save the file as UTF-8; one that is compressed "
            f"needs the ending that says so ({', '.join(COMPRESSED)})."
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
