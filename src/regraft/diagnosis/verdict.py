"""What should be done with old weights after an upgrade, and how sure is that?"""

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

    from regraft.diagnosis.question import QuestionContext
    from regraft.task import Interval, Metric


@dataclasses.dataclass(frozen=True)
class Reason:
    """A figure that led to a verdict.

    Args:
        name: What was measured.
        value: The figure, formatted.
        says: What the figure means here.
    """

    name: str
    value: str
    says: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The recommended action.

    Args:
        choice: `use as is`, `training-free`, `short tuning` or `scratch`.
        sure: The share of resamples of the examples that lead to the same choice; 0 if the examples are too few or of a
            single class, so that resamples cannot tell.
        predicted: The expected recovery of the old weights as they are: a share of the old deployment's score above
            guessing, plus the gain of the new base if a probe finds it better at the task.
        reasons: The figures that led to the choice.
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
    """Choose what to do with old weights, and estimate by the bootstrap over examples how sure that is.

    Args:
        metric: The task's metric.
        labels: The true class of each example.
        before: The predictions of the old deployment.
        after: The predictions of the old weights on the new base.
        floor: The score of guessing.
        guess: What guessing always predicts, in words.
        gain: The score of a linear probe on the new base minus that on the old; counts if its interval is above 0.
        weakness: The reason why the examples cannot settle the choice, if there is one.
        reasons: Further figures to list.
        seed: The seed of the resamples.

    Returns:
        The verdict.
    """
    targets = np.asarray(labels)
    base_gain = gain.estimate if gain is not None and gain.low > 0 else 0.0
    old, new = resampled_scores(metric, targets, [before, after], seed=seed)
    expected, reached = metric.merit(old) + base_gain - metric.merit(floor), metric.merit(new) - metric.merit(floor)
    shares = np.divide(reached, expected, out=np.zeros_like(new), where=expected > 0)
    choices = [choose(share, base_gain) for share in shares.tolist()]
    choice, share = choices[0], float(shares[0])  # the first is of all examples, the others are of resamples
    if expected[0] <= 0:
        advice = "The old weights are no better than guessing on their own base: there is nothing to carry over."
        choice = "scratch"
    else:
        advice = f"{100 * share:.0f} % of the score to expect above guessing is left: {ADVICE[choice]}."
    figures: tuple[Reason, ...] = (
        Reason("old deployment", f"{old[0]:.3f}", f"{metric.name} of the old weights on the old base"),
        Reason("as they are", f"{new[0]:.3f}", "the same weights on the new base, without any tuning"),
        Reason("guessing", f"{floor:.3f}", guess),
    )
    if gain is not None:
        meaning = "no gain of the new base at the task that old weights would miss"
        if base_gain:
            meaning = "the new base is better at the task, which no method without training can use"
        interval = f"[{metric.describe(gain.low)}, {metric.describe(gain.high)}]"
        figures += (
            Reason("probe of the new base", f"{metric.describe(gain.estimate)}{metric.unit} {interval}", meaning),
        )
    sure = choices[1:].count(choice) / RESAMPLES
    if weakness:
        sure = 0.0
        figures += (Reason("examples", f"{len(targets):,}", weakness),)
    return Verdict(choice, sure, share, figures + reasons, advice)


def _answer(context: QuestionContext) -> Verdict:
    pair = context.direct
    return verdict(
        pair.data.task.scoring,
        pair.split.targets,
        pair.old_predictions,
        pair.new_predictions,
        chance_score(pair.data, pair.split),
        guess=pair.data.task.guess,
        gain=context.answer_to(PROBE),
        weakness=weakness(pair.data, pair.split),
        reasons=_reasons(context),
    )


def _reasons(context: QuestionContext) -> tuple[Reason, ...]:
    reasons = []
    if (check := context.answer_to(CHECK)) is not None:
        shares = (
            ("agreement", check.agreement, "of the examples get the same prediction as before"),
            ("negative flips", check.negative_flips, "of the examples were right and are wrong"),
            ("distance of the bases", check.relative, "of the old base's norm"),
        )
        reasons += [Reason(name, f"{100 * share:.1f} %", meaning) for name, share, meaning in shares]
    if (segment := context.answer_to(CONNECTIVITY)) is not None:
        height = max(segment.barrier.values())
        meaning = "no barrier on the way: one basin" if segment.connected else "a barrier lies between the deployments"
        reasons.append(Reason("barrier of the loss", f"{height:.3f}", meaning))
    if (similarity := context.answer_to(SIMILARITY)) is not None:
        meaning = "between the attention of matched heads, in bits"
        if similarity.control is not None:
            meaning += f" ({_mean(similarity.control.divergence):.3f} for {similarity.control.name})"
        reasons.append(Reason("head divergence", f"{_mean(similarity.divergence):.3f}", meaning))
    return tuple(reasons)


def _mean(matrix: tuple[tuple[float, ...], ...]) -> float:
    values = [value for row in matrix for value in row]
    return sum(values) / len(values)


QUESTION = Question("verdict", 100, Verdict, _answer, is_required=True)
