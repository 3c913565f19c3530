"""Tuning of a model on a task, from targets, a teacher or both."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.model import Deployment
from regraft.model.examples import check_rows
from regraft.model.outputs import forward
from regraft.tuning.anchor import Anchoring, anchored_objective, fisher_information
from regraft.tuning.distill import Distillation, compute_teacher_outputs, distillation_objective
from regraft.tuning.interpolate import Interpolation, interpolation_objective
from regraft.tuning.on_policy import OnPolicy, on_policy_batches, on_policy_objective
from regraft.tuning.order import plan_labelled_order, plan_order
from regraft.tuning.units import standardise_outputs, standardised_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.recipe import Recipe
    from regraft.task import Task, TaskData
    from regraft.task.split import Integers
    from regraft.task.types import Likelihood, Signal
    from regraft.tuning.trainer import Objective

LEARNING_RATES = {
    "full": 5e-5,  # in BERT's range, 2e-5 to 5e-5 (Devlin et al. 2019, appendix A.3)
    "lora": 5e-4,  # RoBERTa-base on MNLI in the reference implementation of Hu et al. 2021
    "bottleneck": 5e-4,  # in the range of Houlsby et al. 2019, 3e-5 to 3e-3
    "layernorm": 1e-3,  # between LoRA's and IA3's; no source
    "ia3": 5e-3,  # as in PEFT's method comparison
    "prefix": 1e-2,  # as in PEFT's example of prefix tuning
    "prompt": 1e-2,  # as for a prefix, because a prompt is a prefix of the first layer only
}
"""The default peak learning rate by kind of adaptation."""
DEFAULT_ADAPTER_LEARNING_RATE = LEARNING_RATES["lora"]
"""The default for all other kinds of adapter, most of which are variants of LoRA."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The teacher of a distillation, and the options of the distillation.

    Args:
        model: The old model.
        base: The old base, for its tokenizer.
        options: The options of the loss; an `Interpolation` also computes it at points between student and teacher,
            and `OnPolicy` on answers that the student samples.
        selects_best: Whether the best weights are chosen by their similarity to the teacher on dev. The score on dev is
            then not computed, and dev needs no labels.
        student_ids: The student's id of each token of the teacher's vocabulary, −1 for none; None if they are equal.
    """

    model: nn.Module
    base: Base
    options: Distillation | OnPolicy
    selects_best: bool = False
    student_ids: torch.Tensor | None = None


def learning_rate(kind: str, task: Task) -> float:
    """Return the default learning rate for a kind of adaptation, as in `Adaptation.kind`, on a task."""
    rates = {**LEARNING_RATES, **task.learning_rates}
    return rates.get(kind, rates.get("lora", DEFAULT_ADAPTER_LEARNING_RATE))


def tune_model(
    model: nn.Module,
    base: Base,
    data: TaskData,
    recipe: Recipe,
    work_folder: Path,
    progress: Progress,
    teacher: Teacher | None = None,
    anchor: Anchoring | None = None,
) -> list[dict[str, float]]:
    """Tune a model in place; it ends with its best weights on dev.

    Args:
        model: The model, full or with an adapter; its parameters that require gradients are tuned.
        base: The model's base, for its tokenizer.
        data: The task's data, with labels in the order of the model's outputs.
        recipe: The recipe, resolved for this data.
        work_folder: The working folder, from which an interrupted tuning resumes.
        progress: Called after each step, each batch of the teacher, and each example of the Fisher information.
        teacher: The old model to distil from, if any.
        anchor: The penalty on the distance from the starting weights, if any.

    Returns:
        The learning curve on dev, from step 0 on: entries with `step`, `seconds`, `score` and `loss` (the mean over
        rows). If the teacher selects the best weights, `score` and `loss` are the two figures of
        `Deployment.similarity_to`.

    Raises:
        CheckpointError: A token has no embedding in its base.
        DataError: A tokenizer returns no token for an input, or no example has a row to learn from.
        MismatchError: An output of the teacher is infinite or NaN.
        RecipeError: A loss or a score became infinite or NaN, or a tracker does not exist or is not installed.
    """
    from regraft.tuning.trainer import train

    likelihood = data.likelihood
    steps = recipe.num_steps
    student = Deployment(model, base, data, recipe.precision)
    examples = student.examples(data.train)
    if teacher and isinstance(teacher.options, OnPolicy):  # learns from answers of its own
        order = plan_order(examples.lengths, recipe.batch_size, steps, recipe.seed)
    else:
        order = plan_labelled_order(
            examples, data.train, recipe.batch_size, steps, recipe.seed, min(data.max_length, base.max_input_length)
        )
    objective = label_objective(likelihood)
    teacher_signal: Signal | None = None

    def make_labelled_batch(positions: Sequence[int]) -> dict[str, torch.Tensor]:
        return examples.batch(order[list(positions)].tolist())

    make_batch: Callable[[Sequence[int]], dict[str, torch.Tensor]] = make_labelled_batch
    if teacher and isinstance(teacher.options, OnPolicy):
        objective, teacher_signal = _on_policy(teacher, student, recipe, progress)
        make_batch = on_policy_batches(order)
    elif teacher:
        objective, teacher_signal = _distillation(teacher, student, order, recipe, work_folder, progress)

    def evaluate(current_model: nn.Module) -> dict[str, float]:
        student.model = current_model
        student.clear_outputs()
        if teacher_signal is None:
            loss = student.loss(data.dev)
            return {"score": loss if data.task.head_in_base else student.score(data.dev), "loss": loss}
        overlap, divergence = student.similarity_to(data.dev, teacher_signal)
        return {"score": overlap, "loss": divergence}

    with standardised_outputs(model, base, data):
        if anchor:
            fisher = None
            if anchor.weighting == "fisher":
                fisher = fisher_information(model, examples, order, likelihood, progress)
            objective = anchored_objective(objective, model, fisher, anchor, steps)
        return train(
            model,
            range(len(order)),
            make_batch,
            objective,
            evaluate,
            recipe,
            work_folder,
            progress,
            stage="tune",
            merit=data.selection.merit if teacher_signal is None else float,
            score_name="dev loss" if data.task.head_in_base and teacher_signal is None else "score",
        )


def _distillation(
    teacher: Teacher, student: Deployment, order: Integers, recipe: Recipe, work_folder: Path, progress: Progress
) -> tuple[Objective, Signal | None]:
    """Run a teacher; return the distillation objective, and the teacher's signal on dev if it selects the best weights.

    A teacher whose weights are interpolated with the student's stays on the device, in standardised units; any other
    teacher is moved to the CPU.
    """
    data = student.data
    steps = recipe.num_steps
    options = teacher.options
    assert isinstance(options, Distillation)
    old = Deployment(teacher.model, teacher.base, data, recipe.precision, progress)
    for split in (data.train, data.dev) if teacher.selects_best else (data.train,):
        check_rows(old.examples(split), student.examples(split), split)
    outputs = compute_teacher_outputs(old, data.train, order, options, work_folder, teacher.student_ids)
    dev_signal = old.signal(data.dev, teacher.student_ids) if teacher.selects_best else None
    if isinstance(options, Interpolation):
        standardise_outputs(old.model, teacher.base, data)
        objective = interpolation_objective(outputs, old.model, options, data.likelihood, steps, recipe.seed)
    else:
        old.model.to("cpu")
        objective = distillation_objective(outputs, options, data.likelihood, steps)
    return objective, dev_signal


def _on_policy(teacher: Teacher, student: Deployment, recipe: Recipe, progress: Progress) -> tuple[Objective, Signal]:
    """Return the on-policy objective, and the teacher's signal on dev, by which the best weights are chosen."""
    assert isinstance(teacher.options, OnPolicy)
    old = Deployment(teacher.model, teacher.base, student.data, recipe.precision, progress)
    check_rows(old.examples(student.data.dev), student.examples(student.data.dev), student.data.dev)
    signal = old.signal(student.data.dev, teacher.student_ids)
    old.model.eval()
    return on_policy_objective(student, old, teacher.options, teacher.student_ids, recipe.seed), signal


def label_objective(likelihood: Likelihood) -> Objective:
    """Return the mean negative log-likelihood of a batch's targets as an objective.

    Args:
        likelihood: The distribution that the outputs parametrise.

    Returns:
        A function of the model, a batch and the number of completed steps.
    """

    def objective(model: nn.Module, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return likelihood.loss(forward(model, batch).logits, batch["targets"], "mean")

    return objective
