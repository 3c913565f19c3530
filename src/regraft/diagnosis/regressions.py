"""The examples that an upgrade turns from right to wrong, and from wrong to right."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from typing import TYPE_CHECKING, Literal

from regraft.checkpoint.record import Count
from regraft.diagnosis.pair import load_counterpart, predictions
from regraft.diagnosis.question import Question
from regraft.model import Deployment
from regraft.task import count_flips
from regraft.task.types import ModelPredictions, Scatter, View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import QuestionContext, SummaryLines
    from regraft.task import Split

CONFIDENCE_DIGITS = 4  # the report shows 2; all digits would lengthen the record for nothing


@dataclasses.dataclass(frozen=True)
class Flip:
    """An example that the upgrade turned from right to wrong, or the reverse.

    Args:
        row: The example's row number in the task's file, as in `Split.row_numbers`.
        text: The example's text; the texts of a pair are joined.
        label: The target, in words.
        before: The old deployment's prediction, in words.
        after: The new deployment's prediction, in words.
        kind: `negative` if the prediction was right before the upgrade, `positive` if it is right after it.
        confidence: The probability that the new deployment gives its prediction; None if the task type
            has no such probabilities.
    """

    row: Count
    text: str
    label: str
    before: str
    after: str
    kind: Literal["negative", "positive"]
    confidence: float | None


@dataclasses.dataclass(frozen=True)
class Regressions:
    """The differences between the predictions of two deployments.

    Args:
        split: The split that was measured.
        examples: The number of examples in the split.
        negative: The number of examples that were right before the upgrade and are wrong after it; None if no
            prediction is right or wrong.
        positive: The number of examples that were wrong before the upgrade and are right after it; None likewise.
        flips: The negative and positive flips, in the order of the split.
        views: The tables, charts and marked texts on both deployments that the task type defines.
        mcnemar: The two-sided p-value of McNemar's exact test: how probable flips at least so uneven are if both
            directions are equally likely; None if no prediction is right or wrong.
        noise: The share of negative flips between seeds of the new deployment's recipe, averaged over ordered pairs of
            seeds; None if there is only one seed, or no prediction is right or wrong.
    """

    split: str
    examples: Count
    negative: Count | None
    positive: Count | None
    flips: tuple[Flip, ...]
    views: tuple[View, ...]
    mcnemar: float | None
    noise: float | None

    def __post_init__(self) -> None:
        """Refuse two charts with the same name."""
        names = [view.name for view in self.views if isinstance(view, Scatter)]
        if len(set(names)) < len(names):
            raise ValueError(f"views: expected a different name for each chart, found {', '.join(names)}")


def regressions(pair: DeploymentPair, right_by_seed: Sequence[Sequence[bool | None]] = ()) -> Regressions:
    """Compare two deployments example by example.

    Args:
        pair: The two deployments.
        right_by_seed: For each further seed of the new deployment's recipe, whether each prediction is right.

    Returns:
        The flips with their examples, McNemar's test, the noise floor, and the views of the task type.

    Raises:
        MismatchError: An output is infinite or NaN.
    """
    split = pair.split
    task = pair.data.task
    labels = pair.data.labels
    old, new = _predict(pair.old, split), _predict(pair.new, split)
    flips = [
        Flip(
            row=int(split.row_numbers[i]),
            text=task.as_text(split.inputs[i]),
            label=task.describe(target, labels),
            before=task.describe(old.predictions[i], labels),
            after=task.describe(new.predictions[i], labels),
            kind="negative" if old.right[i] else "positive",
            confidence=None if new.confidence is None else round(new.confidence[i], CONFIDENCE_DIGITS),
        )
        for i, target in enumerate(split.targets.tolist())
        if None not in (old.right[i], new.right[i]) and old.right[i] != new.right[i]
    ]
    counts = count_flips(old.right, new.right) if are_known(old.right, new.right) else None
    return Regressions(
        split=split.name,
        examples=len(split),
        negative=None if counts is None else counts.negative,
        positive=None if counts is None else counts.positive,
        flips=tuple(flips),
        views=(
            *task.comparison_views(split.targets, old, new, labels),
            *task.flip_views(split, old, new, labels),
        ),
        mcnemar=None if counts is None else mcnemar(counts.negative, counts.positive),
        noise=None if counts is None else noise_floor([new.right, *right_by_seed]),
    )


def are_known(*right: Sequence[bool | None]) -> bool:
    """Return whether each model has a prediction that is right or wrong.

    Args:
        *right: For each model, whether each prediction is right; None where that cannot be told.
    """
    return all(any(value is not None for value in values) for values in right)


def _predict(deployment: Deployment, split: Split) -> ModelPredictions:
    return ModelPredictions(predictions(deployment, split), deployment.confidence(split), deployment.right(split))


def mcnemar(negative: int, positive: int) -> float:
    """Test whether one direction of flips is more frequent than the other.

    Source: McNemar, 1947; the exact binomial form.

    Args:
        negative: The number of examples that were right before the upgrade and are wrong after it.
        positive: The number of examples that were wrong before the upgrade and are right after it.

    Returns:
        The two-sided p-value; 1 if there are no flips.
    """
    from scipy.stats import binomtest

    return float(binomtest(negative, negative + positive).pvalue) if negative + positive else 1.0


def noise_floor(right_by_seed: Sequence[Sequence[bool | None]]) -> float | None:
    """Return the share of examples that turn from right to wrong between runs that differ only in their seed.

    Args:
        right_by_seed: For each run, whether each prediction is right.

    Returns:
        The mean share over all ordered pairs of runs; None for fewer than two runs.
    """
    rates = [count_flips(first, second).negative_rate for first, second in itertools.permutations(right_by_seed, 2)]
    return statistics.fmean(rates) if rates else None


def _answer(context: QuestionContext) -> Regressions:
    pair = context.pair
    right_by_seed = []
    for path in context.options.counterparts[1:]:
        model = load_counterpart(path, pair.upgrade.new, pair.data)
        deployment = Deployment(model, pair.upgrade.new, pair.data, pair.precision, pair.progress)
        right_by_seed.append(_predict(deployment, pair.split).right)
    return regressions(pair, right_by_seed)


def _describe(regressions: Regressions, _metric: str) -> SummaryLines:
    if regressions.mcnemar is None:
        return []
    flips = (
        f"{regressions.negative} negative, {regressions.positive} positive of {regressions.examples:,}"
        f"; McNemar p {regressions.mcnemar:.2g}"
    )
    if regressions.noise is not None:
        flips += f"; {regressions.noise:.1%} negative between seeds"
    return [("flips", flips), *(view.brief for view in regressions.views if isinstance(view, Scatter))]


QUESTION = Question("regressions", order=20, record=Regressions, answer=_answer, is_required=True, describe=_describe)
