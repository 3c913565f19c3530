"""Scoring of predictions by the metrics of all task types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import DataError, RecipeError
from regraft.task.metric import Flips, count_flips, require_equal_lengths
from regraft.task.types.type import DEFAULT_TYPE, task_types

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from regraft.task.data import TaskData
    from regraft.task.metric import Evaluation, Metric
    from regraft.task.split import Split


def find_metric(metric: Metric | str) -> Metric:
    """Look up a metric by its name, among those of all task types.

    Args:
        metric: The name in task files, or the metric itself. If several task types have a metric of that name, the one
            of text classification is returned.

    Returns:
        The metric.

    Raises:
        RecipeError: There is no such metric.
    """
    if not isinstance(metric, str):
        return metric
    types = task_types()
    default_type = types[DEFAULT_TYPE]  # last, so that its metrics win: before there were types, names stood for them
    metrics = {
        candidate.name: candidate for task_type in (*types.values(), default_type) for candidate in task_type.metrics
    }
    if metric not in metrics:
        raise RecipeError(f"metric {metric!r}: there is no such metric. Use one of {', '.join(metrics)}.")
    return metrics[metric]


def score(metric: Metric | str, labels: ArrayLike, predictions: ArrayLike) -> float:
    """Score predictions.

    Args:
        metric: The metric, such as a task's `scoring`, or its name.
        labels: One target an example.
        predictions: One prediction an example.

    Returns:
        The score.

    Raises:
        RecipeError: There is no such metric.
        DataError: There are no examples.
        MismatchError: The number of predictions differs from that of targets.
    """
    return float(evaluate(metric, labels, predictions).scores(None)[0])


def evaluate(metric: Metric | str, labels: ArrayLike, predictions: ArrayLike) -> Evaluation:
    """Apply a metric to predictions, so that they can be scored on any resample of the examples.

    Args:
        metric: The metric or its name.
        labels: One target an example.
        predictions: One prediction an example.

    Returns:
        The evaluation.

    Raises:
        RecipeError: There is no such metric.
        DataError: There are no examples.
        MismatchError: The number of predictions differs from that of targets.
    """
    import numpy as np

    metric = find_metric(metric)
    targets, predicted = np.asarray(labels), np.asarray(predictions)
    require_equal_lengths(labels=len(targets), predictions=len(predicted))
    if not len(targets):
        raise DataError("there are no examples to score. Use a split that has some.")
    return metric.evaluate(targets, predicted)


def chance_score(data: TaskData, split: Split) -> float:
    """Score the best constant prediction, such as the most frequent class of train.

    Args:
        data: The task's data.
        split: The split to score it on.

    Returns:
        The score by the task's metric.
    """
    prediction = data.task.chance_prediction(data.train.targets, data.labels)
    return score(data.task.scoring, split.targets, [prediction] * len(split))


def flips(labels: ArrayLike, before: ArrayLike, after: ArrayLike) -> Flips:
    """Count negative and positive flips, where a prediction is right if it equals the target.

    Args:
        labels: One target an example.
        before: One prediction an example, before the upgrade.
        after: One prediction an example, after the upgrade.

    Returns:
        The counts.

    Raises:
        MismatchError: The three have different lengths.
    """
    import numpy as np

    targets, old, new = np.asarray(labels), np.asarray(before), np.asarray(after)
    require_equal_lengths(labels=len(targets), before=len(old), after=len(new))
    return count_flips((old == targets).tolist(), (new == targets).tolist())
