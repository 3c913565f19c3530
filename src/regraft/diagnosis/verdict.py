"""What to do with old weights after an upgrade, and how sure that is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np

from regraft.task.bootstrap import RESAMPLES, paired_difference, resampled_scores

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from regraft.diagnosis.pair import Pair
    from regraft.task import Interval

    Choice = Literal["use as is", "training-free", "short tuning", "scratch"]

AS_IS, TRAINING_FREE, SHORT_TUNING = 0.95, 0.80, 0.35
"""The least share of the score above guessing that must be left for each choice."""
ADVICE: dict[str, str] = {
    "use as is": "use the old weights as they are (direct)",
    "training-free": "a method without training should close most of the gap (ridge)",
    "short tuning": "a short tuning from the old weights should close the gap (init+distill, ridge+distill)",
    "scratch": "the upgrade moved far: tune with the old model as teacher (init+distill), or from scratch",
}


@dataclasses.dataclass(frozen=True)
class Reason:
    """A figure that led to a verdict.

    Args:
        name: What was measured.
        value: The figure, as it is read.
        says: What it means here.
    """

    name: str
    value: str
    says: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What to do.

    Args:
        choice: `use as is`, `training-free`, `short tuning` or `scratch`.
        sure: The share of resamples of the examples that lead to the same choice; 0 where they are too few or of a
            single class, so that resamples cannot tell.
        predicted: The recovery to expect of the old weights as they are, in % of what the old deployment has above
            guessing, or of what the new base is expected to reach where a probe finds it better at the task.
        reasons: The figures that led there.
        advice: What to do, in a sentence.
    """

    choice: Choice
    sure: float
    predicted: float
    reasons: tuple[Reason, ...]
    advice: str


def choose(share: float, gain: float = 0.0) -> Choice:
    """Choose by what is left of a score.

    Args:
        share: The new score over the expected one, both above guessing.
        gain: What a probe finds the new base better by: nothing that does no training can have it.

    Returns:
        The choice.
    """
    if share >= AS_IS:
        return "use as is"
    if share >= TRAINING_FREE and gain <= 0:
        return "training-free"
    return "short tuning" if share >= SHORT_TUNING else "scratch"


def probe_gain(pair: Pair) -> Interval:
    """Find out whether the new base is better at a task than the old one, by a linear probe on dev.

    Args:
        pair: The deployments; only their bases and the task count.

    Returns:
        The difference of the probes' scores, with its interval.
    """
    from regraft.model.probe import probe

    data = pair.data
    old, new = (probe(base, data, pair.precision) for base in (pair.upgrade.old, pair.upgrade.new))
    return paired_difference(data.metric, data.dev.labels, new, old)


def verdict(
    metric: str,
    labels: ArrayLike,
    before: ArrayLike,
    after: ArrayLike,
    floor: float,
    *,
    gain: Interval | None = None,
    weakness: str | None = None,
    reasons: tuple[Reason, ...] = (),
    seed: int = 0,
) -> Verdict:
    """Say what to do with old weights, and how sure that is by the bootstrap over examples.

    Args:
        metric: The task's.
        labels: The true class of each example.
        before: What the old deployment predicts.
        after: What the old weights on the new base do.
        floor: The score of guessing.
        gain: How much better a linear probe is on the new base than on the old; counts where its interval is above 0.
        weakness: Why the examples settle nothing, if so.
        reasons: Further figures to name.
        seed: What the resamples are drawn from.

    Returns:
        The verdict.
    """
    true = np.asarray(labels)
    added = gain.estimate if gain is not None and gain.low > 0 else 0.0
    old, new = resampled_scores(metric, true, [before, after], seed=seed)
    expected = old + added - floor
    shares = np.divide(new - floor, expected, out=np.zeros_like(new), where=expected > 0)
    choices = [choose(share, added) for share in shares.tolist()]
    chosen, share = choices[0], float(shares[0])
    if expected[0] <= 0:
        advice = "The old weights are no better than guessing on their own base: there is nothing to carry over."
        chosen = "scratch"
    else:
        advice = f"{100 * share:.0f} % of the score to expect above guessing is left: {ADVICE[chosen]}."
    found: tuple[Reason, ...] = (
        Reason("old deployment", f"{old[0]:.3f}", f"{metric} of the old weights on the old base"),
        Reason("as they are", f"{new[0]:.3f}", "the same weights on the new base, without any tuning"),
        Reason("guessing", f"{floor:.3f}", "the most frequent class"),
    )
    if gain is not None:
        says = "the new base is better at the task, which no method without training can use" if added else (
            "no gain of the new base at the task that old weights would miss"
        )  # fmt: skip
        value = f"{100 * gain.estimate:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        found += (Reason("probe of the new base", value, says),)
    sure = choices[1:].count(chosen) / RESAMPLES
    if weakness:
        sure = 0.0
        found += (Reason("examples", f"{len(true):,}", weakness),)
    return Verdict(chosen, sure, 100 * share, found + reasons, advice)
