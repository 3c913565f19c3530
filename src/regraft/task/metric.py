"""What a score is, and what an upgrade turned from right to wrong."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any, TypeVar

from regraft.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from scipy.sparse import csr_array

    Targets = np.ndarray[Any, Any]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

Score = TypeVar("Score", float, "Floats")

MIN_HEADROOM = 0.03  # where a reference is less than this above guessing, a share of its gain says nothing


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a metric makes of one model's predictions: its score on any resample of the examples.

    Args:
        width: How many numbers a resample takes in memory.
        scores: Returns the scores of counts of the examples, resamples × examples; without them, that of the examples
            as they are.
    """

    width: int
    scores: Callable[[Floats | None], Floats]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score of predictions.

    Args:
        name: What a task file calls it.
        measure: Returns what the metric makes of targets and predictions.
        rises: Whether more is better.
        is_bounded: Whether 1 bounds it, so that a hundredth means the same in every task. What is allowed of another
            one, as a tolerance, is a share of what a reference gains over guessing.
    """

    name: str
    measure: Callable[[Targets, Targets], Measured]
    higher_is_better: bool = True
    is_bounded: bool = True

    def merit(self, score: Score) -> Score:
        """Return a number that is the larger the better a score is.

        Args:
            score: The score, or an array of them.
        """
        return score if self.higher_is_better else -score

    def gain(self, score: float, reference: float) -> float:
        """Return by how much a score is better than a reference.

        Args:
            score: The score.
            reference: The other one.
        """
        return score - reference if self.higher_is_better else reference - score

    def share_to_difference(self, share: float, floor: float, reference: float) -> float:
        """Return how large a difference is that is named as a share.

        Args:
            share: The share.
            floor: The score of guessing.
            reference: The score to measure by.

        Returns:
            The share itself of a metric that 1 bounds; of another one, of the difference between the two scores.
        """
        return share if self.is_bounded else share * abs(reference - floor)

    def describe(self, difference: float, form: str = "+.1f") -> str:
        """Write a difference of scores: as a number of points, which are hundredths, where 1 bounds the metric.

        Args:
            difference: The difference.
            form: How points are formatted; what is not in points has three digits.

        Returns:
            The number without its unit.
        """
        return (
            format(100 * difference, form) if self.is_bounded else format(difference, form[: form.index(".")] + ".3g")
        )

    @property
    def unit(self) -> str:
        """What `describe` counts in, with a blank before it."""
        return " points" if self.is_bounded else ""


def sum_metric(
    name: str,
    statistics: Callable[[Targets, Targets], csr_array],
    value: Callable[[Floats], Floats],
    *,
    rises: bool = True,
    is_bounded: bool = True,
) -> Metric:
    """Make a metric that is a function of sums over examples, and so is known of any resample of them.

    Args:
        name: What a task file calls it.
        statistics: Returns what is summed, examples × k, of targets and predictions.
        value: Returns the scores of sums, resamples × k.
        rises: Whether more is better.
        is_bounded: Whether 1 bounds it.

    Returns:
        The metric.
    """

    def measure(targets: Targets, predictions: Targets) -> Measured:
        import numpy as np

        summands = statistics(targets, predictions)

        def scores(counts: Floats | None) -> Floats:
            if counts is None:
                return value(summands.sum(axis=0)[None])
            return value(np.ascontiguousarray((summands.T @ counts.T).T))  # added up in the order of the line above

        return Measured(summands.shape[1], scores)

    return Metric(name, measure, rises, is_bounded)


def recovery(value: float, floor: float, reference: float, metric: Metric | None = None) -> float | None:
    """Compute how much of a reference's gain over guessing a score reaches.

    Args:
        value: The score.
        floor: That of guessing.
        reference: That of tuning from scratch.
        metric: What they are scores by; None for one that rises and that 1 bounds.

    Returns:
        The share, clipped neither at 0 nor at 1; None where the reference gains less than `MIN_HEADROOM`, or nothing.
    """
    gain, headroom = reference - floor, MIN_HEADROOM
    if metric is not None:
        gain, headroom = metric.gain(reference, floor), metric.share_to_difference(MIN_HEADROOM, floor, reference)
    return (value - floor) / (reference - floor) if gain >= headroom and gain > 0 else None


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


def deviation(scores: Sequence[float]) -> float | None:
    """Return the standard deviation of scores over seeds.

    Args:
        scores: A score a seed.

    Returns:
        The deviation; None for fewer than two, and NaN where one is infinite or not a number.
    """
    if len(scores) < 2:
        return None
    return statistics.stdev(scores) if all(map(math.isfinite, scores)) else math.nan


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
    require_equal_lengths(before=len(before), after=len(after))
    return Flips(int((before & ~after).sum()), int((~before & after).sum()), len(before))


def require_equal_lengths(**lengths: int) -> None:
    """Refuse sequences over the same examples that differ in length.

    Args:
        **lengths: How long each is, by its name.

    Raises:
        MismatchError: They differ.
    """
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count:,} {name}" for name, count in lengths.items())
        raise MismatchError(f"expected one value an example, found {counts}. Predict the very split the labels are of.")
