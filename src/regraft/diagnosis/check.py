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
    from regraft.diagnosis.pair import Pair
    from regraft.diagnosis.question import Lines
    from regraft.recipe import Recipe
    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade

_LINEAGE = {"proven": "records this old base", "unproven": "does not record its base", "forced": "records another base"}


@dataclasses.dataclass(frozen=True)
class Check:
    """What the upgrade did to old weights, without any tuning.

    Args:
        task: The task's name.
        metric: Its metric.
        split: What was measured on, `test` or `dev`.
        examples: How many examples that has.
        old: The score of the old weights on the old base.
        new: Their score on the new base, as they are.
        floor: The score of guessing without looking at an input.
        retained: (new − floor) / (old − floor), None where old is no better than the floor.
        agreement: The share of examples on which both predict the same.
        negative_flips: The share that was right and is wrong.
        positive_flips: The share that was wrong and is right.
        l2: The Euclidean distance of the bases' bodies.
        relative: The same over the norm of the old body.
        cosine: The cosine between the bodies.
        effect: How much the adaptation changes what the head reads on the old base, relative to its norm.
        lineage: `proven` if the adaptation records the old base's fingerprint, `forced` if another one, else
            `unproven`.
        verdict: What to do, in one line.
        guess: What that guess always is, in words.
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
    """Put old weights on the new base as they are, and compare with the old deployment.

    Args:
        upgrade: The old and the new base.
        adaptation: What was tuned on the old base, or its folder.
        task: A task file, a `Task` or its data.
        recipe: Whose seed and precision to use.
        force: Take the old base in spite of another fingerprint.
        progress: Told of each batch.

    Returns:
        The figures and a verdict; nothing is written.

    Raises:
        CheckpointError: A file of weights is not whole.
        DataError: The task's data cannot be used.
        MismatchError: Bases, adaptation and task do not belong together.
    """
    with load_pair(upgrade, adaptation, task, recipe=recipe, force=force, progress=progress) as pair:
        return check_pair(pair)


def check_pair(pair: Pair) -> Check:
    """Compare the old deployment with the same weights on the new base.

    Args:
        pair: Both, loaded.

    Returns:
        The figures and a verdict.
    """
    data, split = pair.data, pair.split
    before, after = pair.before, pair.after
    old, new, floor = pair.old.score(split), pair.new.score(split), chance_score(data, split)
    flipped, moved = count_flips(pair.old.right(split), pair.new.right(split)), pair.upgrade.distance()
    is_better = data.task.scoring.gain(old, floor) > 0
    retained = (new - floor) / (old - floor) if is_better else None
    return Check(
        task=data.name,
        metric=data.metric,
        split=split.name,
        examples=len(split),
        old=old,
        new=new,
        floor=floor,
        retained=retained,
        agreement=score(data.task.metrics[0], data.task.as_targets(before), after),
        negative_flips=flipped.negative_rate,
        positive_flips=flipped.positive_rate,
        l2=moved.l2,
        relative=moved.relative,
        cosine=moved.cosine,
        effect=pair.effect,
        lineage=pair.lineage,
        verdict=_verdict(retained),
        guess=data.task.guess,
    )


def _verdict(retained: float | None) -> str:
    if retained is None:
        return "The old weights are no better than guessing on their own base: there is nothing to carry over."
    return f"{100 * retained:.0f} % of the old score above guessing survives: {ADVICE[choose(retained)]}."


def describe(answer: Check) -> Lines:
    """Say what a check came to.

    Args:
        answer: The check.

    Returns:
        A line a figure: its name, and the figure.
    """
    moved = f"L2 {answer.l2:.2f}, {answer.relative:.2%} of the norm, cosine {answer.cosine:.6f}"
    return [
        (f"{answer.metric} on {answer.split}", f"{answer.examples:,} examples of {answer.task}"),
        ("  old weights, old base", f"{answer.old:.4f}"),
        ("  old weights, new base", f"{answer.new:.4f}"),
        ("  floor (guessing)", f"{answer.floor:.4f}"),
        ("agreement of the two", f"{answer.agreement:.1%}"),
        ("negative / positive flips", f"{answer.negative_flips:.1%} / {answer.positive_flips:.1%}"),
        ("distance of the bases", moved),
        ("effect on the old base", f"changes what the head reads by {answer.effect:.1%}"),
        ("lineage", f"{answer.lineage}: the adaptation {_LINEAGE[answer.lineage]}"),
    ]


QUESTION = Question(
    "check",
    10,
    Check,
    ask=lambda asked: check_pair(asked.direct),
    is_required=True,
    describe=lambda answer, _: describe(answer),
)
