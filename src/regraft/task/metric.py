"""Metrics, and figures derived from scores and predictions: recovery, deviation and flips."""

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

MIN_HEADROOM = 0.03
"""The least gain of a reference over chance for which recovery is computed, relative to the chance score if the metric
is not bounded: a share of less is mostly noise."""
DEFAULT_TOLERANCE = 0.01
"""How much of a score may be lost unless a user or the metric decides: one point, which few would notice."""
MIN_WITHOUT_EXPONENT = 1e-4
"""The least absolute number that is formatted without an exponent, as in Python's own format `g`."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A metric applied to the predictions of one model, ready to score resamples of the examples.

    Args:
        width: The number of values in memory per resample.
        scores: A function that returns one score per resample. Its argument is the count of each example in each
            resample, resamples × examples, or None to return the score on the original examples alone.
    """

    width: int
    scores: Callable[[Floats | None], Floats]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of predictions.

    Args:
        name: The name in task files.
        evaluate: A function that applies the metric to targets and predictions, in this order.
        higher_is_better: Whether a higher score is better.
        is_bounded: Whether 1 is the highest score, so that a hundredth means the same in every task. For other metrics,
            differences such as a tolerance are relative to a reference's gain over chance.
        tolerance: How much of a score may be lost by default, in the metric's unit: tolerances are then in this unit
            too, even if the metric is not bounded. None for `DEFAULT_TOLERANCE`.
    """

    name: str
    evaluate: Callable[[Targets, Targets], Evaluation]
    higher_is_better: bool = True
    is_bounded: bool = True
    tolerance: float | None = None

    def merit(self, score: Score) -> Score:
        """Return the score, negated if lower is better: the higher the merit, the better the score."""
        return score if self.higher_is_better else -score

    def gain(self, score: float, reference: float) -> float:
        """Return the improvement of a score over a reference; negative if the score is worse."""
        return score - reference if self.higher_is_better else reference - score

    def share_to_difference(self, share: float | None, chance: float, reference: float) -> float:
        """Convert a share, such as a tolerance, to a difference of scores.

        Args:
            share: A fraction of 1, such as 0.01; a difference if the metric has a tolerance of its own. None for the
                default tolerance.
            chance: The chance score.
            reference: The score of the model to compare with, such as the old model.

        Returns:
            The share itself if the metric is bounded or has a tolerance of its own, else the share of the distance from
            chance to reference.
        """
        if self.tolerance is not None:
            return self.tolerance if share is None else share
        share = DEFAULT_TOLERANCE if share is None else share
        return share if self.is_bounded else share * abs(reference - chance)

    def describe(self, difference: float, form: str = "+.1f") -> str:
        """Format a difference of scores, in points (hundredths) if the metric is bounded.

        Args:
            difference: The difference, in units of the score.
            form: The format specification for points; other differences take only its sign, and have three significant
                digits.

        Returns:
            The number without its unit.
        """
        if self.is_bounded:
            return format(100 * difference, form)
        return _format_significant(difference, 3, "+" if form.startswith("+") else "")

    def format_score(self, score: float, decimals: int = 3) -> str:
        """Format a score.

        Args:
            score: The score.
            decimals: The number of decimals if the metric is bounded; other scores have four significant digits.

        Returns:
            The number as in 0.912, or 12,345 if the metric is not bounded.
        """
        return f"{score:.{decimals}f}" if self.is_bounded else _format_significant(score, 4)

    def format_deviation(self, deviation: float) -> str:
        """Format a standard deviation of scores, with two significant digits if the metric is not bounded.

        Args:
            deviation: The standard deviation.
        """
        return self.format_score(deviation) if self.is_bounded else _format_significant(deviation, 2)

    def round_score(self, score: float) -> float:
        """Round a score or a difference for a record: to four decimals, or to six digits if the metric is not bounded.

        Args:
            score: The score, or a difference of scores.
        """
        return round(score, 4) if self.is_bounded else float(f"{score:.6g}")

    @property
    def unit(self) -> str:
        """The unit of the numbers that `describe` returns, with a leading space; empty if they have none."""
        return " points" if self.is_bounded else ""


def _format_significant(value: float, digits: int, sign: str = "") -> str:
    """Format a number with significant digits, all digits before the point, and an exponent if it is tiny."""
    if not math.isfinite(value) or 0 < abs(value) < MIN_WITHOUT_EXPONENT:
        return format(value, f"{sign}.{digits}g")
    integer_digits = math.floor(math.log10(abs(value))) + 1 if value else 1
    return format(value, f"{sign},.{max(0, digits - integer_digits)}f")


def sum_metric(
    name: str,
    example_statistics: Callable[[Targets, Targets], csr_array],
    score_sums: Callable[[Floats], Floats],
    *,
    higher_is_better: bool = True,
    is_bounded: bool = True,
) -> Metric:
    """Build a metric that is a function of sums over examples, so that scoring resamples takes one matrix product.

    Args:
        name: The name in task files.
        example_statistics: A function that returns k statistics of each example, examples × k, from targets and
            predictions.
        score_sums: A function that returns one score per resample from the sums of its statistics, resamples × k.
        higher_is_better: Whether a higher score is better.
        is_bounded: Whether 1 is the highest score; see `Metric`.
    """

    def evaluate(targets: Targets, predictions: Targets) -> Evaluation:
        import numpy as np

        summands = example_statistics(targets, predictions)

        def scores(counts: Floats | None) -> Floats:
            if counts is None:
                return score_sums(summands.sum(axis=0)[None])
            # this product sums over examples in the same order as `sum` above, so that the last bits agree
            return score_sums(np.ascontiguousarray((summands.T @ counts.T).T))

        return Evaluation(summands.shape[1], scores)

    return Metric(name, evaluate, higher_is_better, is_bounded)


def recovery(value: float, chance: float, reference: float, metric: Metric | None = None) -> float | None:
    """Compute recovery: the share of a reference's gain over chance that a score reaches.

    Args:
        value: The score of the model in question.
        chance: The chance score.
        reference: The score of tuning from scratch.
        metric: The metric of the scores; None for a bounded metric of which higher is better.

    Returns:
        The share, which may be below 0 or above 1; None if the reference gains nothing or less than `MIN_HEADROOM`.
    """
    gain = reference - chance
    headroom = MIN_HEADROOM
    if metric is not None:
        gain = metric.gain(reference, chance)
        headroom = MIN_HEADROOM if metric.is_bounded else MIN_HEADROOM * abs(chance)
    is_sufficient = gain >= headroom and gain > 0  # False if the reference or chance is NaN
    return (value - chance) / (reference - chance) if is_sufficient else None


@dataclasses.dataclass(frozen=True)
class Flips:
    """The numbers of examples whose prediction an upgrade turned wrong, or right.

    Args:
        negative: The number of negative flips: right before the upgrade, wrong after it.
        positive: The number of positive flips: wrong before the upgrade, right after it.
        total: The number of examples.
    """

    negative: int
    positive: int
    total: int

    @property
    def negative_rate(self) -> float:
        """The share of examples that are negative flips (Yan et al., 2021, arXiv:2011.09161)."""
        return self.negative / self.total if self.total else 0.0

    @property
    def positive_rate(self) -> float:
        """The share of examples that are positive flips."""
        return self.positive / self.total if self.total else 0.0


def deviation(scores: Sequence[float]) -> float | None:
    """Compute the standard deviation of scores over seeds.

    Args:
        scores: One score per seed.

    Returns:
        The sample standard deviation; None for fewer than two scores, NaN if a score is infinite or NaN.
    """
    if len(scores) < 2:
        return None
    if not all(math.isfinite(score) for score in scores):
        return math.nan
    return statistics.stdev(scores)


def count_flips(old_right: Sequence[bool | None], new_right: Sequence[bool | None]) -> Flips:
    """Count negative and positive flips.

    Args:
        old_right: Whether each prediction before the upgrade is right; None counts as wrong.
        new_right: Whether each prediction after the upgrade is right; None counts as wrong.

    Raises:
        MismatchError: The two sequences have different lengths.
    """
    import numpy as np

    before, after = np.asarray(old_right, dtype=bool), np.asarray(new_right, dtype=bool)
    require_equal_lengths(before=len(before), after=len(after))
    return Flips(int((before & ~after).sum()), int((~before & after).sum()), len(before))


def require_equal_lengths(**lengths: int) -> None:
    """Check that sequences over the same examples have the same length.

    Args:
        **lengths: The length of each sequence, by its name in messages.

    Raises:
        MismatchError: The lengths differ.
    """
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count:,} {name}" for name, count in lengths.items())
        raise MismatchError(f"expected one value per example, found {counts}. Use values of the same split.")
