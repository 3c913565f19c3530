"""What is shown of predictions that are one class an example: recall by class, and calibration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.task.types.view import Column, Scatter, Series, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regraft.task.types.view import View

BINS = 10  # of equal width, as Guo et al. (2017) have them


@dataclasses.dataclass(frozen=True)
class ClassComparison:
    """One label.

    Args:
        label: Its name.
        examples: How many examples have it.
        before: The share of them that the old deployment has right.
        after: That the new one has right.
        negative: Its examples that were right and are wrong.
        positive: Its examples that were wrong and are right.
    """

    label: str
    examples: int
    before: float
    after: float
    negative: int
    positive: int


@dataclasses.dataclass(frozen=True)
class Bin:
    """The predictions of a range of confidence.

    Args:
        low: Where the range begins.
        high: Where it ends.
        count: How many predictions are in it.
        confidence: Their mean confidence.
        accuracy: The share of them that is right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Whether a classifier is as sure as it is right.

    Args:
        ece: The expected calibration error: the mean gap of confidence and accuracy over bins, weighed by their sizes.
        bins: Those that hold predictions.
    """

    ece: float
    bins: tuple[Bin, ...]


def calibration(confidence: Sequence[float], right: Sequence[bool]) -> Calibration:
    """Measure whether confidence means what it says.

    Source: Guo et al., 2017 (arXiv:1706.04599).

    Args:
        confidence: How probable each prediction is by the model itself.
        right: Which predictions are right.

    Returns:
        The expected calibration error and its bins.
    """
    import torch

    sure, is_right = torch.tensor(confidence), torch.tensor(right)
    number = (sure * BINS).ceil().long().clamp(1, BINS) - 1  # a bin holds its upper end
    bins = [
        Bin(
            low=n / BINS,
            high=(n + 1) / BINS,
            count=int(inside.sum()),
            confidence=float(sure[inside].mean()),
            accuracy=float(is_right[inside].float().mean()),
        )
        for n in range(BINS)
        if (inside := number == n).any()
    ]
    ece = sum(bin.count * abs(bin.confidence - bin.accuracy) for bin in bins) / len(right)
    return Calibration(ece, tuple(bins))


def per_class(
    targets: Sequence[Any], was_right: Sequence[bool], is_right: Sequence[bool], labels: Sequence[str]
) -> list[ClassComparison]:
    """Count by class what was right before an upgrade and is right after it.

    Args:
        targets: The class of each example.
        was_right: Whether the old deployment has it right.
        is_right: Whether the new one has it right.
        labels: The names of the classes.

    Returns:
        One entry a class.
    """
    rows = []
    for number, label in enumerate(labels):
        pairs = [pair for target, *pair in zip(targets, was_right, is_right, strict=True) if target == number]
        old, new = (sum(pair[side] for pair in pairs) / len(pairs) if pairs else 0.0 for side in (0, 1))
        negative, positive = (sum(pair == flip for pair in pairs) for flip in ([True, False], [False, True]))
        rows.append(ClassComparison(label, len(pairs), old, new, negative, positive))
    return rows


def class_views(classes: Sequence[ClassComparison], calibrations: Mapping[str, Calibration]) -> tuple[View, ...]:
    """Return what is shown of two classifiers.

    Args:
        classes: What became of each class.
        calibrations: The calibration of the `old` and the `new` deployment.

    Returns:
        A table of the classes and a chart of the calibration, where there are any.
    """
    measured = {name: curve for name, curve in calibrations.items() if curve.bins}
    views: list[View] = [_class_table(classes)] if classes else []
    return (*views, _calibration_chart(measured)) if measured else tuple(views)


def _class_table(classes: Sequence[ClassComparison]) -> Table:
    columns = (
        Column("class", "text"), Column("examples", "count"), Column("recall before", "number"),
        Column("recall after", "number"), Column("change", "change"), Column("negative flips", "count"),
        Column("positive flips", "count"),
    )  # fmt: skip
    rows = tuple(
        (row.label, row.examples, row.before, row.after, row.after - row.before, row.negative, row.positive)
        for row in classes
    )
    return Table("Recall and flips by class", columns, rows)


def _calibration_chart(calibrations: Mapping[str, Calibration]) -> Scatter:
    columns = (
        Column("model", "text"), Column("confidence from", "text"), Column("examples", "count"),
        Column("mean confidence", "number"), Column("share right", "number"),
    )  # fmt: skip
    rows = tuple(
        (name, f"{bin.low:.2f} to {bin.high:.2f}", bin.count, bin.confidence, bin.accuracy)
        for name, curve in calibrations.items()
        for bin in curve.bins
    )
    series = tuple(
        Series(
            name=f"{name} model, ECE {curve.ece:.3f}",
            x=tuple(bin.confidence for bin in curve.bins),
            y=tuple(bin.accuracy for bin in curve.bins),
            sizes=tuple(bin.count for bin in curve.bins),
        )
        for name, curve in calibrations.items()
    )
    errors = ", ".join(f"{name} model {curve.ece:.3f}" for name, curve in calibrations.items())
    whens = {"old": "before", "new": "after"}
    brief = ", ".join(f"{curve.ece:.3f} {whens.get(name, name)}" for name, curve in calibrations.items())
    return Scatter(
        name="calibration",
        title="Calibration",
        lead="On the dotted line a model is as sure as it is right; below it, too sure. Larger marks hold more "
        "examples.",
        finding=f"Expected calibration error: {errors}.",
        brief=("calibration error", brief),
        x="confidence",
        y="share that is right",
        diagonal="as sure as right",
        joined=True,
        series=series,
        table=Table("Calibration by bin", columns, rows),
    )
