"""The effect of an upgrade on an adaptation that is not tuned again."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.checkpoint.record import Count
from regraft.diagnosis.choice import ADVICE, choose
from regraft.diagnosis.pair import load_pair
from regraft.diagnosis.question import Question
from regraft.progress import Progress, silent
from regraft.task import agreement, chance_score, count_flips, find_metric

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.adaptation import Adaptation
    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import QuestionContext, SummaryLines
    from regraft.recipe import Recipe
    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade

_LINEAGE_DESCRIPTIONS = {
    "proven": "records this old base",
    "unproven": "does not record its base",
    "forced": "records another base",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """The effect of an upgrade on an adaptation that is not tuned again.

    Args:
        task: The task's name.
        metric: The name of the task's metric.
        split: The split that was measured: `test`, or `dev` if the task has no test split.
        examples: The number of examples in that split.
        old: The adaptation's score on the old base.
        new: The adaptation's score on the new base.
        floor: The chance score: the score of the best constant prediction.
        retained: (new − floor) / (old − floor); None if old is no better than chance.
        agreement: The score of the predictions on the new base, with the predictions on the old base as targets, by
            the agreement metric of the task type: in classification, the share of equal predictions. It is the share of
            right predictions if 1 is not the best score of that metric.
        negative_flips: The share of examples that were right before the upgrade and are wrong after it.
        positive_flips: The share of examples that were wrong before the upgrade and are right after it.
        l2: The Euclidean distance between the bodies of the two bases.
        relative: The distance `l2` divided by the norm of the old body.
        cosine: The cosine between the two bodies.
        effect: The norm of the change that the adaptation makes to the head's input on the old base, relative to the
            norm of the head's input without the adaptation.
        lineage: `proven` if the adaptation records the old base's fingerprint, `forced` if it records a different one,
            `unproven` if it records none.
        verdict: The recommended action, in one line.
        guess: The prediction with the chance score, in words.
    """

    task: str
    metric: str
    split: str
    examples: Count
    old: float
    new: float
    floor: float
    retained: float | None
    agreement: float
    negative_flips: float
    positive_flips: float
    l2: float
    relative: float
    cosine: float
    effect: float
    lineage: str
    verdict: str
    guess: str


def check(
    upgrade: Upgrade,
    adaptation: Adaptation | str | Path,
    task: Task | TaskData | str | Path,
    *,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Check:
    """Measure an adaptation on the new base without tuning it again, and compare with the old deployment.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation tuned on the old base, or its folder.
        task: A task file, a `Task` or its data.
        recipe: The recipe whose seed and precision are used; None for the default recipe.
        force: Whether to accept an adaptation that records a different old base.
        progress: Called after each batch or tensor.

    Returns:
        The scores, flips and distances, and a verdict; nothing is written.

    Raises:
        CheckpointError: A weight file is incomplete or damaged, or holds infinite or NaN values.
        DataError: The task's data is malformed or has no labels.
        MismatchError: The bases, the adaptation and the task do not fit together, or an output is infinite or NaN.
    """
    with load_pair(upgrade, adaptation, task, recipe=recipe, force=force, progress=progress) as pair:
        return check_pair(pair)


def check_pair(pair: DeploymentPair) -> Check:
    """Compare the old deployment with the same adaptation on the new base.

    Args:
        pair: The old deployment, and the adaptation on the new base.

    Returns:
        The scores, flips and distances, and a verdict.

    Raises:
        MismatchError: An output is infinite or NaN.
    """
    data = pair.data
    split = pair.split
    old_predictions, new_predictions = pair.old_predictions, pair.new_predictions
    old = pair.old.score(split)
    new = pair.new.score(split)
    chance = chance_score(data, split)
    flips = count_flips(pair.old.right(split), pair.new.right(split))
    distance = pair.upgrade.distance()
    beats_chance = data.scoring.gain(old, chance) > 0
    retained = (new - chance) / (old - chance) if beats_chance else None
    return Check(
        task=data.name,
        metric=data.metric,
        split=split.name,
        examples=len(split),
        old=old,
        new=new,
        floor=chance,
        retained=retained,
        agreement=agreement(data, old_predictions, new_predictions),
        negative_flips=flips.negative_rate,
        positive_flips=flips.positive_rate,
        l2=distance.l2,
        relative=distance.relative,
        cosine=distance.cosine,
        effect=pair.effect,
        lineage=pair.lineage,
        verdict=_advice(retained),
        guess=data.task.guess,
    )


def _advice(retained: float | None) -> str:
    """Recommend an action by the share of the score above chance that survives."""
    if retained is None:
        return "The old weights are no better than guessing on their own base: there is nothing to carry over."
    return f"{100 * retained:.0f} % of the old score above guessing survives: {ADVICE[choose(retained)]}."


def describe(result: Check) -> SummaryLines:
    """Summarise a check for a terminal.

    Args:
        result: The check to summarise.

    Returns:
        The label and the text of each line.
    """
    metric = find_metric(result.metric)
    distance = f"L2 {result.l2:.2f}, {result.relative:.2%} of the norm, cosine {result.cosine:.6f}"
    return [
        (f"{result.metric} on {result.split}", f"{result.examples:,} examples of {result.task}"),
        ("  old weights, old base", metric.format_score(result.old, 4)),
        ("  old weights, new base", metric.format_score(result.new, 4)),
        ("  floor (guessing)", metric.format_score(result.floor, 4)),
        ("agreement of the two", f"{result.agreement:.1%}"),
        ("negative / positive flips", f"{result.negative_flips:.1%} / {result.positive_flips:.1%}"),
        ("distance of the bases", distance),
        ("effect on the old base", f"changes what the head reads by {result.effect:.1%}"),
        ("lineage", f"{result.lineage}: the adaptation {_LINEAGE_DESCRIPTIONS[result.lineage]}"),
    ]


def _answer(context: QuestionContext) -> Check:
    return check_pair(context.direct)


def _describe(result: Check, _metric: str) -> SummaryLines:
    return describe(result)


QUESTION = Question("check", order=10, record=Check, answer=_answer, is_required=True, describe=_describe)
