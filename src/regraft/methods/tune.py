"""Tunes a base on a task: how adaptations come to be."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adaptation import (
    Outcome,
    attach,
    find_outcome,
    fresh_model,
    initial_factors,
    kind_of_config,
    new_config,
    save_model,
    settings,
)
from regraft.base import Base
from regraft.checkpoint import resumable_folder
from regraft.methods.recycle import new_folder, record_outcome
from regraft.progress import Progress, silent
from regraft.recipe import best_step
from regraft.task import load_data, weakness
from regraft.tuning import Recipe, learning_rate, restore_output_units, tune_model

if TYPE_CHECKING:
    from regraft.adaptation.kinds import Config
    from regraft.task import Task, TaskData

logger = logging.getLogger(__name__)


def tune(
    base: Base | str | Path,
    task: Task | TaskData | str | Path,
    out: str | Path,
    *,
    kind: str | Config = "full",
    rank: int = 8,
    inner_size: int = 24,
    virtual_tokens: int = 20,
    recipe: Recipe | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Tune a base on a task from a fresh head.

    Args:
        base: A folder, a hub id or an opened base.
        task: A task file, a `Task` or its data.
        out: Where the outcome folder is written. If it is there, made from the same, nothing is done.
        kind: `full`; `lora`, `rslora`, `dora`, `pissa` or `olora` on every linear layer of the body; `ia3`, `prefix`,
            `prompt`, `layernorm`; `bottleneck` or `pfeiffer`; or a config of PEFT's or a `BottleneckConfig`.
        rank: A LoRA's rank; its alpha is twice that.
        inner_size: The width of bottleneck adapters.
        virtual_tokens: How many a prefix or a prompt has.
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
    recipe, out = recipe or Recipe(), Path(out)
    base = base if isinstance(base, Base) else Base.open(base)
    sizes = {"rank": rank, "inner_size": inner_size, "virtual_tokens": virtual_tokens}
    data = load_data(task, recipe.seed)
    config = new_config(kind, base, data.head, **sizes) if isinstance(kind, str) else kind
    data.require_labels("tuning")
    data = data.with_virtual_tokens(getattr(config, "num_virtual_tokens", None) or 0, base.max_input_length)
    inputs = {
        "method": "tune",
        "adapter": settings(config),
        "recipe": dataclasses.asdict(recipe),
        "task": data.digest(),
        "base": base.fingerprint,
    }
    if done := find_outcome(out, inputs, (base,)):
        return done
    base.check_finite()
    resolved = recipe.resolve(len(data.train), learning_rate(kind_of_config(config)))
    with resumable_folder(out, inputs) as work:
        if done := find_outcome(out, inputs, (base,)):  # another process has made it since
            return done
        staging = new_folder(work / "whole")
        fresh = fresh_model(base, data.head, resolved.seed)
        restore_output_units(fresh, base, data)
        model = attach(fresh, base, data.head, config, resolved.seed)
        start = initial_factors(model)
        curve = tune_model(model, base, data, resolved, work, progress)
        if not best_step(curve, data.task.scoring.merit):
            why = weakness(data, data.dev)
            logger.warning(
                "%s: %d steps at a rate of %g brought no better score on dev than the untrained head has, so the "
                "weights are those before the first step. %s",
                out, resolved.steps, resolved.learning_rate,
                f"dev has {why}." if why else "Take more steps or another learning rate.",
            )  # fmt: skip
        save_model(model, base, data.head, staging / "adaptation", start)
        return record_outcome(
            staging, out, base, data, resolved, curve, inputs, method="tune", recycled_from=None, progress=progress,
        )  # fmt: skip
