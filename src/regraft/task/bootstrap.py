"""The paired bootstrap over examples: confidence intervals for the difference of two models' scores."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.errors import RecipeError
from regraft.task.score import as_example_array, evaluate, find_metric

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from regraft.task.metric import Floats, Metric

RESAMPLES = 2000
"""The number of resamples: at a confidence of 0.95, 100 of them lie beyond each end, enough for stable quantiles."""
BLOCK_ELEMENTS = 1 << 22
"""The number of example counts or sums in memory at once: 32 MB of float64, little beside a model."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Args:
        estimate: The value on the original examples, without resampling.
        low: The lower confidence limit.
        high: The upper confidence limit.
    """

    estimate: float
    low: float
    high: float


def paired_difference(
    metric: Metric | str,
    targets: ArrayLike,
    predictions: ArrayLike,
    reference: ArrayLike,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate a model's improvement over a reference on the same examples, with a bootstrap interval.

    Source: Efron and Tibshirani, 1993, chapter 13 (percentile interval); paired as in Koehn, 2004.

    Args:
        metric: The metric, such as a task's `scoring`, or its name.
        targets: One target per example.
        predictions: The model's predictions, one per example.
        reference: The reference's predictions, one per example.
        confidence: The one-sided confidence of each end: at 0.95, one interval in 20 lies entirely above the truth.
        seed: The seed of the resamples.

    Returns:
        The difference of the scores with its interval; positive if the model is better, whichever direction of the
        metric is better.

    Raises:
        RecipeError: The confidence is below 0.5 or not below 1, or no task type has the metric.
        DataError: There are no examples.
        MismatchError: The numbers of predictions and targets differ.
    """
    import numpy as np

    if not 0.5 <= confidence < 1:
        raise RecipeError(f"confidence must be at least 0.5 and below 1, found {confidence}.")
    model_scores, reference_scores = resampled_scores(metric, targets, [predictions, reference], seed=seed)
    improvements = find_metric(metric).merit(model_scores - reference_scores)
    low, high = np.quantile(improvements[1:], [1 - confidence, confidence])
    return Interval(float(improvements[0]), float(low), float(high))


def resampled_scores(
    metric: Metric | str,
    targets: ArrayLike,
    predictions: Sequence[ArrayLike],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Floats:
    """Score several models on the original examples, and on resamples that all models share.

    Args:
        metric: The metric, such as a task's `scoring`, or its name.
        targets: One target per example.
        predictions: For each model, one prediction per example.
        seed: The seed of the resamples.
        resamples: The number of resamples.

    Returns:
        The scores, models × (1 + resamples); those in the first column are on the original examples.

    Raises:
        RecipeError: No task type has a metric of that name.
        DataError: There are no examples.
        MismatchError: The numbers of predictions and targets differ.
    """
    import numpy as np

    evaluations = [evaluate(metric, targets, model_predictions) for model_predictions in predictions]
    num_examples = len(as_example_array(targets))
    width = max(num_examples, *(evaluation.width for evaluation in evaluations))
    block_size = max(1, BLOCK_ELEMENTS // width)
    generator = np.random.default_rng(seed)
    probabilities = np.full(num_examples, 1 / num_examples)
    num_columns = 1 + resamples
    scores = np.empty((len(evaluations), num_columns))
    for start in range(0, num_columns, block_size):
        stop = min(start + block_size, num_columns)
        num_original = 1 if start == 0 else 0  # the first column counts each example once
        original = np.ones((num_original, num_examples))
        resampled = generator.multinomial(num_examples, probabilities, stop - start - num_original)
        counts = np.concatenate([original, resampled])
        for model_index, evaluation in enumerate(evaluations):
            scores[model_index, start:stop] = evaluation.scores(counts)
    return scores
