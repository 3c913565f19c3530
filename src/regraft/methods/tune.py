"""Tuning of a base on a task from scratch, up to the recorded outcome."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adaptation import (
    Outcome,
    find_outcome,
    fresh_model,
    initial_factors,
    json_settings,
    kind_of_config,
    new_config,
    prepare_for_tuning,
    save_model,
)
from regraft.adaptation.bottleneck_config import DEFAULT_INNER_SIZE
from regraft.adaptation.kinds import DEFAULT_RANK, DEFAULT_VIRTUAL_TOKENS
from regraft.base import Base
from regraft.checkpoint import empty_folder, resumable_folder
from regraft.methods.record import record_outcome
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
    rank: int = DEFAULT_RANK,
    inner_size: int = DEFAULT_INNER_SIZE,
    virtual_tokens: int = DEFAULT_VIRTUAL_TOKENS,
    recipe: Recipe | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Tune a base on a task from a fresh head.

    Args:
        base: The base: a folder, a hub id or an opened base.
        task: The task: a task file, a `Task` or its data.
        out: The outcome folder to write; an outcome of the same inputs is returned as it is.
        kind: `full`; `lora`, `rslora`, `dora`, `pissa` or `olora` on every linear layer of the body; `ia3`, `prefix`,
            `prompt`, `layernorm`; `bottleneck` or `pfeiffer`; or a config of PEFT or a `BottleneckConfig`.
        rank: The rank of a LoRA; alpha is twice the rank.
        inner_size: The width of bottleneck adapters.
        virtual_tokens: The number of virtual tokens of a prefix or a prompt.
        recipe: The recipe for training; None for the defaults.
        progress: Called at each step.

    Returns:
        The outcome, with the weights of the best dev score.

    Raises:
        CheckpointError: A weight file of the base is incomplete or damaged.
        DataError: The task's data cannot be used.
        MismatchError: Outputs of the tuned model are infinite or NaN.
        OutcomeError: `out` exists, and is not an outcome of the same inputs.
        RecipeError: There is no such kind, an option is out of range, or training diverged.
    """
    recipe = recipe or Recipe()
    out = Path(out)
    base = base if isinstance(base, Base) else Base.open(base)
    sizes = {"rank": rank, "inner_size": inner_size, "virtual_tokens": virtual_tokens}
    data = load_data(task, recipe.seed)
    config = new_config(kind, base, data.head, **sizes) if isinstance(kind, str) else kind
    data.require_labels("tuning")
    data = data.with_virtual_tokens(getattr(config, "num_virtual_tokens", None) or 0, base.max_input_length)
    inputs = {
        "method": "tune",
        "adapter": json_settings(config),
        "recipe": dataclasses.asdict(recipe),
        "task": data.digest(),
        "base": base.fingerprint,
    }
    existing = find_outcome(out, inputs, (base,))
    if existing:
        return existing
    base.check_finite()
    resolved = recipe.resolve(len(data.train), learning_rate(kind_of_config(config)))
    with resumable_folder(out, inputs) as work_folder:
        existing = find_outcome(out, inputs, (base,))
        if existing:  # another process has written it since
            return existing
        staging = empty_folder(work_folder / "whole")
        fresh = fresh_model(base, data.head, resolved.seed)
        restore_output_units(fresh, base, data)
        model = prepare_for_tuning(fresh, base, data.head, config, resolved.seed)
        initial = initial_factors(model)
        curve = tune_model(model, base, data, resolved, work_folder, progress)
        if not best_step(curve, data.scoring.merit):
            dev_weakness = weakness(data, data.dev)
            logger.warning(
                "%s: after %d steps at a learning rate of %g, no score on dev is better than the untrained head's, so "
                "the weights from before the first step are saved. %s",
                out,
                resolved.steps,
                resolved.learning_rate,
                f"dev has {dev_weakness}." if dev_weakness else "Take more steps or another learning rate.",
            )
        save_model(model, base, data.head, staging / "adaptation", initial)
        return record_outcome(
            staging, out, base, data, resolved, curve, inputs, method="tune", recycled_from=None, progress=progress
        )
