"""Tunes a base on a task: how adaptations come to be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adaptation import Outcome, attach_lora, find_outcome, fresh_model, save_model
from regraft.checkpoint import resumable_folder
from regraft.errors import RecipeError
from regraft.methods.recycle import learning_rate, new_folder, record_outcome
from regraft.progress import Progress, silent
from regraft.task import load_data
from regraft.tuning.recipe import Recipe
from regraft.upgrade import Base

if TYPE_CHECKING:
    from regraft.task import Task, TaskData

KINDS = ("full", "lora")


def tune(
    base: Base | str | Path,
    task: Task | TaskData | str | Path,
    out: str | Path,
    *,
    kind: str = "full",
    rank: int = 8,
    recipe: Recipe | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Tune a base on a task from a fresh head.

    Args:
        base: A folder, a hub id or an opened base.
        task: A task file, a `Task` or its data.
        out: Where the outcome folder shall be. If it is there, made from the same, nothing is done.
        kind: `full`, or `lora` on every linear layer of the body.
        rank: The LoRA's rank; its alpha is twice that.
        recipe: How to train.
        progress: Told of each step.

    Returns:
        The outcome, with the weights that were best on dev.

    Raises:
        CheckpointError: A file of the base is not whole.
        DataError: The task's data cannot be used.
        OutcomeError: Something else is at `out`.
        RecipeError: An option is out of its range.
    """
    if kind not in KINDS:
        raise RecipeError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}.")
    if rank < 1:
        raise RecipeError(f"a LoRA's rank is at least 1, found {rank}.")
    recipe, out = recipe or Recipe(), Path(out)
    base = base if isinstance(base, Base) else Base.open(base)
    data = load_data(task, recipe.seed)
    inputs = {
        "method": "tune",
        "kind": kind,
        "rank": rank if kind == "lora" else None,
        "recipe": dataclasses.asdict(recipe),
        "task": data.digest(),
        "base": base.fingerprint,
    }
    if done := find_outcome(out, inputs):
        return done
    from peft import LoraConfig

    from regraft.tuning import tune_model

    resolved = recipe.resolve(len(data.train), learning_rate(kind))
    with resumable_folder(out, inputs) as work:
        staging = new_folder(work / "whole")
        model = fresh_model(base, data.labels, resolved.seed)
        if kind == "lora":
            config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
            model = attach_lora(model, base, config, resolved.seed)
        curve = tune_model(model, base, data, resolved, work, progress)
        save_model(model, base, staging / "adaptation")
        return record_outcome(
            staging, out, base, data, resolved, curve, inputs, kind=kind, method="tune", recycled_from=None,
            progress=progress,
        )  # fmt: skip
