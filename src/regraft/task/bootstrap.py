"""How sure a difference between two models' scores is: the paired bootstrap over examples."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.task.score import find_metric, measure

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import ArrayLike

    from regraft.task.metric import Metric

    Floats = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 2000
BLOCK = 1 << 22  # counts of examples, or sums, in memory at once: 32 MB


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds it.

    Args:
        estimate: On the examples as they are.
        low: The interval's lower end.
        high: Its upper end.
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
    """Return by how much a score is better than a reference's on the same examples, with its bootstrap interval.

    Source: Efron and Tibshirani, 1993, chapter 13 (percentile interval); paired as in Koehn, 2004.

    Args:
        metric: The task's `scoring`, or the name of a metric, as `accuracy`.
        labels: The target of each example.
        predictions: What one model predicts for each.
        reference: What the other one predicts.
        confidence: Of each end by itself: with 0.95 one in 20 intervals lies wholly above the truth.
        seed: What the resamples are drawn from.

    Returns:
        The difference: the score minus the reference's, or the reverse where less is better.

    Raises:
        RecipeError: The confidence is not between 0.5 and 1, or there is no such metric.
        MismatchError: There are not as many predictions as labels.
    """
    import numpy as np

    if not 0.5 <= confidence < 1:
        raise RecipeError(f"the confidence is from 0.5 to below 1, found {confidence}.")
    one, other = resampled_scores(metric, labels, [predictions, reference], seed=seed)
    estimate, *differences = one - other if find_metric(metric).higher_is_better else other - one
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
    """Score several models on the examples as they are, and on resamples of them that all share.

    Args:
        metric: As `score` takes it.
        labels: The target of each example.
        predictions: The predictions of each model.
        seed: What the resamples are drawn from.
        resamples: How many are drawn.

    Returns:
        The scores, models × (1 + resamples).

    Raises:
        RecipeError: There is no such metric.
        MismatchError: There are not as many predictions as labels.
    """
    import numpy as np

    models, total = [measure(metric, labels, guesses) for guesses in predictions], len(np.asarray(labels))
    size = max(1, BLOCK // max(total, *(model.width for model in models)))
    chance, even = np.random.default_rng(seed), np.full(total, 1 / total)
    scores = np.empty((len(models), 1 + resamples))
    for start in range(0, 1 + resamples, size):
        count = min(size, 1 + resamples - start)
        drawn = chance.multinomial(total, even, count - (not start))
        counts = np.concatenate([np.ones((int(not start), total)), drawn])
        for row, model in enumerate(models):
            scores[row, start : start + count] = model.scores(counts)
    return scores
