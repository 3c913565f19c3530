"""From a task's sources to its examples."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError
from regraft.task.data import TaskData, duplicates
from regraft.task.file import is_unicode
from regraft.task.labels import folded, label_name, label_order, listing
from regraft.task.sample import hold_out
from regraft.task.source import Table, read_table
from regraft.task.split import Split
from regraft.task.summary import doubts
from regraft.task.task import Task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

log = logging.getLogger(__name__)


def read_task(task: Task, seed: int = 0) -> TaskData:
    """Read the examples of a task.

    Texts stay as they are. Labels become text and are numbered in the order of `task.labels`, else of the class names
    that the data set brings, else sorted. Without a dev source a tenth of train is held out, class by class; with
    `task.shots` a few examples a class are kept. Without a column of labels every example is of class 0.

    Args:
        task: The task.
        seed: What held-out and few-shot examples are drawn from.

    Returns:
        The examples.

    Raises:
        DataError: A source cannot be read, or a row cannot be used; the message names them.
    """
    sources = {"train": task.train, "dev": task.dev, "test": task.test}
    tables = {
        name: read_table(source, task.columns, task.label, task.quoting) for name, source in sources.items() if source
    }
    names = {split: _label_names(table, task.label, task.labels) for split, table in tables.items()}
    labels = task.labels or tables["train"].classes or label_order(names["train"])
    if broken := [label for label in labels if not is_unicode(label)]:
        raise DataError(f"{tables['train'].source}: the label {broken[0]!r} is not valid Unicode. Rename it.")
    splits = {
        split: _encoded(split, table, task.columns, names[split], labels, listed=task.labels is not None)
        for split, table in tables.items()
    }
    train, dev, test = splits["train"], splits.get("dev"), splits.get("test")
    if task.label is not None and len(present := sorted(set(names["train"]))) < 2:
        raise DataError(
            f"{train.source}: every row has the label {present[0]!r}; a task needs two labels or more. "
            f"Check that {task.label!r} is the column of labels."
        )
    if dev is None:
        train, dev = hold_out(train, labels, seed)
    data = TaskData(task.name, task.metric, task.max_length, labels, train, dev, test, len(duplicates(train, test)))
    data = dataclasses.replace(data, labelled=task.label is not None)
    if task.shots is not None:
        data = data.few_shot(task.shots, seed)
    return data


def _label_names(table: Table, column: str | None, labels: Sequence[str] | None) -> list[str]:
    """Name the label of each row; where there is no column of them, the first of all labels stands for none."""
    if column is None:
        return [(labels or ("",))[0]] * len(table.rows)

    def name(value: object) -> str | None:
        if table.classes is None or not isinstance(value, int):
            return label_name(value)
        return table.classes[value] if 0 <= value < len(table.classes) else None  # a hidden label is stored as −1

    named: list[str] = []
    for row, value in zip(table.rows, table.columns[column], strict=True):
        try:
            found = name(value)
        except TypeError as error:
            raise DataError(
                f"{table.source}, row {row}: the label in column {column!r} is {error}. Write it as text or a number."
            ) from None
        if found is None:
            raise DataError(
                f"{table.source}, row {row}: no label in column {column!r} (found {value!r}). "
                "Label the row or remove it; for a test split without labels, use another one."
            )
        named.append(found)
    return named


def _encoded(
    split: str, table: Table, columns: Sequence[str], names: Sequence[str], labels: Sequence[str], listed: bool
) -> Split:
    import numpy as np

    places = {name: place for place, name in enumerate(labels)}
    for row, name in zip(table.rows, names, strict=True):
        if name not in places:
            near = [label for label in labels if folded(label) == folded(name)]
            hint = f" It differs from {near[0]!a} only in case, blanks or what is not visible." if near else ""
            remedy = "Add it to `labels`" if listed else "List all labels under `labels` in the task file"
            raise DataError(
                f"{table.source}, row {row}: the label {name!r} is not among those "
                f"{'listed' if listed else 'of train'}: {listing(labels)}.{hint} {remedy}, or correct the row."
            )
    parts = [_checked(table, column) for column in columns]
    return Split(
        split,
        table.source,
        list(zip(*parts, strict=True)),
        np.array([places[name] for name in names], dtype=np.int64),
        np.array(table.rows, dtype=np.int64),
    )


def _checked(table: Table, column: str) -> list[str]:
    """Return the texts of a column if all of them can be used."""
    texts: list[Any] = table.columns[column]
    if bad := [row for row, text in zip(table.rows, texts, strict=True) if _fault(text)]:
        fault = _fault(next(text for text in texts if _fault(text)))
        count = f" (and so in {len(bad):,} rows)" if len(bad) > 1 else ""
        raise DataError(
            f"{table.source}, row {bad[0]}: the text in column {column!r} is {fault}{count}. "
            "Give every row a text, or remove the row."
        )
    return texts


def _fault(text: object) -> str | None:
    if text is None:
        return "missing"
    if not isinstance(text, str):
        return f"of type {type(text).__name__} ({text!r}), not text"
    if not text.strip():
        return "empty"
    return None if is_unicode(text) else "not valid Unicode"


def load_data(task: Task | TaskData | str | Path, seed: int) -> TaskData:
    """Read a task's data, whatever stands for it, and warn of what makes its scores doubtful.

    Args:
        task: A task file, a `Task` or its data.
        seed: For few-shot sampling and for a dev split that is held out.

    Returns:
        The data.
    """
    if isinstance(task, TaskData):
        return task
    data = read_task(task if isinstance(task, Task) else Task.load(task), seed)
    for doubt in doubts(data):
        log.warning("%s", doubt)
    return data
