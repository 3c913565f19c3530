"""The effect of an upgrade on an adaptation that is not tuned again."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from regraft.checkpoint.record import Count
from regraft.diagnosis.choice import ADVICE, WITHOUT_LABELS, choose, is_within_tolerance
from regraft.diagnosis.knowledge import Knowledge, describe_knowledge, measure_knowledge
from regraft.diagnosis.pair import load_pair
from regraft.diagnosis.question import MISSING, Question
from regraft.diagnosis.regressions import are_known
from regraft.errors import MismatchError
from regraft.progress import Progress, silent
from regraft.task import count_flips, find_metric
from regraft.task.types.answer_views import AnswerHealth, health

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.adaptation import Adaptation
    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import QuestionContext, SummaryLines
    from regraft.recipe import Recipe
    from regraft.task import Metric, Task, TaskData
    from regraft.upgrade import Upgrade

logger = logging.getLogger(__name__)

_LINEAGE_DESCRIPTIONS = {
    "proven": "records this old base",
    "unproven": "records no fingerprint of its base",
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
        old: The adaptation's score on the old base; None without labels.
        new: The adaptation's score on the new base; None without labels.
        floor: The chance score: the score of the best constant prediction, or of the bare new base where there is none;
            None without labels.
        retained: (new − floor) / (old − floor); None if old is no better than chance.
        agreement: The score of the predictions on the new base, with the predictions on the old base as targets, by
            the agreement metric of the task type: in classification, the share of equal predictions. It is the share of
            right predictions if 1 is not the best score of that metric. If language models generate no answers, it is
            the mean overlap of their distributions of tokens; None if their tokens differ.
        negative_flips: The share of examples that were right before the upgrade and are wrong after it; None if no
            prediction is right or wrong, as without labels.
        positive_flips: The share of examples that were wrong before the upgrade and are right after it; None likewise.
        l2: The Euclidean distance between the bodies of the two bases.
        relative: The distance `l2` divided by the norm of the old body.
        cosine: The cosine between the two bodies.
        effect: The norm of the change that the adaptation makes to the head's input on the old base, relative to the
            norm of the head's input without the adaptation.
        lineage: `proven` if the adaptation records the old base's fingerprint, `forced` if it records a different one,
            `unproven` if it records none.
        verdict: The recommended action, in one line.
        guess: The prediction with the chance score, in words.
        floor_name: The name of what has the chance score: `guessing`, or `the bare new base`.
        health: The health of the answers `before` and `after` the upgrade; empty if none were generated.
        knowledge: What the upgrade brought, if the task names in `keep` what to measure it on; None in a diagnosis,
            where it is an answer of its own.
    """

    task: str
    metric: str
    split: str
    examples: Count
    old: float | None
    new: float | None
    floor: float | None
    retained: float | None
    agreement: float | None
    negative_flips: float | None
    positive_flips: float | None
    l2: float
    relative: float
    cosine: float
    effect: float
    lineage: str
    verdict: str
    guess: str
    floor_name: str = "guessing"
    health: dict[str, AnswerHealth] = dataclasses.field(default_factory=dict)
    knowledge: Knowledge | None = None


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
        The scores, flips and distances, what the upgrade brought if the task has `keep`, and a verdict; nothing is
        written. Prompts alone have no scores and flips.

    Raises:
        CheckpointError: A weight file is incomplete or damaged, or holds infinite or NaN values.
        DataError: The task's data is malformed, or has no labels although its models write no answers, or what `keep`
            names cannot be read.
        MismatchError: The bases, the adaptation and the task do not fit together, or an output is infinite or NaN.
    """
    with load_pair(upgrade, adaptation, task, recipe=recipe, force=force, progress=progress) as pair:
        result = check_pair(pair)
        try:
            return dataclasses.replace(result, knowledge=measure_knowledge(pair))
        except MismatchError as error:  # which makes the rest no less true
            logger.warning("%s", error)
            return result


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
    predictions = {"before": pair.old_predictions, "after": pair.new_predictions}
    old, new, chance = pair.score(pair.old), pair.score(pair.new), pair.chance
    old_right, new_right = pair.old.right(split), pair.new.right(split)
    flips = count_flips(old_right, new_right) if are_known(old_right, new_right) else None
    distance = pair.upgrade.distance()
    agreement = pair.agreement(pair.new)
    retained = None
    verdict = _advice_without_labels(agreement)
    if old is not None and new is not None and chance is not None:
        beats_chance = data.scoring.gain(old, chance) > 0
        retained = (new - chance) / (old - chance) if beats_chance else None
        verdict = _advice(retained, pair.floor, data.scoring, old, new)
    return Check(
        task=data.name,
        metric=data.metric,
        split=split.name,
        examples=len(split),
        old=old,
        new=new,
        floor=chance,
        retained=retained,
        agreement=agreement,
        negative_flips=None if flips is None else flips.negative_rate,
        positive_flips=None if flips is None else flips.positive_rate,
        l2=distance.l2,
        relative=distance.relative,
        cosine=distance.cosine,
        effect=pair.effect,
        lineage=pair.lineage,
        verdict=verdict,
        guess=data.task.guess,
        floor_name=pair.floor,
        health={
            name: health(answers, split.targets.tolist())
            for name, answers in predictions.items()
            if data.task.answers_needed
        },
    )


def _advice(retained: float | None, floor: str, metric: Metric, old: float, new: float) -> str:
    """Recommend an action by the share of the score above chance that survives."""
    if retained is None:
        return f"The old weights on their own base are no better than {floor}: there is nothing to carry over."
    choice = choose(retained, within_tolerance=is_within_tolerance(metric, old, new))
    return f"{100 * retained:.0f} % of the old score above {floor} survives: {ADVICE[choice]}."


def _advice_without_labels(agreement: float | None) -> str:
    """Say what is known without labels."""
    known = "" if agreement is None else f" The answers agree by {agreement:.1%} with those of the old deployment."
    return f"{WITHOUT_LABELS}{known}"


def describe(result: Check) -> SummaryLines:
    """Summarise a check for a terminal.

    Args:
        result: The check to summarise.

    Returns:
        The label and the text of each line.
    """
    metric = find_metric(result.metric)
    distance = f"L2 {result.l2:.2f}, {result.relative:.2%} of the norm, cosine {result.cosine:.6f}"
    scores = (
        ("  old weights, old base", result.old),
        ("  old weights, new base", result.new),
        (f"  floor ({result.floor_name.removeprefix('the ')})", result.floor),
    )
    flips = f"{_percent(result.negative_flips)} / {_percent(result.positive_flips)}"
    lines = [
        (f"{result.metric} on {result.split}", f"{result.examples:,} examples of {result.task}"),
        *((name, MISSING if score is None else metric.format_score(score, 4)) for name, score in scores),
        ("agreement of the two", _percent(result.agreement)),
        ("negative / positive flips", flips),
        *((f"answers {name}", _describe_health(figures)) for name, figures in result.health.items()),
        ("distance of the bases", distance),
        ("effect on the old base", f"changes what the head reads by {result.effect:.1%}"),
        ("lineage", f"{result.lineage}: the adaptation {_LINEAGE_DESCRIPTIONS[result.lineage]}"),
    ]
    return lines if result.knowledge is None else [*lines, *describe_knowledge(result.knowledge, result.metric)]


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:.1%}"


def _describe_health(figures: AnswerHealth) -> str:
    shares = {"ended": figures.ended, "in a loop": figures.repetition, "empty": figures.empty}
    parts = [f"{name} {share:.1%}" for name, share in shares.items() if share is not None]
    if figures.length_ratio is not None:
        parts.append(f"length {figures.length_ratio:.2f} × reference")
    return ", ".join(parts)


def _answer(context: QuestionContext) -> Check:
    return check_pair(context.direct)


def _describe(result: Check, _metric: str) -> SummaryLines:
    return describe(result)


QUESTION = Question("check", order=10, record=Check, answer=_answer, is_required=True, describe=_describe)
