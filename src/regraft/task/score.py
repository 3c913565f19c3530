"""Scores of predictions by the metrics of the task types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import DataError, RecipeError
from regraft.task.metric import Flips, count_flips, require_equal_lengths
from regraft.task.types.type import task_types

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from regraft.task.data import TaskData
    from regraft.task.metric import Measured, Metric
    from regraft.task.split import Split


def find_metric(name: str) -> Metric:
    """Look up a metric of any task type.

    Args:
        name: What a task file calls it.

    Returns:
        The metric.

    Raises:
        RecipeError: There is no such metric.
    """
    metrics = {metric.name: metric for task_type in task_types().values() for metric in task_type.metrics}
    if name not in metrics:
        raise RecipeError(f"metric {name!r}: there is no such metric. Use one of {', '.join(metrics)}.")
    return metrics[name]


def score(metric: str, labels: ArrayLike, predictions: ArrayLike) -> float:
    """Score predictions.

    Args:
        metric: A metric of the task's type, as `accuracy`.
        labels: The target of each example.
        predictions: The prediction of each example.

    Returns:
        The score.

    Raises:
        RecipeError: There is no such metric.
        DataError: There are no examples.
        MismatchError: There are not as many predictions as targets.
    """
    return float(measure(metric, labels, predictions).scores(None)[0])


def measure(metric: str, labels: ArrayLike, predictions: ArrayLike) -> Measured:
    """Look up a metric, and return what it makes of predictions.

    Args:
        metric: Its name.
        labels: The target of each example.
        predictions: The prediction of each example.

    Returns:
        Its score on any resample of the examples.

    Raises:
        RecipeError: There is no such metric.
        DataError: There are no examples.
        MismatchError: There are not as many predictions as targets.
    """
    import numpy as np

    chosen = find_metric(metric)
    targets, predicted = np.asarray(labels), np.asarray(predictions)
    require_equal_lengths(labels=len(targets), predictions=len(predicted))
    if not len(targets):
        raise DataError("there are no examples to score. Give a split that has some.")
    return chosen.measure(targets, predicted)


def chance_score(data: TaskData, split: Split) -> float:
    """Score the best guess that looks at no input, as the most frequent class of train.

    Args:
        data: The task.
        split: Its dev or test.

    Returns:
        The score by the task's metric.
    """
    guess = data.task.chance(data.train.targets, data.labels)
    return score(data.metric, split.targets, [guess] * len(split))


def flips(labels: ArrayLike, before: ArrayLike, after: ArrayLike) -> Flips:
    """Count the examples that turned from right to wrong, and the reverse; a prediction is right if it is the target.

    Args:
        labels: The target of each example.
        before: The prediction before the upgrade.
        after: The prediction after it.

    Returns:
        The counts.

    Raises:
        MismatchError: The three are not of one length.
    """
    import numpy as np

    targets, old, new = np.asarray(labels), np.asarray(before), np.asarray(after)
    require_equal_lengths(labels=len(targets), before=len(old), after=len(new))
    return count_flips((old == targets).tolist(), (new == targets).tolist())
