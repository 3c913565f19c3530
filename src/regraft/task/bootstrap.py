"""How sure a difference between two models' scores is: the paired bootstrap over examples."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.task.metrics import METRICS, score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    Floats = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 2000


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
    metric: str,
    labels: ArrayLike,
    predictions: ArrayLike,
    reference: ArrayLike,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return a score minus a reference's on the same examples, with its bootstrap interval.

    Source: Efron and Tibshirani, 1993, chapter 13 (percentile interval); paired as in Koehn, 2004.

    Args:
        metric: `accuracy`, `macro_f1` or `mcc`.
        labels: The true class of each example.
        predictions: The class one model predicts for each.
        reference: The class the other one predicts.
        confidence: Of each end by itself: with 0.95 one in 20 intervals lies wholly above the truth.
        seed: What the resamples are drawn from.

    Returns:
        The difference.

    Raises:
        RecipeError: The confidence is not between 0.5 and 1, or there is no such metric.
        MismatchError: There are not as many predictions as labels.
    """
    import numpy as np

    if not 0.5 <= confidence < 1:
        raise RecipeError(f"the confidence is from 0.5 to below 1, found {confidence}.")
    estimate = score(metric, labels, predictions) - score(metric, labels, reference)
    true = np.asarray(labels)
    counts = np.random.default_rng(seed).multinomial(len(true), np.full(len(true), 1 / len(true)), RESAMPLES)
    differences = resampled_scores(metric, true, predictions, counts) - resampled_scores(
        metric, true, reference, counts
    )
    low, high = np.quantile(differences, [1 - confidence, confidence])
    return Interval(estimate, float(low), float(high))


def resampled_scores(metric: str, labels: ArrayLike, predictions: ArrayLike, counts: ArrayLike) -> Floats:
    """Score predictions on many resamples at once, from the confusion matrix of each.

    Args:
        metric: As `score` takes it.
        labels: The true class of each example.
        predictions: The predicted class of each example.
        counts: How often each example is in each resample, resamples × examples.

    Returns:
        A score a resample, what `score` gives on it.

    Raises:
        RecipeError: There is no such metric.
    """
    import numpy as np

    if metric not in METRICS:
        raise RecipeError(f"metric {metric!r}: there is no such metric. Use one of {', '.join(METRICS)}.")
    true, predicted, drawn = np.asarray(labels), np.asarray(predictions), np.asarray(counts, dtype=np.float64)
    classes = int(max(true.max(), predicted.max())) + 1
    cells = np.zeros((len(true), classes * classes))
    cells[np.arange(len(true)), true * classes + predicted] = 1
    confusion = (drawn @ cells).reshape(-1, classes, classes)
    right, of_class, guessed = np.trace(confusion, axis1=1, axis2=2), confusion.sum(axis=2), confusion.sum(axis=1)
    total = of_class.sum(axis=1)
    if metric == "accuracy":
        return np.asarray(right / total)
    if metric == "macro_f1":
        hits = np.diagonal(confusion, axis1=1, axis2=2)
        present = (of_class + guessed) > 0
        f1 = np.divide(2 * hits, of_class + guessed, out=np.zeros_like(hits), where=present)
        return np.asarray(f1.sum(axis=1) / present.sum(axis=1))
    covariance = right * total - (of_class * guessed).sum(axis=1)
    spread = (total**2 - (of_class**2).sum(axis=1)) * (total**2 - (guessed**2).sum(axis=1))
    return np.asarray(np.divide(covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=spread > 0))
