"""Scores of predictions, and what an upgrade turned from right to wrong."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError, MismatchError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import ArrayLike
    from scipy.sparse import csr_array

    from regraft.task.data import TaskData
    from regraft.task.split import Split

    Classes = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

HEADROOM = 0.03  # where a reference is less than this above guessing, a share of its gain says nothing


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score that is a function of sums over examples, and so is known of any resample of them.

    Args:
        name: What a task file calls it.
        statistics: Returns what is summed, examples × k, of true and predicted classes.
        value: Returns the scores of sums, resamples × k.
    """

    name: str
    statistics: Callable[[Classes, Classes], csr_array]
    value: Callable[[Floats], Floats]


def score(metric: str, labels: ArrayLike, predictions: ArrayLike) -> float:
    """Score predictions.

    Args:
        metric: `accuracy`; `macro_f1`, the mean F1 of the classes that appear in either argument; or `mcc`, Matthews'
            correlation coefficient, which is 0 where either argument has a single class.
        labels: The true class of each example.
        predictions: The predicted class of each example.

    Returns:
        The score: from 0 to 1, for `mcc` from −1.

    Raises:
        RecipeError: There is no such metric.
        DataError: There are no examples.
        MismatchError: There are not as many predictions as labels.
    """
    chosen, statistics = summands(metric, labels, predictions)
    return float(chosen.value(statistics.sum(axis=0)[None])[0])


def summands(metric: str, labels: ArrayLike, predictions: ArrayLike) -> tuple[Metric, csr_array]:
    """Look up a metric and compute what it sums over examples.

    Args:
        metric: Its name.
        labels: The true class of each example.
        predictions: The predicted class of each example.

    Returns:
        The metric and its statistics, examples × k.

    Raises:
        RecipeError: There is no such metric.
        DataError: There are no examples.
        MismatchError: There are not as many predictions as labels.
    """
    import numpy as np

    if metric not in METRICS:
        raise RecipeError(f"metric {metric!r}: there is no such metric. Use one of {', '.join(METRICS)}.")
    true, predicted = np.asarray(labels), np.asarray(predictions)
    _require_equal_lengths(labels=len(true), predictions=len(predicted))
    if not len(true):
        raise DataError("there are no examples to score. Give a split that has some.")
    return METRICS[metric], METRICS[metric].statistics(true, predicted)


def _hits(true: Classes, predicted: Classes) -> csr_array:
    """Return 1 where a prediction is right, and 1 for each example."""
    import numpy as np
    from scipy.sparse import csr_array

    return csr_array(np.stack([true == predicted, np.ones(len(true), dtype=bool)], axis=1).astype(np.float64))


def _accuracy(sums: Floats) -> Floats:
    import numpy as np

    right, total = sums.T
    return np.asarray(right / total)


def _by_class(true: Classes, predicted: Classes) -> csr_array:
    """Return three ones an example: at its class if it is predicted, at its class, and at the predicted class."""
    import numpy as np
    from scipy.sparse import csr_array

    present, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    of_class, guessed = np.split(codes, 2)
    examples, hits = np.arange(len(true)), np.flatnonzero(true == predicted)
    rows = np.concatenate([hits, examples, examples])
    columns = np.concatenate([of_class[hits], len(present) + of_class, 2 * len(present) + guessed])
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(true), 3 * len(present)))


def _macro_f1(sums: Floats) -> Floats:
    import numpy as np

    hits, of_class, guessed = np.split(sums, 3, axis=1)
    is_present = (of_class + guessed) > 0
    f1 = np.divide(2 * hits, of_class + guessed, out=np.zeros_like(hits), where=is_present)
    return np.asarray(f1.sum(axis=1) / is_present.sum(axis=1))


def _mcc(sums: Floats) -> Floats:
    import numpy as np

    hits, of_class, guessed = np.split(sums, 3, axis=1)
    right, total = hits.sum(axis=1), of_class.sum(axis=1)
    covariance = right * total - (of_class * guessed).sum(axis=1)
    spread = (total**2 - (of_class**2).sum(axis=1)) * (total**2 - (guessed**2).sum(axis=1))
    return np.asarray(np.divide(covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=spread > 0))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _hits, _accuracy),
        Metric("macro_f1", _by_class, _macro_f1),
        Metric("mcc", _by_class, _mcc),
    )
}


def majority_score(data: TaskData, split: Split) -> float:
    """Score the guess that every example has the most frequent class of train.

    Args:
        data: The task.
        split: Its dev or test.

    Returns:
        The score by the task's metric.
    """
    import numpy as np

    return score(data.metric, split.labels, np.full(len(split), data.majority()))


def recovery(value: float, floor: float, reference: float) -> float | None:
    """Compute how much of a reference's gain over guessing a score reaches.

    Args:
        value: The score.
        floor: That of guessing.
        reference: That of tuning from scratch.

    Returns:
        In percent, neither clipped at 0 nor at 100; None where the reference gains less than `HEADROOM`.
    """
    return 100 * (value - floor) / (reference - floor) if reference - floor >= HEADROOM else None


@dataclasses.dataclass(frozen=True)
class Flips:
    """Examples that two models differ on.

    Args:
        negative: How many were right before and are wrong after.
        positive: How many were wrong before and are right after.
        total: How many examples there are.
    """

    negative: int
    positive: int
    total: int

    @property
    def negative_rate(self) -> float:
        """The share of negative flips in all examples (Yan et al., 2021, arXiv:2011.09161)."""
        return self.negative / self.total if self.total else 0.0

    @property
    def positive_rate(self) -> float:
        """The share of positive flips in all examples."""
        return self.positive / self.total if self.total else 0.0


def flips(labels: ArrayLike, before: ArrayLike, after: ArrayLike) -> Flips:
    """Count the examples that turned from right to wrong, and the reverse.

    Args:
        labels: The true class of each example.
        before: The class predicted before the upgrade.
        after: The class predicted after it.

    Returns:
        The counts.

    Raises:
        MismatchError: The three are not of one length.
    """
    import numpy as np

    true, old, new = np.asarray(labels), np.asarray(before), np.asarray(after)
    _require_equal_lengths(labels=len(true), before=len(old), after=len(new))
    return count_flips((old == true).tolist(), (new == true).tolist())


def count_flips(was_right: Sequence[bool | None], is_right: Sequence[bool | None]) -> Flips:
    """Count the examples that turned from right to wrong, and the reverse.

    Args:
        was_right: Whether the prediction of each example was right before the upgrade; None counts as wrong.
        is_right: Whether it is right after it.

    Returns:
        The counts.

    Raises:
        MismatchError: They are not of one length.
    """
    import numpy as np

    before, after = np.asarray(was_right, dtype=bool), np.asarray(is_right, dtype=bool)
    _require_equal_lengths(before=len(before), after=len(after))
    return Flips(int((before & ~after).sum()), int((~before & after).sum()), len(before))


def _require_equal_lengths(**lengths: int) -> None:
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count:,} {name}" for name, count in lengths.items())
        raise MismatchError(f"expected one value an example, found {found}. Predict the very split the labels are of.")
