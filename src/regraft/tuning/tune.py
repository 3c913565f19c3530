"""Tuning a model on a task."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.model import Deployment
from regraft.model.outputs import forward
from regraft.tuning.anchor import Anchoring, anchored_objective, fisher_information
from regraft.tuning.distill import Distillation, compute_teacher_outputs, distillation_objective
from regraft.tuning.interpolate import Interpolation, interpolation_objective
from regraft.tuning.order import plan_order
from regraft.tuning.units import standardise_outputs, standardised_outputs

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.recipe import Recipe
    from regraft.task import TaskData
    from regraft.task.types import Likelihood
    from regraft.tuning.trainer import Objective

LEARNING_RATES = {
    "full": 5e-5,
    "lora": 5e-4,
    "bottleneck": 5e-4,
    "layernorm": 1e-3,
    "ia3": 5e-3,
    "prefix": 1e-2,
    "prompt": 1e-2,
}
ADAPTER_RATE = 5e-4  # of any other kind: a LoRA's


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Whom a student is distilled from.

    Args:
        model: The old tuned model.
        base: The base it lives on, for its tokenizer.
        options: The loss's weights, and whether the student learns at points between the two as well.
        judges: Whether the best weights are those closest to it on dev, whose labels are then not read.
    """

    model: Any
    base: Base
    options: Distillation
    judges: bool = False


def learning_rate(kind: str) -> float:
    """Return the learning rate for a kind of adaptation where the recipe names none.

    Args:
        kind: As in `Adaptation`.

    Returns:
        The rate.
    """
    return LEARNING_RATES.get(kind, ADAPTER_RATE)


def tune_model(
    model: Any,
    base: Base,
    data: TaskData,
    recipe: Recipe,
    work: Path,
    progress: Progress,
    teacher: Teacher | None = None,
    anchor: Anchoring | None = None,
) -> list[dict[str, float]]:
    """Tune a model in place and leave it with its best weights on dev.

    Args:
        model: The model, full or with an adapter; what requires gradients is tuned.
        base: The base it lives on, for its tokenizer.
        data: The task's examples; labels in the order of the model's outputs.
        recipe: Resolved for this data.
        work: A folder in which an interrupted tuning is gone on from.
        progress: Told of each step.
        teacher: The old tuned model to distil from, if any.
        anchor: How the weights are held to those the model comes with, if they are.

    Returns:
        The learning curve on dev, from step 0 on: `step`, `seconds`, `score` and `loss`, which is the mean over rows;
        or the two figures of `Deployment.closeness` if the teacher judges.
    """
    from regraft.tuning.trainer import train

    likelihood, steps, metric = data.likelihood, recipe.steps or 1, data.task.scoring
    student = Deployment(model, base, data, recipe.precision)
    examples = student.examples(data.train)
    order = plan_order(examples.lengths, recipe.batch_size, steps, recipe.seed)
    judge, objective = None, label_objective(likelihood)
    if teacher:
        old = Deployment(teacher.model, teacher.base, data, recipe.precision, progress)
        taught = compute_teacher_outputs(old, data.train, order, teacher.options, work)
        judge = old.signal(data.dev) if teacher.judges else None
        if isinstance(teacher.options, Interpolation):
            standardise_outputs(old.model, teacher.base, data)  # as the student's are, between which points are taken
            objective = interpolation_objective(taught, old.model, teacher.options, likelihood, steps, recipe.seed)
        else:
            old.model.to("cpu")
            objective = distillation_objective(taught, teacher.options, likelihood, steps)

    def figures(current: Any) -> dict[str, float]:
        student.model = current
        student.clear_outputs()
        if judge is not None:
            return dict(zip(("score", "loss"), student.similarity_to(data.dev, judge), strict=True))
        return {"score": student.score(data.dev), "loss": student.loss(data.dev)}

    with standardised_outputs(model, base, data):
        if anchor:
            weights = (
                fisher_information(model, examples, order, likelihood, progress)
                if anchor.weighting == "fisher"
                else None
            )
            objective = anchored_objective(objective, model, weights, anchor, steps)
        return train(
            model,
            range(len(order)),
            lambda places: examples.batch(order[places].tolist()),
            objective,
            figures,
            recipe,
            work,
            progress,
            stage="tune",
            merit=metric.merit if judge is None else float,
        )


def label_objective(likelihood: Likelihood) -> Objective:
    """Make the mean loss of a batch's targets.

    Args:
        likelihood: What outputs are a distribution over.

    Returns:
        A function of the model, a batch and the steps done so far.
    """

    def objective(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return likelihood.loss(forward(model, batch).logits, batch["targets"], "mean")

    return objective
