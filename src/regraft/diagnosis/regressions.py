"""What got worse and what got better, example by example."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Literal

from regraft.checkpoint.record import Count
from regraft.diagnosis.question import Question
from regraft.task import flips

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from regraft.diagnosis.pair import Pair
    from regraft.diagnosis.question import Asked, Lines

BINS = 10


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
class PerClass:
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
    examples: Count
    before: float
    after: float
    negative: Count
    positive: Count


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
    count: Count
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


@dataclasses.dataclass(frozen=True)
class Regressions:
    """What changed from one deployment to the other.

    Args:
        split: What was looked at.
        examples: How many there are.
        negative: How many were right and are wrong.
        positive: How many were wrong and are right.
        flips: All of these.
        classes: The same by label.
        mcnemar: The probability of so uneven flips if neither direction were likelier (exact, two-sided).
        noise: The share of negative flips between two seeds of one recipe, both ways; None if it was not measured.
        calibration: Of the `old` and the `new` deployment.
    """

    split: str
    examples: Count
    negative: Count
    positive: Count
    flips: tuple[Flip, ...]
    classes: tuple[PerClass, ...]
    mcnemar: float
    noise: float | None
    calibration: dict[str, Calibration]


def regressions(pair: Pair, others: Sequence[Sequence[int]] = ()) -> Regressions:
    """Compare two deployments example by example.

    Args:
        pair: The deployments.
        others: Predictions of further runs of the recipe the new one was made by, with other seeds.

    Returns:
        The flips with their examples, by label, McNemar's test (1947), the noise floor and the calibration.
    """
    split, names = pair.split, pair.data.labels
    labels = split.labels.tolist()
    before, after = (logits.argmax(dim=1).tolist() for logits in (pair.before, pair.after))
    sure = pair.after.softmax(dim=1).max(dim=1).values.tolist()
    found = [
        Flip(
            row=int(split.rows[i]),
            text=" ⏎ ".join(split.texts[i]),
            label=names[label],
            before=names[before[i]],
            after=names[after[i]],
            kind="negative" if before[i] == label else "positive",
            confidence=round(sure[i], 4),
        )
        for i, label in enumerate(labels)
        if (before[i] == label) != (after[i] == label)
    ]
    negative, positive = (sum(flip.kind == kind for flip in found) for kind in ("negative", "positive"))
    return Regressions(
        split=split.name,
        examples=len(labels),
        negative=negative,
        positive=positive,
        flips=tuple(found),
        classes=tuple(_per_class(name, number, labels, before, after) for number, name in enumerate(names)),
        mcnemar=mcnemar(negative, positive),
        noise=noise_floor(labels, [after, *others]),
        calibration={"old": calibration(pair.before, labels), "new": calibration(pair.after, labels)},
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


def noise_floor(labels: Sequence[int], runs: Sequence[Sequence[int]]) -> float | None:
    """Return how many examples turn from right to wrong between runs that differ in their seed only.

    Args:
        labels: The true classes.
        runs: The predictions of each run.

    Returns:
        The mean rate over all pairs, both ways; None for a single run.
    """
    rates = [
        flips(labels, one, other).negative_rate for i, one in enumerate(runs) for j, other in enumerate(runs) if i != j
    ]
    return statistics.fmean(rates) if rates else None


def calibration(logits: torch.Tensor, labels: Sequence[int]) -> Calibration:
    """Measure whether confidence means what it says.

    Source: Guo et al., 2017 (arXiv:1706.04599), ten bins of equal width.

    Args:
        logits: Examples × classes.
        labels: The true classes.

    Returns:
        The expected calibration error and its bins.
    """
    import torch

    sure, guessed = logits.softmax(dim=1).max(dim=1)
    right = guessed == torch.as_tensor(labels)
    number = (sure * BINS).ceil().long().clamp(1, BINS) - 1  # a bin holds its upper end
    bins = [
        Bin(
            low=n / BINS,
            high=(n + 1) / BINS,
            count=int(inside.sum()),
            confidence=float(sure[inside].mean()),
            accuracy=float(right[inside].float().mean()),
        )
        for n in range(BINS)
        if (inside := number == n).any()
    ]
    ece = sum(bin.count * abs(bin.confidence - bin.accuracy) for bin in bins) / len(labels)
    return Calibration(ece, tuple(bins))


def _per_class(name: str, number: int, labels: Sequence[int], before: Sequence[int], after: Sequence[int]) -> PerClass:
    mine = [i for i, label in enumerate(labels) if label == number]
    old, new = ([guesses[i] == number for i in mine] for guesses in (before, after))
    return PerClass(
        label=name,
        examples=len(mine),
        before=sum(old) / len(mine) if mine else 0.0,
        after=sum(new) / len(mine) if mine else 0.0,
        negative=sum(a and not b for a, b in zip(old, new, strict=True)),
        positive=sum(b and not a for a, b in zip(old, new, strict=True)),
    )


def _ask(asked: Asked) -> Regressions:
    return regressions(asked.pair, [asked.pair.predictions_of(path) for path in asked.options.counterparts[1:]])


def _describe(answer: Regressions, _: str) -> Lines:
    flipped = (
        f"{answer.negative} negative, {answer.positive} positive of {answer.examples:,}; McNemar p {answer.mcnemar:.2g}"
    )
    if answer.noise is not None:
        flipped += f"; {answer.noise:.1%} negative between seeds"
    errors = f"{answer.calibration['old'].ece:.3f} before, {answer.calibration['new'].ece:.3f} after"
    return [("flips", flipped), ("calibration error", errors)]


QUESTION = Question("regressions", 20, Regressions, _ask, is_required=True, describe=_describe)
