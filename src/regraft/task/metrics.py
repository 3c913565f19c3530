"""Scores of predictions, and what an upgrade turned from right to wrong."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING

from regraft.errors import DataError, MismatchError, RecipeError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from regraft.task.data import TaskData
    from regraft.task.split import Split

METRICS = ("accuracy", "macro_f1", "mcc")


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
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric not in METRICS:
        raise RecipeError(f"metric {metric!r}: there is no such metric. Use one of {', '.join(METRICS)}.")
    true, predicted = np.asarray(labels), np.asarray(predictions)
    _require_equal_lengths(labels=len(true), predictions=len(predicted))
    if not len(true):
        raise DataError("there are no examples to score. Give a split that has some.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scikit-learn suspects regression where classes are many
        if metric == "accuracy":
            return float(accuracy_score(true, predicted))
        if metric == "macro_f1":
            return float(f1_score(true, predicted, average="macro", zero_division=0.0))
        return float(matthews_corrcoef(true, predicted))


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
    was_right, is_right = old == true, new == true
    return Flips(int((was_right & ~is_right).sum()), int((~was_right & is_right).sum()), len(true))


def _require_equal_lengths(**lengths: int) -> None:
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count:,} {name}" for name, count in lengths.items())
        raise MismatchError(f"expected one value an example, found {found}. Predict the very split the labels are of.")
