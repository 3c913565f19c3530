"""What the upgrade brought, and how much of it models have beside the old behaviour."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.diagnosis.question import MISSING, Question
from regraft.errors import MismatchError
from regraft.model.deployment import bare_deployment
from regraft.model.keep import keep_metric, keep_source, measure_keep
from regraft.task import find_metric

if TYPE_CHECKING:
    from regraft.base import Base
    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import QuestionContext, SummaryLines
    from regraft.model import Deployment


@dataclasses.dataclass(frozen=True)
class ModelKnowledge:
    """The two figures of a model.

    Args:
        model: The name of the model, such as `old deployment`.
        new_knowledge: The score on what the task names in `keep`, by the metric of `Knowledge`.
        old_behaviour: The score on the task, by its own metric; None without labels.
    """

    model: str
    new_knowledge: float
    old_behaviour: float | None


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """What the upgrade brought, measured on bases and deployments beside the behaviour that was tuned.

    Args:
        source: The name of the file of texts or of the task that `keep` names.
        metric: The name of the metric of `new_knowledge`: of texts, the `loss` in nats per token.
        models: The figures of the old base, the new base, the old deployment, the adaptation on the new base, and the
            counterpart, if there is one.
    """

    source: str
    metric: str
    models: tuple[ModelKnowledge, ...]


def measure_knowledge(pair: DeploymentPair, counterpart: tuple[str, Deployment] | None = None) -> Knowledge | None:
    """Measure bases and deployments on what the task names in `keep`, and on the task.

    Args:
        pair: The old deployment, and the same adaptation on the new base.
        counterpart: The name of a further deployment on the new base, and the deployment; None for none.

    Returns:
        The figures; None if the task has no `keep`.

    Raises:
        DataError: What `keep` names cannot be read, or is no text or task of text generation.
        MismatchError: `keep` names texts, whose losses per token cannot be compared between different vocabularies.
    """
    data = pair.data
    metric, source = keep_metric(data.task), keep_source(data.task)
    if metric is None or source is None:
        return None
    old, new = pair.upgrade.old, pair.upgrade.new
    if metric.name == "loss" and old.vocabulary != new.vocabulary:
        raise MismatchError(
            f"{source}: the bases have different vocabularies, so their losses per token cannot be compared. Name a "
            "task with a metric of answers in `keep`."
        )

    def measure(name: str, deployment: Deployment, behaviour: float | None) -> ModelKnowledge:
        score = measure_keep(deployment.model, deployment.base, data, pair.precision, pair.progress)
        assert score is not None  # `keep` is set
        return ModelKnowledge(name, score, behaviour)

    def measure_base(name: str, base: Base) -> ModelKnowledge:  # whose model is freed at the return
        deployment = bare_deployment(base, data, pair.precision, pair.progress)
        return measure(name, deployment, pair.chance if base is new else pair.score(deployment))

    models = [
        measure_base("old base", old),
        measure_base("new base", new),
        measure("old deployment", pair.old, pair.score(pair.old)),
        measure("as they are", pair.new, pair.score(pair.new)),
    ]
    if counterpart is not None:
        name, deployment = counterpart
        models.append(measure(name, deployment, pair.score(deployment)))
    return Knowledge(Path(source).name, metric.name, tuple(models))


def describe_knowledge(knowledge: Knowledge, metric: str) -> SummaryLines:
    """Summarise what the upgrade brought for a terminal, as a table of two columns.

    Args:
        knowledge: The figures of the models.
        metric: The name of the metric of the task.
    """
    keep, behaviour = find_metric(knowledge.metric), find_metric(metric)
    lines = [("what the upgrade brought", "new knowledge  old behaviour")]
    for model in knowledge.models:
        score = MISSING if model.old_behaviour is None else behaviour.format_score(model.old_behaviour, 4)
        lines.append((f"  {model.model}", f"{keep.format_score(model.new_knowledge, 4):>13}  {score:>13}"))
    described = ((f"{keep.name} on {knowledge.source}", keep), (f"{behaviour.name} on the task", behaviour))
    texts = [text if score.higher_is_better else f"{text} (lower is better)" for text, score in described]
    return [*lines, ("  new knowledge", texts[0]), ("  old behaviour", texts[1])]


def _answer(context: QuestionContext) -> Knowledge | None:
    _, counterpart = context.endpoint_names
    return measure_knowledge(context.direct, (counterpart, context.pair.new) if context.options.counterparts else None)


QUESTION = Question("knowledge", order=75, record=Knowledge, answer=_answer, describe=describe_knowledge)
