"""Functions that score predictions by a metric of any task type."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError, RecipeError
from regraft.task.metric import Flips, count_flips, require_equal_lengths
from regraft.task.split import object_array
from regraft.task.types.answer_metrics import function_metric
from regraft.task.types.type import DEFAULT_TYPE, task_types

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import ArrayLike

    from regraft.task.data import TaskData
    from regraft.task.metric import Evaluation, Metric
    from regraft.task.split import Split


def find_metric(metric: Metric | str) -> Metric:
    """Look up a metric by its name, among those of all task types.

    Args:
        metric: The name in task files, or the metric itself. If several task types have a metric of that name, text
            classification takes precedence. A function of a user's own is loaded once it is needed.

    Raises:
        RecipeError: No task type has a metric of that name.
    """
    if not isinstance(metric, str):
        return metric
    if ":" in metric:
        return function_metric(metric)
    types = task_types()
    metrics: dict[str, Metric] = {}
    # the default type is last, so that its metrics win: records of regraft 0.1 name metrics without a type
    for task_type in (*types.values(), types[DEFAULT_TYPE]):
        metrics |= {candidate.name: candidate for candidate in task_type.metrics}
    if metric not in metrics:
        raise RecipeError(f"metric {metric!r}: there is no such metric. Use one of {', '.join(metrics)}.")
    return metrics[metric]


def score(metric: Metric | str, targets: ArrayLike, predictions: ArrayLike) -> float:
    """Score predictions by a metric.

    Args:
        metric: The metric, such as a task's `scoring`, or its name.
        targets: One target per example.
        predictions: One prediction per example.

    Raises:
        RecipeError: No task type has a metric of that name.
        DataError: There are no examples.
        MismatchError: The numbers of predictions and targets differ.
    """
    return float(evaluate(metric, targets, predictions).scores(None)[0])


def evaluate(metric: Metric | str, targets: ArrayLike, predictions: ArrayLike) -> Evaluation:
    """Apply a metric to predictions, so that they can be scored on any resample of the examples.

    Args:
        metric: The metric, such as a task's `scoring`, or its name.
        targets: One target per example.
        predictions: One prediction per example.

    Raises:
        RecipeError: No task type has a metric of that name.
        DataError: There are no examples.
        MismatchError: The numbers of predictions and targets differ.
    """
    metric = find_metric(metric)
    target_array, predicted = as_example_array(targets), as_example_array(predictions)
    require_equal_lengths(targets=len(target_array), predictions=len(predicted))
    if not len(target_array):
        raise DataError("there are no examples to score. Use a split that has some.")
    return metric.evaluate(target_array, predicted)


def chance_score(data: TaskData, split: Split) -> float:
    """Score the best prediction that is the same for every input, such as the most frequent class of train.

    Args:
        data: The task's data, whose train split determines the prediction.
        split: The split of `data` to score the prediction on.

    Returns:
        The chance score, by the task's metric.
    """
    prediction = data.task.chance_prediction(data.train.targets, data.labels)
    return score(data.scoring, split.targets, data.task.constant_predictions(prediction, split.inputs))


def agreement(data: TaskData, references: Sequence[Any], predictions: Sequence[Any]) -> float:
    """Score the predictions of a model with those of another model as targets, so that 1 is perfect agreement.

    Args:
        data: The task's data.
        references: The predictions of the other model, one per example.
        predictions: The predictions of the model.

    Returns:
        The score by the agreement metric of the task type; the share of right predictions if 1 is not its best score.
    """
    targets = data.task.as_targets(references)
    metric = data.task.bind_metric(data.task.agreement_metric or data.task.metrics[0], data.labels)
    if metric.is_bounded and metric.higher_is_better:
        return score(metric, targets, predictions)
    return statistics.fmean(map(bool, data.task.right(targets, predictions)))


def flips(targets: ArrayLike, before: ArrayLike, after: ArrayLike) -> Flips:
    """Count negative and positive flips; a prediction is right if it equals the target.

    Args:
        targets: One target per example.
        before: One prediction per example, before the upgrade.
        after: One prediction per example, after the upgrade.

    Raises:
        MismatchError: The three sequences have different lengths.
    """
    target_list, old, new = (as_example_array(values).tolist() for values in (targets, before, after))
    require_equal_lengths(targets=len(target_list), before=len(old), after=len(new))
    old_right, new_right = ([a == b for a, b in zip(values, target_list, strict=True)] for values in (old, new))
    return count_flips(old_right, new_right)


def as_example_array(values: ArrayLike) -> np.ndarray[Any, Any]:
    """Convert targets or predictions to an array with one element or row per example.

    Args:
        values: One value per example; lists of different lengths, such as the tags of sentences, become elements.
    """
    import numpy as np

    try:
        return np.asarray(values)
    except ValueError:  # lists of different lengths
        return object_array(values)  # type: ignore[arg-type]
