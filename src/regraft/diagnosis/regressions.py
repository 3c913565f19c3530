"""What got worse and what got better, example by example."""

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

    from regraft.diagnosis.pair import Pair
    from regraft.diagnosis.question import Asked, Lines


@dataclasses.dataclass(frozen=True)
class Flip:
    """An example that the upgrade turned from right to wrong, or the reverse.

    Args:
        row: Its number in the data.
        text: What it says.
        label: Its true label.
        before: What the old deployment predicts.
        after: What the new one predicts.
        kind: `negative` if it was right before, `positive` if it is right after.
        confidence: The probability the new one gives its prediction.
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
    """What changed from one deployment to the other.

    Args:
        split: What was looked at.
        examples: How many there are.
        negative: How many were right and are wrong.
        positive: How many were wrong and are right.
        flips: All of these.
        views: What the type of task shows of both deployments.
        mcnemar: The probability of so uneven flips if neither direction were likelier (exact, two-sided).
        noise: The share of negative flips between two seeds of one recipe, both ways; None if it was not measured.
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
        """Check that no two charts have one name."""
        names = [view.name for view in self.views if isinstance(view, Scatter)]
        if len(set(names)) < len(names):
            raise ValueError(f"views: expected a name of its own for each chart, found {', '.join(names)}")


def regressions(pair: Pair, runs: Sequence[Sequence[bool]] = ()) -> Regressions:
    """Compare two deployments example by example.

    Args:
        pair: The deployments.
        runs: Which predictions are right of further runs of the recipe that the new one was made by, with other seeds.

    Returns:
        The flips with their examples, McNemar's test (1947), the noise floor, and what the type of task shows.
    """
    split, task, labels = pair.split, pair.data.task, pair.data.labels
    old, new = (
        ModelPredictions(predictions(d, split), d.confidence(split), d.right(split)) for d in (pair.old, pair.new)
    )
    flips = [
        Flip(
            row=int(split.rows[i]),
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
    count = count_flips(old.right, new.right)
    return Regressions(
        split=split.name,
        examples=len(split),
        negative=count.negative,
        positive=count.positive,
        flips=tuple(flips),
        views=task.comparison_views(split.targets, old, new, labels),
        mcnemar=mcnemar(count.negative, count.positive),
        noise=noise_floor([new.right, *runs]),
    )


def mcnemar(negative: int, positive: int) -> float:
    """Test whether flips in one direction are more than chance makes them.

    Source: McNemar, 1947; the exact binomial form.

    Args:
        negative: Examples that were right and are wrong.
        positive: Examples that were wrong and are right.

    Returns:
        The two-sided probability of so uneven a pair; 1 where there are no flips.
    """
    from scipy.stats import binomtest

    return float(binomtest(negative, negative + positive).pvalue) if negative + positive else 1.0


def noise_floor(runs: Sequence[Sequence[bool]]) -> float | None:
    """Return how many examples turn from right to wrong between runs that differ in their seed only.

    Args:
        runs: Which predictions of each run are right.

    Returns:
        The mean rate over all pairs, both ways; None for a single run.
    """
    rates = [count_flips(*pair).negative_rate for pair in itertools.permutations(runs, 2)]
    return statistics.fmean(rates) if rates else None


def _ask(asked: Asked) -> Regressions:
    pair, runs = asked.pair, []
    for path in asked.options.counterparts[1:]:
        model = load_counterpart(path, pair.upgrade.new, pair.data)
        deployment = Deployment(model, pair.upgrade.new, pair.data, pair.precision, pair.progress)
        predictions(deployment, pair.split)
        runs.append(deployment.right(pair.split))
    return regressions(pair, runs)


def _describe(answer: Regressions, _: str) -> Lines:
    flipped = f"{answer.negative} negative, {answer.positive} positive of {answer.examples:,}"
    flipped += f"; McNemar p {answer.mcnemar:.2g}"
    if answer.noise is not None:
        flipped += f"; {answer.noise:.1%} negative between seeds"
    return [("flips", flipped), *(view.brief for view in answer.views if isinstance(view, Scatter))]


QUESTION = Question("regressions", 20, Regressions, _ask, is_required=True, describe=_describe)
