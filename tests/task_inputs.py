"""Rows, files and tasks that the tests of tasks share."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import data_of

from regraft.task import HubSplit, Split, Task, TaskData, TextClassification

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Rows = list[dict[str, Any]]
KEYS = {"train": "a.csv", "text": "text", "label": "label"}


def make_rows(count: int, labels: tuple[Any, ...] = ("neg", "pos"), stem: str = "text") -> Rows:
    """Build rows whose labels take turns."""
    return [{"text": f"{stem} number {i}", "label": labels[i % len(labels)]} for i in range(count)]


def write_table(path: Path, rows: Rows) -> str:
    """Write rows in the format of the path's suffix, and return the path."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_task(train: str | HubSplit | dict[str, str], **keys: Any) -> Task:
    """Build a task of text classification with other keys of its task file."""
    return TextClassification.model_validate({"name": "t", **KEYS, "train": train, **keys})


def make_data(train: Sequence[int], dev: Sequence[int] = (0, 1, 2), labels: Sequence[str] = "abc") -> TaskData:
    """Build a task in memory from the classes of its examples."""
    return data_of(_make_split("train", train), _make_split("dev", dev), labels=labels)


def _make_split(name: str, targets: Sequence[int]) -> Split:
    texts: list[tuple[str, ...]] = [(f"{name} {i}",) for i in range(len(targets))]
    return Split(name, f"{name}.csv", texts, np.array(targets, dtype=np.int64), np.arange(1, len(targets) + 1))


def read_texts(data: TaskData) -> list[str]:
    """Return all texts of train and dev in the order of their source."""
    rows = [
        *zip(data.train.row_numbers, data.train.texts, strict=True),
        *zip(data.dev.row_numbers, data.dev.texts, strict=True),
    ]
    return [texts[0] for _, texts in sorted(rows)]


def assert_mentions(error: pytest.ExceptionInfo[Exception], *parts: object) -> None:
    """Check that an error's message contains all parts."""
    message = str(error.value)
    for part in parts:
        assert str(part) in message, message
