"""The paired bootstrap over examples: confidence intervals for the difference of two models' scores."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.task.score import evaluate, find_metric

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import ArrayLike

    from regraft.task.metric import Metric

    Floats = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 2000
"""The number of resamples: the ends of a 95 % interval have 100 of them outside, enough for stable quantiles."""
BLOCK_ELEMENTS = 1 << 22
"""The number of example counts or sums in memory at once, 32 MB of float64."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Args:
        estimate: The value on the examples as they are.
        low: The lower end of the interval.
        high: The upper end of the interval.
    """

    estimate: float
    low: float
    high: float


def paired_difference(
    metric: Metric | str,
    labels: ArrayLike,
    predictions: ArrayLike,
    reference: ArrayLike,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Compute by how much a model's score is better than a reference's on the same examples, with its interval.

    Source: Efron and Tibshirani, 1993, chapter 13 (percentile interval); paired as in Koehn, 2004.

    Args:
        metric: The metric, such as a task's `scoring`, or its name.
        labels: One target an example.
        predictions: The model's predictions, one an example.
        reference: The reference's predictions, one an example.
        confidence: The one-sided confidence of each end: at 0.95, one interval in 20 lies entirely above the truth.
        seed: The seed of the resamples.

    Returns:
        The difference, which is positive if the model is better.

    Raises:
        RecipeError: The confidence is below 0.5 or not below 1, or there is no such metric.
        MismatchError: The number of predictions differs from that of labels.
    """
    import numpy as np

    if not 0.5 <= confidence < 1:
        raise RecipeError(f"confidence must be at least 0.5 and below 1, found {confidence}.")
    model_scores, reference_scores = resampled_scores(metric, labels, [predictions, reference], seed=seed)
    raw_differences = model_scores - reference_scores
    estimate, *differences = raw_differences if find_metric(metric).higher_is_better else -raw_differences
    low, high = np.quantile(differences, [1 - confidence, confidence])
    return Interval(float(estimate), float(low), float(high))


def resampled_scores(
    metric: Metric | str,
    labels: ArrayLike,
    predictions: Sequence[ArrayLike],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Floats:
    """Score several models on the examples as they are, and on resamples that all models share.

    Args:
        metric: The metric, such as a task's `scoring`, or its name.
        labels: One target an example.
        predictions: The predictions of each model, one an example.
        seed: The seed of the resamples.
        resamples: The number of resamples.

    Returns:
        The scores, models × (1 + resamples); the first column is of the examples as they are.

    Raises:
        RecipeError: There is no such metric.
        MismatchError: The number of predictions differs from that of labels.
    """
    import numpy as np

    evaluations = [evaluate(metric, labels, model_predictions) for model_predictions in predictions]
    total = len(np.asarray(labels))
    block_size = max(1, BLOCK_ELEMENTS // max(total, *(evaluation.width for evaluation in evaluations)))
    generator = np.random.default_rng(seed)
    probabilities = np.full(total, 1 / total)
    scores = np.empty((len(evaluations), 1 + resamples))
    for start in range(0, 1 + resamples, block_size):
        stop = min(start + block_size, 1 + resamples)
        unresampled = np.ones((1 if start == 0 else 0, total))  # column 0: each example once
        resampled = generator.multinomial(total, probabilities, stop - start - len(unresampled))
        counts = np.concatenate([unresampled, resampled])
        for model, evaluation in enumerate(evaluations):
            scores[model, start:stop] = evaluation.scores(counts)
    return scores
