"""Tables and charts that compare two classifiers: recall or F1 and flips by class, and calibration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.task.types.view import Column, Scatter, Series, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regraft.task.types.view import ModelPredictions, View

BINS = 10
"""The number of confidence bins, all of equal width; Guo et al. (2017) use 10 to 15."""


@dataclasses.dataclass(frozen=True)
class ClassComparison:
    """The results of an old and a new classifier on the examples of one class.

    Args:
        label: The name of the class.
        examples: The number of examples of the class.
        before: The recall of the old model; 0 if the class has no examples.
        after: The recall of the new model; 0 if the class has no examples.
        negative: The number of negative flips.
        positive: The number of positive flips.
    """

    label: str
    examples: int
    before: float
    after: float
    negative: int
    positive: int


@dataclasses.dataclass(frozen=True)
class Bin:
    """The predictions whose confidence is in one range.

    Args:
        low: The lower end of the range, which only the first bin includes.
        high: The upper end of the range, which it includes.
        count: The number of predictions in the bin.
        confidence: The mean confidence of these predictions.
        accuracy: The share of these predictions that are right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The agreement of a classifier's confidence with its accuracy.

    Args:
        ece: The expected calibration error: the mean absolute difference of confidence and accuracy over bins, weighted
            by bin size.
        bins: The bins that contain predictions.
    """

    ece: float
    bins: tuple[Bin, ...]


def measure_calibration(confidence: Sequence[float], right: Sequence[bool | None]) -> Calibration:
    """Measure the agreement of confidence with accuracy.

    Source: Guo et al., 2017 (arXiv:1706.04599).

    Args:
        confidence: The probability that the model gives to each of its predictions, at least one.
        right: Whether each prediction is right.
    """
    import torch

    confidences = torch.tensor(confidence)
    is_right = torch.tensor(right)
    bin_indices = (confidences * BINS).ceil().long().clamp(1, BINS) - 1  # a bin includes its upper end
    bins = []
    for index in range(BINS):
        is_inside = bin_indices == index
        if is_inside.any():
            mean_confidence = float(confidences[is_inside].mean())
            accuracy = float(is_right[is_inside].float().mean())
            bins.append(Bin(index / BINS, (index + 1) / BINS, int(is_inside.sum()), mean_confidence, accuracy))
    weighted_gaps = [group.count * abs(group.confidence - group.accuracy) for group in bins]
    ece = sum(weighted_gaps) / len(right)
    return Calibration(ece, tuple(bins))


def measure_calibrations(old: ModelPredictions, new: ModelPredictions) -> dict[str, Calibration]:
    """Measure the calibration of an old and a new model.

    Args:
        old: The old model's predictions.
        new: The new model's predictions.

    Returns:
        The calibrations of the models whose confidence is known, under the keys `old` and `new`.
    """
    return {
        name: measure_calibration(model.confidence, model.right)
        for name, model in (("old", old), ("new", new))
        if model.confidence is not None
    }


def compare_classes(
    targets: Sequence[Any], old_right: Sequence[bool | None], new_right: Sequence[bool | None], labels: Sequence[str]
) -> list[ClassComparison]:
    """Compute recall and flips by class.

    Args:
        targets: The class of each example, as an index.
        old_right: Whether the old model's prediction of each example is right.
        new_right: Whether the new model's prediction of each example is right.
        labels: The names of the classes, by their indices.

    Returns:
        One comparison per class, in the order of `labels`.
    """
    comparisons = []
    for index, label in enumerate(labels):
        right_pairs = [
            (old, new) for target, old, new in zip(targets, old_right, new_right, strict=True) if target == index
        ]
        count = len(right_pairs)
        comparisons.append(
            ClassComparison(
                label=label,
                examples=count,
                before=sum(bool(old) for old, _ in right_pairs) / count if count else 0.0,
                after=sum(bool(new) for _, new in right_pairs) / count if count else 0.0,
                negative=right_pairs.count((True, False)),
                positive=right_pairs.count((False, True)),
            )
        )
    return comparisons


def class_views(classes: Sequence[ClassComparison], calibrations: Mapping[str, Calibration]) -> tuple[View, ...]:
    """Build the views that compare two classifiers.

    Args:
        classes: The comparison of each class.
        calibrations: The calibrations of the models whose confidence is known, under the keys `old` and `new`.

    Returns:
        A table of the classes and a chart of the calibrations; a view without data is omitted.
    """
    nonempty = {name: calibration for name, calibration in calibrations.items() if calibration.bins}
    views: list[View] = []
    if classes:
        views.append(_class_table(classes))
    if nonempty:
        views.append(_calibration_chart(nonempty))
    return tuple(views)


def _class_table(classes: Sequence[ClassComparison]) -> Table:
    """Build a table with one row per class."""
    columns = (
        Column("class", "text"),
        Column("examples", "count"),
        Column("recall before", "number"),
        Column("recall after", "number"),
        Column("change", "change"),
        Column("negative flips", "count"),
        Column("positive flips", "count"),
    )
    rows = tuple(
        (
            comparison.label,
            comparison.examples,
            comparison.before,
            comparison.after,
            comparison.after - comparison.before,
            comparison.negative,
            comparison.positive,
        )
        for comparison in classes
    )
    return Table("Recall and flips by class", columns, rows)


def _calibration_chart(calibrations: Mapping[str, Calibration]) -> Scatter:
    """Build a chart of accuracy by confidence, with one series per model and one point per bin."""
    columns = (
        Column("model", "text"),
        Column("confidence from", "text"),
        Column("examples", "count"),
        Column("mean confidence", "number"),
        Column("accuracy", "number"),
    )
    rows = tuple(
        (name, f"{group.low:.2f} to {group.high:.2f}", group.count, group.confidence, group.accuracy)
        for name, calibration in calibrations.items()
        for group in calibration.bins
    )
    series = tuple(
        Series(
            name=f"{name} model, ECE {calibration.ece:.3f}",
            x=tuple(group.confidence for group in calibration.bins),
            y=tuple(group.accuracy for group in calibration.bins),
            sizes=tuple(group.count for group in calibration.bins),
        )
        for name, calibration in calibrations.items()
    )
    ece_by_model = ", ".join(f"{name} model {calibration.ece:.3f}" for name, calibration in calibrations.items())
    time_by_name = {"old": "before", "new": "after"}
    brief = ", ".join(
        f"{calibration.ece:.3f} {time_by_name.get(name, name)}" for name, calibration in calibrations.items()
    )
    return Scatter(
        name="calibration",
        title="Calibration",
        lead="On the dotted line, confidence equals accuracy; below it, a model is overconfident. Larger marks stand "
        "for more examples.",
        finding=f"Expected calibration error: {ece_by_model}.",
        brief=("calibration error", brief),
        x="confidence",
        y="accuracy",
        diagonal="perfect calibration",
        joined=True,
        series=series,
        table=Table("Calibration by bin", columns, rows),
    )
