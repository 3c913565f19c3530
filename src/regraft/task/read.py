"""The reader of a task's examples, with the held-out dev split and few-shot samples."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from regraft.task.columns import list_columns
from regraft.task.data import TaskData, find_duplicates
from regraft.task.sample import TEST_SEED, hold_out
from regraft.task.source import read_table
from regraft.task.summary import data_warnings
from regraft.task.types import Task

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


def read_task(task: Task, seed: int = 0) -> TaskData:
    """Read the examples of a task.

    Without a dev source, a tenth of each stratum of train is held out as dev, and before it as test with
    `task.hold_out_test`; with `task.shots`, only a few examples of
    each stratum of train and dev are kept.

    Args:
        task: A task of any type, with absolute paths if it was loaded from a file.
        seed: The seed of the held-out dev split and of few-shot samples.

    Returns:
        The task's data, with inputs as in the sources and targets as the task type encodes them.

    Raises:
        DataError: A source cannot be read, a row is invalid, or a stratum has too few examples; the message names the
            source.
        RecipeError: `task.shots` is less than 1.
    """
    if not task.has_columns:
        task = task.with_columns(list_columns(task.train, task.quoting), str(task.train))
    sources = {"train": task.train, "dev": task.dev, "test": task.test}
    tables = {
        split: read_table(source, task.input_columns, task.target_columns, task.quoting)
        for split, source in sources.items()
        if source
    }
    labels, splits = task.read(tables)
    train = splits["train"]
    dev = splits.get("dev")
    test = splits.get("test")
    if test is None and task.hold_out_test:
        train, test = hold_out(train, task, labels, TEST_SEED, "test")
    if dev is None:
        train, dev = hold_out(train, task, labels, seed)
    duplicates = len(find_duplicates(train, test))
    data = TaskData(task, labels, train, dev, test, duplicates, labelled=task.is_labelled(splits))
    return data if task.shots is None else data.few_shot(task.shots, seed)


def load_data(task: Task | TaskData | str | Path, seed: int) -> TaskData:
    """Load a task's data, and log a warning for each problem that makes its scores unreliable.

    Args:
        task: The path of a task file, a task, or its data, which is returned unchanged and without warnings.
        seed: The seed of the held-out dev split and of few-shot samples.

    Raises:
        DataError: The task file or a source cannot be read, a row is invalid, or a stratum has too few examples.
        RecipeError: `shots` of the task is less than 1.
    """
    if isinstance(task, TaskData):
        return task
    data = read_task(task if isinstance(task, Task) else Task.load(task), seed)
    for warning in data_warnings(data):
        logger.warning("%s", warning)
    return data
