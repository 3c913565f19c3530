"""The recommended action after an upgrade, and how sure the recommendation is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from regraft.diagnosis.check import QUESTION as CHECK
from regraft.diagnosis.choice import ADVICE, WITHOUT_LABELS, Conclusion, choose, is_within_tolerance
from regraft.diagnosis.connectivity import QUESTION as CONNECTIVITY
from regraft.diagnosis.probe import QUESTION as PROBE
from regraft.diagnosis.question import Question
from regraft.diagnosis.similarity import QUESTION as SIMILARITY
from regraft.task import weakness
from regraft.task.bootstrap import RESAMPLES, resampled_scores

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from regraft.diagnosis.question import QuestionContext
    from regraft.task import Interval, Metric


@dataclasses.dataclass(frozen=True)
class Reason:
    """A figure that led to a verdict.

    Args:
        name: The figure's name, such as `agreement`.
        value: The figure, formatted.
        says: The meaning of the figure for this upgrade.
    """

    name: str
    value: str
    says: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The recommended action.

    Args:
        choice: `use as is`, `training-free`, `short tuning` or `scratch`; `unknown` without labels.
        sure: The share of bootstrap resamples of the examples that lead to the same choice; 0 if the examples are too
            few or too uniform, such as of a single class, for resamples to tell.
        predicted: The score above chance of the adaptation on the new base, not tuned again, divided by the expected
            one: the old deployment's score above chance, plus the new base's gain if a probe finds one. 0 if the
            expected score is not above chance; None without labels.
        reasons: The figures that led to the choice.
        advice: The recommended action, in a sentence.
    """

    choice: Conclusion
    sure: float
    predicted: float | None
    reasons: tuple[Reason, ...]
    advice: str


def verdict(
    metric: Metric,
    targets: ArrayLike,
    before: ArrayLike,
    after: ArrayLike,
    chance: float,
    *,
    guess: str = "the best without looking at an input",
    floor: str = "guessing",
    gain: Interval | None = None,
    weakness: str | None = None,
    reasons: tuple[Reason, ...] = (),
    seed: int = 0,
) -> Verdict:
    """Recommend an action, and estimate by the bootstrap over examples how sure the recommendation is.

    Args:
        metric: The task's metric.
        targets: The target of each example.
        before: The prediction of the old deployment for each example.
        after: The prediction of the same adaptation on the new base for each example.
        chance: The score of the best constant prediction, or of the bare new base.
        guess: The prediction with the chance score, in words.
        floor: The name of what has the chance score.
        gain: The improvement of a linear probe's score from the old to the new base; it counts if its interval is
            above 0.
        weakness: The reason why the examples cannot settle the choice, if there is one.
        reasons: Further figures to list.
        seed: The seed of the resamples.

    Returns:
        The choice with its reasons; `scratch` if the expected score, as in `Verdict.predicted`, is not above chance.
    """
    target_array = np.asarray(targets)
    base_gain = gain.estimate if gain is not None and gain.low > 0 else 0.0
    # The first score of each array is of all examples, the others are of resamples.
    old, new = resampled_scores(metric, target_array, [before, after], seed=seed)
    expected = metric.merit(old) + base_gain - metric.merit(chance)
    reached = metric.merit(new) - metric.merit(chance)
    shares = np.divide(reached, expected, out=np.zeros_like(new), where=expected > 0)
    choices = [
        choose(share, base_gain, within_tolerance=is_within_tolerance(metric, old_score, new_score))
        for share, old_score, new_score in zip(shares.tolist(), old.tolist(), new.tolist(), strict=True)
    ]
    choice = choices[0]
    share = float(shares[0])
    if expected[0] <= 0:
        advice = f"The old weights on their own base are no better than {floor}: there is nothing to carry over."
        choice = "scratch"
    else:
        advice = f"{100 * share:.0f} % of the score to expect above {floor} is left: {ADVICE[choice]}."
    figures = [
        Reason("old deployment", metric.format_score(old[0]), f"{metric.name} of the old weights on the old base"),
        Reason("as they are", metric.format_score(new[0]), "the same weights on the new base, without any tuning"),
        Reason(floor.removeprefix("the "), metric.format_score(chance), guess),
    ]
    if gain is not None:
        figures.append(_probe_reason(metric, gain))
    sure = choices[1:].count(choice) / RESAMPLES
    if weakness:
        sure = 0.0
        figures.append(Reason("examples", f"{len(target_array):,}", weakness))
    return Verdict(choice, sure, share, (*figures, *reasons), advice)


def _probe_reason(metric: Metric, gain: Interval) -> Reason:
    meaning = "no gain of the new base at the task that old weights would miss"
    if gain.low > 0 and gain.estimate:
        meaning = "the new base is better at the task, which no method without training can use"
    interval = f"[{metric.describe(gain.low)}, {metric.describe(gain.high)}]"
    return Reason("probe of the new base", f"{metric.describe(gain.estimate)}{metric.unit} {interval}", meaning)


def _answer(context: QuestionContext) -> Verdict:
    """Judge the adaptation on the new base without further tuning, whether or not there is a counterpart."""
    pair = context.direct
    if pair.chance is None:
        return Verdict("unknown", 0.0, None, _reasons(context), WITHOUT_LABELS)
    return verdict(
        pair.data.scoring,
        pair.split.targets,
        pair.old_predictions,
        pair.new_predictions,
        pair.chance,
        guess=pair.data.task.guess,
        floor=pair.floor,
        gain=context.answer_to(PROBE),
        weakness=weakness(pair.data, pair.split),
        reasons=_reasons(context),
    )


def _reasons(context: QuestionContext) -> tuple[Reason, ...]:
    """Return the figures of earlier answers, as far as the questions were answered."""
    reasons = []
    check = context.answer_to(CHECK)
    if check is not None:
        shares = (
            ("agreement", check.agreement, "between the predictions before and after"),
            ("negative flips", check.negative_flips, "of the examples were right and are wrong"),
            ("distance of the bases", check.relative, "of the old base's norm"),
        )
        reasons += [
            Reason(name, f"{100 * share:.1f} %", meaning) for name, share, meaning in shares if share is not None
        ]
    segment = context.answer_to(CONNECTIVITY)
    if segment is not None:
        height = max(segment.barrier.values())
        meaning = "no barrier on the way: one basin" if segment.connected else "a barrier lies between the deployments"
        reasons.append(Reason("barrier of the loss", f"{height:.3f}", meaning))
    similarity = context.answer_to(SIMILARITY)
    if similarity is not None:
        meaning = "between the attention of matched heads, in bits"
        if similarity.control is not None:
            meaning += f" ({_mean(similarity.control.divergence):.3f} for {similarity.control.name})"
        reasons.append(Reason("head divergence", f"{_mean(similarity.divergence):.3f}", meaning))
    return tuple(reasons)


def _mean(matrix: tuple[tuple[float, ...], ...]) -> float:
    elements = [element for row in matrix for element in row]
    return sum(elements) / len(elements)


QUESTION = Question("verdict", order=100, record=Verdict, answer=_answer, is_required=True)
