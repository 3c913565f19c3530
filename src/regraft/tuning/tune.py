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
    "full": 5e-5,  # in BERT's range, 2e-5 to 5e-5 (Devlin et al. 2019, appendix A.3)
    "lora": 5e-4,  # RoBERTa-base on MNLI in the reference implementation of Hu et al. 2021
    "bottleneck": 5e-4,  # in the range of Houlsby et al. 2019, 3e-5 to 3e-3
    "layernorm": 1e-3,  # between LoRA's and IA3's; no source
    "ia3": 5e-3,  # as in PEFT's method comparison
    "prefix": 1e-2,  # as in PEFT's example of prefix tuning
    "prompt": 1e-2,  # a prefix before the first layer only
}
"""The default peak learning rate by kind of adaptation."""
DEFAULT_ADAPTER_LEARNING_RATE = LEARNING_RATES["lora"]
"""The default for all other kinds of PEFT, most of which are variants of LoRA."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The teacher of a distillation.

    Args:
        model: The old model.
        base: The old base, for its tokenizer.
        options: The options of the loss; those of an `Interpolation` add points between student and teacher.
        selects_best: Whether the best weights are those most similar to the teacher on dev; labels are then not read.
    """

    model: Any
    base: Base
    options: Distillation
    selects_best: bool = False


def learning_rate(kind: str) -> float:
    """Return the default learning rate for a kind of adaptation.

    Args:
        kind: The kind, as in `Adaptation`.
    """
    return LEARNING_RATES.get(kind, DEFAULT_ADAPTER_LEARNING_RATE)


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
    """Tune a model in place; it ends with its best weights on dev.

    Args:
        model: The model, full or with an adapter; parameters that require gradients are tuned.
        base: The model's base, for its tokenizer.
        data: The task's examples, with labels in the order of the model's outputs.
        recipe: The recipe, resolved for this data.
        work: The working folder, from which an interrupted tuning resumes.
        progress: Called after each step.
        teacher: The old model to distil from, if any.
        anchor: The penalty on the distance from the starting weights, if any.

    Returns:
        The learning curve on dev, from step 0 on: entries with `step`, `seconds`, `score` and `loss` (the mean over
        rows). If the teacher selects the best weights, `score` and `loss` are the two figures of
        `Deployment.similarity_to`.
    """
    from regraft.tuning.trainer import train

    likelihood = data.likelihood
    steps = recipe.steps or 1
    metric = data.task.scoring
    student = Deployment(model, base, data, recipe.precision)
    examples = student.examples(data.train)
    order = plan_order(examples.lengths, recipe.batch_size, steps, recipe.seed)
    dev_signal = None
    objective = label_objective(likelihood)
    if teacher:
        old = Deployment(teacher.model, teacher.base, data, recipe.precision, progress)
        outputs = compute_teacher_outputs(old, data.train, order, teacher.options, work)
        dev_signal = old.signal(data.dev) if teacher.selects_best else None
        if isinstance(teacher.options, Interpolation):
            standardise_outputs(old.model, teacher.base, data)  # the student is interpolated in these units, too
            objective = interpolation_objective(outputs, old.model, teacher.options, likelihood, steps, recipe.seed)
        else:
            old.model.to("cpu")
            objective = distillation_objective(outputs, teacher.options, likelihood, steps)

    def evaluate(current: Any) -> dict[str, float]:
        student.model = current
        student.clear_outputs()
        if dev_signal is not None:
            return dict(zip(("score", "loss"), student.similarity_to(data.dev, dev_signal), strict=True))
        return {"score": student.score(data.dev), "loss": student.loss(data.dev)}

    with standardised_outputs(model, base, data):
        if anchor:
            weights = None
            if anchor.weighting == "fisher":
                weights = fisher_information(model, examples, order, likelihood, progress)
            objective = anchored_objective(objective, model, weights, anchor, steps)
        return train(
            model,
            range(len(order)),
            lambda positions: examples.batch(order[positions].tolist()),
            objective,
            evaluate,
            recipe,
            work,
            progress,
            stage="tune",
            merit=metric.merit if dev_signal is None else float,
        )


def label_objective(likelihood: Likelihood) -> Objective:
    """Return the mean negative log-likelihood of a batch's targets as an objective.

    Args:
        likelihood: The distribution that the outputs parametrise.

    Returns:
        A function of the model, a batch and the number of completed steps.
    """

    def objective(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return likelihood.loss(forward(model, batch).logits, batch["targets"], "mean")

    return objective
