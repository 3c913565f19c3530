"""Tasks of data files without a task file: type, columns and metric follow from the data."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError
from regraft.task.columns import list_columns
from regraft.task.file import COMPRESSED_SUFFIXES, data_suffix
from regraft.task.labels import format_names
from regraft.task.source import SUFFIXES, HubSplit, is_saved_dataset, read_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from regraft.task.source import Source

logger = logging.getLogger(__name__)

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
"""The names of files, or of the splits of a data set, by the split of a task."""


def is_data(path: Path) -> bool:
    """Return whether a path is data, not a task file: a folder, or a file with the suffix of a data format.

    Args:
        path: The path, which need not exist.
    """
    is_folder = os.path.isdir(path) and path.suffix.lower() not in (".yaml", ".yml")
    return is_folder or data_suffix(path) in SUFFIXES


def detect_task(path: Path, types: Mapping[str, Any], build: Callable[[Mapping[str, Any], str], Any]) -> Any:
    """Derive a task from data, as a task file would declare it.

    The type and the columns follow from the names of the columns, and the metric of generated answers from the answers.
    Without files for them, dev and test are held out of train.

    Args:
        path: A data file; a folder with `train.*` and perhaps `dev.*` (or `validation.*`) and `test.*`; or a folder
            that `save_to_disk` wrote.
        types: The task types by name.
        build: The function that builds a task of the keys of a task file, and of their origin.

    Returns:
        The task, with absolute paths.

    Raises:
        DataError: There is no training data, or its columns are not those of a single task type; the message names the
            columns.
    """
    sources = _find_sources(path)
    columns = list_columns(sources["train"])
    matches = {name: keys for name, task_type in types.items() if (keys := task_type.keys_for_columns(columns))}
    if len(matches) != 1:
        reason = f"could be of the types {' and '.join(matches)}" if matches else "are not those of a task type"
        raise DataError(
            f"{path}: its columns {format_names(columns)} {reason}. Write a task file with the `type`, `train: "
            f"{path.name}`, and the columns under the keys of the type."
        )
    [(type_name, keys)] = matches.items()
    values: dict[str, Any] = {"type": type_name, "name": _task_name(path), **sources, **keys}
    if "test" not in sources:
        values["hold_out_test"] = True
    task = build(values, str(path))
    task = task.with_data_defaults(read_table(task.train, task.input_columns, task.target_columns))
    logger.warning("%s is read as by this task file:\n%s", path, task.as_yaml())
    return task


def _find_sources(path: Path) -> dict[str, Source]:
    """Return the absolute source of each split that a path has."""
    absolute = Path(os.path.abspath(path))
    if not os.path.isdir(path):
        return {"train": str(absolute)}
    if is_saved_dataset(absolute):
        names: Sequence[str] = ["train"]
        if os.path.isfile(absolute / "dataset_dict.json"):
            names = json.loads((absolute / "dataset_dict.json").read_bytes())["splits"]
        available: dict[str, list[Source]] = {
            name: [HubSplit(dataset=str(absolute), split=name)] for name in sorted(names)
        }
    else:
        available = {}
        for file in sorted(absolute.iterdir()):
            if data_suffix(file) in SUFFIXES:
                available.setdefault(_stem(file), []).append(str(file))
    sources = {}
    for split, split_names in SPLIT_NAMES.items():
        candidates = [source for name in split_names for source in available.get(name, ())]
        if len(candidates) > 1:
            raise DataError(f"{path}: has several sources for {split}: {candidates[0]} and {candidates[1]}. Keep one.")
        if candidates:
            sources[split] = candidates[0]
    if "train" not in sources:
        others = f" Of data, it has {format_names(list(available))}." if available else ""
        raise DataError(
            f"{path}: is a folder without training data: a file train{SUFFIXES[2]}, or of another format "
            f"({', '.join(SUFFIXES)}).{others} Name one of them train, or use the path of a file."
        )
    return sources


def _stem(file: Path) -> str:
    """Return a file's name without the suffixes of its format and its compression."""
    uncompressed = file.with_suffix("") if file.suffix.lower() in COMPRESSED_SUFFIXES else file
    return uncompressed.stem


def _task_name(path: Path) -> str:
    """Return the name of a data file without its suffixes, or of a folder."""
    absolute = Path(os.path.abspath(path))
    return (absolute.name if os.path.isdir(path) else _stem(absolute)) or "task"
