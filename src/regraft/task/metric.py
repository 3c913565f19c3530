"""Scores as functions of sums over examples, and what an upgrade turned from right to wrong."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any

from regraft.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from scipy.sparse import csr_array

    Targets = np.ndarray[Any, Any]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

HEADROOM = 0.03  # where a reference is less than this above guessing, a share of its gain says nothing


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score that is a function of sums over examples, and so is known of any resample of them.

    Args:
        name: What a task file calls it.
        statistics: Returns what is summed, examples × k, of targets and predictions.
        value: Returns the scores of sums, resamples × k.
        rises: Whether more is better.
        unit: What a difference of it is counted in: `points` (hundredths) where it is bounded by 1.
        undefined: Its value where the examples leave it undefined.
    """

    name: str
    statistics: Callable[[Targets, Targets], csr_array]
    value: Callable[[Floats], Floats]
    rises: bool = True
    unit: str = "points"
    undefined: float = 0.0


def recovery(value: float, floor: float, reference: float, *, rises: bool = True) -> float | None:
    """Compute how much of a reference's gain over guessing a score reaches.

    Args:
        value: The score.
        floor: That of guessing.
        reference: That of tuning from scratch.
        rises: Whether more is better.

    Returns:
        The share, clipped neither at 0 nor at 1; None where the reference gains less than `HEADROOM`.
    """
    gain = reference - floor if rises else floor - reference
    return (value - floor) / (reference - floor) if gain >= HEADROOM else None


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
