"""Which examples got worse, and which got better?"""

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


@dataclasses.dataclass(frozen=True)
class Flip:
    """An example that the upgrade turned from right to wrong, or the reverse.

    Args:
        row: The example's row in the data.
        text: The example's text.
        label: The true label.
        before: The old deployment's prediction.
        after: The new deployment's prediction.
        kind: `negative` if it was right before, `positive` if it is right now.
        confidence: The probability that the new deployment gives its prediction; None if the task type has none.
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
        examples: The number of examples in it.
        negative: The number of examples that were right and are wrong now.
        positive: The number of examples that were wrong and are right now.
        flips: All of these examples.
        views: The tables and charts that the task type shows of both deployments.
        mcnemar: The probability of so uneven flips if neither direction were likelier (exact, two-sided).
        noise: The share of negative flips between two seeds of one recipe, averaged over both directions; None if it
            was not measured.
    """

    split: str
    examples: Count
    negative: Count
    positive: Count
    flips: tuple[Flip, ...]
    views: tuple[View, ...]
    mcnemar: float
    noise: float | None

    def __post_init__(self) -> None:
        """Check that no two charts have the same name."""
        names = [view.name for view in self.views if isinstance(view, Scatter)]
        if len(set(names)) < len(names):
            raise ValueError(f"views: expected a different name for each chart, found {', '.join(names)}")


def regressions(pair: DeploymentPair, runs: Sequence[Sequence[bool]] = ()) -> Regressions:
    """Compare two deployments example by example.

    Args:
        pair: The two deployments.
        runs: Further runs of the new deployment's recipe with other seeds: whether each prediction is right.

    Returns:
        The flips with their examples, McNemar's test (1947), the noise floor, and the views of the task type.
    """
    split, task, labels = pair.split, pair.data.task, pair.data.labels
    old, new = _predict(pair.old, split), _predict(pair.new, split)
    flips = [
        Flip(
            row=int(split.row_numbers[i]),
            text=task.as_text(split.inputs[i]),
            label=task.describe(target, labels),
            before=task.describe(old.predictions[i], labels),
            after=task.describe(new.predictions[i], labels),
            kind="negative" if old.right[i] else "positive",
            confidence=None if new.confidence is None else round(new.confidence[i], 4),
        )
        for i, target in enumerate(split.targets.tolist())
        if old.right[i] != new.right[i]
    ]
    counts = count_flips(old.right, new.right)
    return Regressions(
        split=split.name,
        examples=len(split),
        negative=counts.negative,
        positive=counts.positive,
        flips=tuple(flips),
        views=task.comparison_views(split.targets, old, new, labels),
        mcnemar=mcnemar(counts.negative, counts.positive),
        noise=noise_floor([new.right, *runs]),
    )


def _predict(deployment: Deployment, split: Split) -> ModelPredictions:
    return ModelPredictions(predictions(deployment, split), deployment.confidence(split), deployment.right(split))


def mcnemar(negative: int, positive: int) -> float:
    """Test whether the flips in one direction are more than chance explains.

    Source: McNemar, 1947; the exact binomial form.

    Args:
        negative: The number of examples that were right and are wrong now.
        positive: The number of examples that were wrong and are right now.

    Returns:
        The two-sided probability of so uneven a pair; 1 if there are no flips.
    """
    from scipy.stats import binomtest

    return float(binomtest(negative, negative + positive).pvalue) if negative + positive else 1.0


def noise_floor(runs: Sequence[Sequence[bool]]) -> float | None:
    """Return the share of examples that turn from right to wrong between runs that differ only in their seed.

    Args:
        runs: Whether each prediction is right, for each run.

    Returns:
        The mean rate over all ordered pairs of runs; None for a single run.
    """
    rates = [count_flips(first, second).negative_rate for first, second in itertools.permutations(runs, 2)]
    return statistics.fmean(rates) if rates else None


def _answer(context: QuestionContext) -> Regressions:
    pair = context.pair
    runs = []
    for path in context.options.counterparts[1:]:
        model = load_counterpart(path, pair.upgrade.new, pair.data)
        deployment = Deployment(model, pair.upgrade.new, pair.data, pair.precision, pair.progress)
        runs.append(_predict(deployment, pair.split).right)
    return regressions(pair, runs)


def _describe(regressions: Regressions, _metric: str) -> SummaryLines:
    flips = (
        f"{regressions.negative} negative, {regressions.positive} positive of {regressions.examples:,}"
        f"; McNemar p {regressions.mcnemar:.2g}"
    )
    if regressions.noise is not None:
        flips += f"; {regressions.noise:.1%} negative between seeds"
    return [("flips", flips), *(view.brief for view in regressions.views if isinstance(view, Scatter))]


QUESTION = Question("regressions", 20, Regressions, _answer, is_required=True, describe=_describe)
