"""Scores of predictions by the metrics of the task types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import DataError, RecipeError
from regraft.task.metric import Flips, count_flips, require_equal_lengths
from regraft.task.types.type import DEFAULT_TYPE, task_types

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from regraft.task.data import TaskData
    from regraft.task.metric import Measured, Metric
    from regraft.task.split import Split


def find_metric(metric: Metric | str) -> Metric:
    """Look up a metric of any task type by its name.

    Args:
        metric: What a task file calls it, or the metric itself. Where several types have one of that name, that of text
            classification is returned.

    Returns:
        The metric.

    Raises:
        RecipeError: There is no such metric.
    """
    if not isinstance(metric, str):
        return metric
    types = task_types()
    last = types[DEFAULT_TYPE]  # which names of metrics stood for before there were types
    metrics = {each.name: each for task_type in (*types.values(), last) for each in task_type.metrics}
    if metric not in metrics:
        raise RecipeError(f"metric {metric!r}: there is no such metric. Use one of {', '.join(metrics)}.")
    return metrics[metric]


def score(metric: Metric | str, labels: ArrayLike, predictions: ArrayLike) -> float:
    """Score predictions.

    Args:
        metric: The task's `scoring`, or the name of a metric, as `accuracy`.
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


def measure(metric: Metric | str, labels: ArrayLike, predictions: ArrayLike) -> Measured:
    """Return what a metric makes of predictions.

    Args:
        metric: The metric or its name.
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
    guess = data.task.chance_prediction(data.train.targets, data.labels)
    return score(data.task.scoring, split.targets, [guess] * len(split))


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
