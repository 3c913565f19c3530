"""From a task's sources to its examples."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from regraft.task.data import TaskData, duplicates
from regraft.task.sample import hold_out
from regraft.task.source import read_table
from regraft.task.summary import data_warnings
from regraft.task.types import Task

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


def read_task(task: Task, seed: int = 0) -> TaskData:
    """Read the examples of a task.

    Inputs stay as they are; targets are what the task's type makes of their columns. Without a dev source a tenth of
    train is held out, stratum by stratum; with `task.shots` a few examples of each are kept.

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
        name: read_table(source, task.input_columns, task.target_columns, task.quoting)
        for name, source in sources.items()
        if source
    }
    labels, splits = task.read(tables)
    train, dev, test = splits["train"], splits.get("dev"), splits.get("test")
    if dev is None:
        train, dev = hold_out(train, task, labels, seed)
    data = TaskData(task, labels, train, dev, test, len(duplicates(train, test)), labelled=bool(task.target_columns))
    return data if task.shots is None else data.few_shot(task.shots, seed)


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
    for doubt in data_warnings(data):
        log.warning("%s", doubt)
    return data
