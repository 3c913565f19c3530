"""Will the old weights still work on the new base?"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.checkpoint.record import Count
from regraft.diagnosis.choice import ADVICE, choose
from regraft.diagnosis.pair import load_pair
from regraft.diagnosis.question import Question
from regraft.progress import Progress, silent
from regraft.task import chance_score, count_flips, score

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.adaptation import Adaptation
    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import SummaryLines
    from regraft.recipe import Recipe
    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade

_LINEAGE = {"proven": "records this old base", "unproven": "does not record its base", "forced": "records another base"}


@dataclasses.dataclass(frozen=True)
class Check:
    """The effect of an upgrade on old weights that are not tuned again.

    Args:
        task: The task's name.
        metric: The task's metric.
        split: The split that was measured, `test` or `dev`.
        examples: The number of examples in that split.
        old: The score of the old weights on the old base.
        new: The score of the same weights on the new base.
        floor: The score of guessing without looking at an input.
        retained: (new − floor) / (old − floor); None if old is no better than the floor.
        agreement: The share of examples for which both deployments predict the same.
        negative_flips: The share of examples that were right and are wrong now.
        positive_flips: The share of examples that were wrong and are right now.
        l2: The Euclidean distance between the bodies of the two bases.
        relative: That distance divided by the norm of the old body.
        cosine: The cosine between the two bodies.
        effect: The norm of the change that the adaptation makes to the head's input on the old base, relative to the
            norm of that input.
        lineage: `proven` if the adaptation records the old base's fingerprint, `forced` if it records another one,
            `unproven` if it records none.
        verdict: What to do, in one line.
        guess: What the guess always predicts, in words.
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
    """Put old weights on the new base without tuning them, and compare with the old deployment.

    Args:
        upgrade: The old and the new base.
        adaptation: The weights tuned on the old base, or their folder.
        task: A task file, a `Task` or its data.
        recipe: The recipe whose seed and precision are used.
        force: Whether to accept an adaptation that records another old base.
        progress: The callback for each batch.

    Returns:
        The scores, flips and distances, and a verdict; nothing is written.

    Raises:
        CheckpointError: A file of weights is incomplete.
        DataError: The task's data cannot be used.
        MismatchError: The bases, the adaptation and the task do not fit together.
    """
    with load_pair(upgrade, adaptation, task, recipe=recipe, force=force, progress=progress) as pair:
        return check_pair(pair)


def check_pair(pair: DeploymentPair) -> Check:
    """Compare the old deployment with the same weights on the new base.

    Args:
        pair: The two deployments.

    Returns:
        The scores, flips and distances, and a verdict.
    """
    data, split = pair.data, pair.split
    old_predictions, new_predictions = pair.old_predictions, pair.new_predictions
    old = pair.old.score(split)
    new = pair.new.score(split)
    floor = chance_score(data, split)
    flips = count_flips(pair.old.right(split), pair.new.right(split))
    distance = pair.upgrade.distance()
    beats_guessing = data.task.scoring.gain(old, floor) > 0
    retained = (new - floor) / (old - floor) if beats_guessing else None
    return Check(
        task=data.name,
        metric=data.metric,
        split=split.name,
        examples=len(split),
        old=old,
        new=new,
        floor=floor,
        retained=retained,
        agreement=score(data.task.metrics[0], data.task.as_targets(old_predictions), new_predictions),
        negative_flips=flips.negative_rate,
        positive_flips=flips.positive_rate,
        l2=distance.l2,
        relative=distance.relative,
        cosine=distance.cosine,
        effect=pair.effect,
        lineage=pair.lineage,
        verdict=_verdict(retained),
        guess=data.task.guess,
    )


def _verdict(retained: float | None) -> str:
    if retained is None:
        return "The old weights are no better than guessing on their own base: there is nothing to carry over."
    return f"{100 * retained:.0f} % of the old score above guessing survives: {ADVICE[choose(retained)]}."


def describe(result: Check) -> SummaryLines:
    """Summarise a check for a terminal.

    Args:
        result: The check.

    Returns:
        One line for each figure.
    """
    distance = f"L2 {result.l2:.2f}, {result.relative:.2%} of the norm, cosine {result.cosine:.6f}"
    return [
        (f"{result.metric} on {result.split}", f"{result.examples:,} examples of {result.task}"),
        ("  old weights, old base", f"{result.old:.4f}"),
        ("  old weights, new base", f"{result.new:.4f}"),
        ("  floor (guessing)", f"{result.floor:.4f}"),
        ("agreement of the two", f"{result.agreement:.1%}"),
        ("negative / positive flips", f"{result.negative_flips:.1%} / {result.positive_flips:.1%}"),
        ("distance of the bases", distance),
        ("effect on the old base", f"changes what the head reads by {result.effect:.1%}"),
        ("lineage", f"{result.lineage}: the adaptation {_LINEAGE[result.lineage]}"),
    ]


QUESTION = Question(
    "check",
    10,
    Check,
    lambda context: check_pair(context.direct),
    is_required=True,
    describe=lambda result, metric: describe(result),
)
