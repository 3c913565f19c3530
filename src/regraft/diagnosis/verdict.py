"""What to do with old weights after an upgrade, and how sure that is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from regraft.diagnosis.check import QUESTION as CHECK
from regraft.diagnosis.choice import ADVICE, Choice, choose
from regraft.diagnosis.connectivity import QUESTION as CONNECTIVITY
from regraft.diagnosis.probe import QUESTION as PROBE
from regraft.diagnosis.question import Question
from regraft.diagnosis.similarity import QUESTION as SIMILARITY
from regraft.task import chance_score, weakness
from regraft.task.bootstrap import RESAMPLES, resampled_scores

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from regraft.diagnosis.question import Asked
    from regraft.task import Interval, Metric


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
        predicted: The recovery to expect of the old weights as they are: a share of what the old deployment has above
            guessing, or of what the new base is expected to reach where a probe finds it better at the task.
        reasons: The figures that led there.
        advice: What to do, in a sentence.
    """

    choice: Choice
    sure: float
    predicted: float
    reasons: tuple[Reason, ...]
    advice: str


def verdict(
    metric: Metric,
    labels: ArrayLike,
    before: ArrayLike,
    after: ArrayLike,
    floor: float,
    *,
    guess: str = "the best without looking at an input",
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
        guess: What guessing always predicts, in words.
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
    expected, reached = metric.merit(old) + added - metric.merit(floor), metric.merit(new) - metric.merit(floor)
    shares = np.divide(reached, expected, out=np.zeros_like(new), where=expected > 0)
    choices = [choose(share, added) for share in shares.tolist()]
    chosen, share = choices[0], float(shares[0])
    if expected[0] <= 0:
        advice = "The old weights are no better than guessing on their own base: there is nothing to carry over."
        chosen = "scratch"
    else:
        advice = f"{100 * share:.0f} % of the score to expect above guessing is left: {ADVICE[chosen]}."
    figures: tuple[Reason, ...] = (
        Reason("old deployment", f"{old[0]:.3f}", f"{metric.name} of the old weights on the old base"),
        Reason("as they are", f"{new[0]:.3f}", "the same weights on the new base, without any tuning"),
        Reason("guessing", f"{floor:.3f}", guess),
    )
    if gain is not None:
        says = "the new base is better at the task, which no method without training can use" if added else (
            "no gain of the new base at the task that old weights would miss"
        )  # fmt: skip
        value = (
            f"{metric.describe(gain.estimate)}{metric.unit} [{metric.describe(gain.low)}, {metric.describe(gain.high)}]"
        )
        figures += (Reason("probe of the new base", value, says),)
    sure = choices[1:].count(chosen) / RESAMPLES
    if weakness:
        sure = 0.0
        figures += (Reason("examples", f"{len(true):,}", weakness),)
    return Verdict(chosen, sure, share, figures + reasons, advice)


def _ask(asked: Asked) -> Verdict:
    pair = asked.direct
    return verdict(
        pair.data.task.scoring,
        pair.split.targets,
        pair.before,
        pair.after,
        chance_score(pair.data, pair.split),
        guess=pair.data.task.guess,
        gain=asked.answer(PROBE),
        weakness=weakness(pair.data, pair.split),
        reasons=_reasons(asked),
    )


def _reasons(asked: Asked) -> tuple[Reason, ...]:
    reasons = []
    if (checked := asked.answer(CHECK)) is not None:
        shares = (
            ("agreement", checked.agreement, "of the examples get the same prediction as before"),
            ("negative flips", checked.negative_flips, "of the examples were right and are wrong"),
            ("distance of the bases", checked.relative, "of the old base's norm"),
        )
        reasons += [Reason(name, f"{100 * share:.1f} %", meaning) for name, share, meaning in shares]
    if (segment := asked.answer(CONNECTIVITY)) is not None:
        height = max(segment.barrier.values())
        meaning = "no barrier on the way: one basin" if segment.connected else "a barrier lies between the deployments"
        reasons.append(Reason("barrier of the loss", f"{height:.3f}", meaning))
    if (alike := asked.answer(SIMILARITY)) is not None:
        meaning = "between the attention of matched heads, in bits"
        if alike.control is not None:
            meaning += f" ({_mean(alike.control.divergence):.3f} for {alike.control.name})"
        reasons.append(Reason("head divergence", f"{_mean(alike.divergence):.3f}", meaning))
    return tuple(reasons)


def _mean(matrix: tuple[tuple[float, ...], ...]) -> float:
    values = [value for row in matrix for value in row]
    return sum(values) / len(values)


QUESTION = Question("verdict", 100, Verdict, _ask, is_required=True)
