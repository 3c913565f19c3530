"""Tuning a classifier on a task."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.model.batches import predict
from regraft.model.device import device
from regraft.model.examples import Examples, encode
from regraft.model.outputs import forward
from regraft.task import score
from regraft.tuning.anchor import Anchored, anchored_objective, fisher
from regraft.tuning.distill import Distillation, distillation_objective, teach
from regraft.tuning.interpolate import Interpolation, interpolation_objective
from regraft.tuning.order import plan_order

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.task import TaskData
    from regraft.tuning.anchor import Objective
    from regraft.tuning.recipe import Recipe

LEARNING_RATES = {
    "full": 5e-5,
    "lora": 5e-4,
    "bottleneck": 5e-4,
    "layernorm": 1e-3,
    "ia3": 5e-3,
    "prefix": 1e-2,
    "prompt": 1e-2,
}
ADAPTER_RATE = 5e-4


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


def tune_model(
    model: Any,
    base: Base,
    data: TaskData,
    recipe: Recipe,
    work: Path,
    progress: Progress,
    teacher: Teacher | None = None,
    anchor: Anchored | None = None,
) -> list[dict[str, float]]:
    """Tune a classifier in place and leave it with its best weights on dev.

    Args:
        model: The classifier, full or with an adapter; what requires gradients is tuned.
        base: The base it lives on, for its tokenizer.
        data: The task's examples; classes in the order of the model's outputs.
        recipe: Resolved for this data.
        work: A folder in which an interrupted tuning is gone on from.
        progress: Told of each step.
        teacher: The old tuned model to distil from, if any.
        anchor: How the weights are held to those the model comes with, if they are.

    Returns:
        The learning curve on dev, from step 0 on: `step`, `seconds`, `score`, `loss`; as `evaluate` gives them, or
        `closeness` if the teacher judges.
    """
    from regraft.tuning.trainer import train

    def figures(current: Any) -> dict[str, float]:
        if told is not None:
            return closeness(predict(current, dev, recipe.precision), told)
        return evaluate(current, dev, data.metric, recipe.precision)

    examples, dev = encode(base, data.train, data.max_length), encode(base, data.dev, data.max_length)
    order = plan_order(examples.lengths, recipe.batch_size, recipe.steps or 1, recipe.seed)
    model.to(device())
    steps, told = recipe.steps or 1, None
    objective: Objective = plain_objective
    if teacher:
        teacher.model.to(device())
        shown = encode(teacher.base, data.train, data.max_length)
        taught = teach(teacher.model, shown, order, teacher.options, recipe.precision, work, progress)
        if teacher.judges:
            told = predict(teacher.model, encode(teacher.base, data.dev, data.max_length), recipe.precision, progress)
        if isinstance(teacher.options, Interpolation):
            objective = interpolation_objective(taught, teacher.model, teacher.options, steps, recipe.seed)
        else:
            teacher.model.to("cpu")
            objective = distillation_objective(taught, teacher.options, steps)
    if anchor:
        weights = fisher(model, examples, order, progress) if anchor.weighting == "fisher" else None
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
    )


def plain_objective(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
    """Return the mean cross-entropy of a batch.

    Args:
        model: A classifier.
        batch: Its inputs, `labels` and `index`.
        step: Steps done so far, which change nothing here.

    Returns:
        The loss, a scalar.
    """
    from torch.nn import functional

    labels = batch.pop("labels")
    batch.pop("index")
    return functional.cross_entropy(forward(model, batch).logits.float(), labels)


def evaluate(model: Any, examples: Examples, metric: str, precision: str) -> dict[str, float]:
    """Score a classifier.

    Args:
        model: The classifier.
        examples: What on.
        metric: One of the task's metrics.
        precision: `bf16` or `fp32`.

    Returns:
        `score` (the metric) and `loss` (mean cross-entropy).
    """
    import torch
    from torch.nn import functional

    logits = predict(model, examples, precision)
    loss = functional.cross_entropy(logits, torch.as_tensor(examples.labels))
    return {"score": score(metric, examples.labels, logits.argmax(dim=1).numpy()), "loss": float(loss)}


def closeness(logits: torch.Tensor, told: torch.Tensor) -> dict[str, float]:
    """Measure how near a classifier comes to what another one says.

    Args:
        logits: The one's, examples × classes.
        told: The other's.

    Returns:
        `score`, the mean overlap of their probabilities, 1 − their total variation distance (if both are certain, on
        how many examples they agree); and `loss`, the mean of KL(other ‖ one).
    """
    from torch.nn import functional

    log_one, log_other = logits.log_softmax(dim=1), told.log_softmax(dim=1)
    overlap = log_one.exp().minimum(log_other.exp()).sum(dim=1).mean()
    divergence = functional.kl_div(log_one, log_other, reduction="batchmean", log_target=True)
    return {"score": float(overlap), "loss": float(divergence)}
