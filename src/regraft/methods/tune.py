"""Tuning of a base on a task from scratch, up to the recorded outcome."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adaptation import (
    Outcome,
    find_outcome,
    initial_factors,
    json_settings,
    keeps_base,
    kind_of_config,
    new_config,
    prepare_for_tuning,
    save_model,
    set_served_base,
)
from regraft.adaptation.bottleneck_config import DEFAULT_INNER_SIZE
from regraft.adaptation.kinds import DEFAULT_RANK, DEFAULT_VIRTUAL_TOKENS
from regraft.adaptation.template import text_digest, with_task_template
from regraft.base import Base
from regraft.checkpoint import empty_folder, resumable_folder
from regraft.errors import RecipeError
from regraft.methods.record import further_inputs, record_outcome
from regraft.progress import Progress, silent
from regraft.recipe import best_step
from regraft.task import load_data, weakness
from regraft.tuning import Recipe, fresh_scaled_model, learning_rate, tune_model

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
    served_base: str | None = None,
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
        served_base: For an adapter: the path or hub id by which a server will name the base; see `recycle`.
        progress: Called at each step.

    Returns:
        The outcome, with the weights of the best dev score.

    Raises:
        CheckpointError: A weight file of the base is incomplete or damaged.
        DataError: The task's data cannot be used.
        MismatchError: Outputs of the tuned model are infinite or NaN.
        OutcomeError: `out` exists, and is not an outcome of the same inputs.
        RecipeError: There is no such kind, an option is out of range or does not apply to it, or training diverged.
    """
    recipe = recipe or Recipe()
    out = Path(out)
    base = base if isinstance(base, Base) else Base.open(base)
    sizes = {"rank": rank, "inner_size": inner_size, "virtual_tokens": virtual_tokens}
    data = load_data(task, recipe.seed)
    config = new_config(kind, base, data.head, **sizes) if isinstance(kind, str) else kind
    if served_base is not None and config is None:
        raise RecipeError("a full fine-tune is served alone, without a base. Leave out served_base.")
    data.require_labels("tuning")
    base = with_task_template(base, data.task)
    data = data.with_virtual_tokens(getattr(config, "num_virtual_tokens", None) or 0, base.max_input_length)
    inputs = {
        "method": "tune",
        "adapter": json_settings(config),
        "recipe": recipe.record(),
        "task": data.digest(),
        "base": base.fingerprint,
        **({} if served_base is None else {"served_base": served_base}),
    }
    if data.task.head_in_base:
        head = base.language_head_fingerprint
        inputs |= {"texts": text_digest(base), **({"base_head": head} if head else {}), **further_inputs(data.task)}
    existing = find_outcome(out, inputs, (base,))
    if existing:
        return existing
    base.check_finite()
    resolved = recipe.resolve(len(data.train), learning_rate(kind_of_config(config), data.task))
    with resumable_folder(out, inputs) as work_folder:
        existing = find_outcome(out, inputs, (base,))
        if existing:  # another process has written it since
            return existing
        staging = empty_folder(work_folder / "whole")
        fresh = fresh_scaled_model(base, data, resolved.seed, frozen=keeps_base(config))
        model = prepare_for_tuning(fresh, base, data.head, config, resolved.seed)
        initial = initial_factors(model)
        curve = tune_model(model, base, data, resolved, work_folder, progress)
        if not best_step(curve, data.selection.merit):
            dev_weakness = weakness(data, data.dev)
            logger.warning(
                "%s: after %d steps at a learning rate of %g, no score on dev is better than %s, so "
                "the weights from before the first step are saved. %s",
                out,
                resolved.steps,
                resolved.learning_rate,
                "the base's" if data.task.head_in_base else "the untrained head's",
                f"dev has {dev_weakness}." if dev_weakness else "Take more steps or another learning rate.",
            )
        save_model(model, base, data.head, staging / "adaptation", initial)
        if served_base is not None:
            set_served_base(staging / "adaptation", served_base)
        return record_outcome(
            staging, out, base, data, resolved, curve, inputs, method="tune", recycled_from=None, progress=progress
        )
