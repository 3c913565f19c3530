"""The run of a method on an adaptation, up to the recorded outcome."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import (
    HEAD_POLICIES,
    Adaptation,
    HeadPolicy,
    Outcome,
    check_task_type,
    find_outcome,
    load_adaptation,
    load_old_model,
    set_served_base,
    stored_head,
)
from regraft.adaptation.outcome_record import Source
from regraft.adaptation.template import text_digest, with_deployment_tokenizers
from regraft.adaptation.tokens import match_token_rows, with_adaptation_tokens
from regraft.checkpoint import empty_folder, resumable_folder
from regraft.errors import RecipeError
from regraft.methods.job import Job
from regraft.methods.options import check_options
from regraft.methods.record import further_inputs, record_outcome
from regraft.methods.registry import find_method
from regraft.model import match_labels, measure_effect
from regraft.progress import Progress, silent
from regraft.task import load_data
from regraft.tuning import Recipe, learning_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade


def recycle(
    upgrade: Upgrade,
    adaptation: Adaptation | str | Path,
    task: Task | TaskData | str | Path,
    method: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    options: Any = None,
    head: HeadPolicy = "copy",
    replace: bool = False,
    served_base: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Carry an adaptation over to the new base with a method.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation on the old base, or its folder.
        task: The task it was tuned for: a task file, a `Task` or its data.
        method: A name in `regraft.methods.methods()`, or START+OBJECTIVE.
        out: The outcome folder to write; an outcome of the same inputs is returned as it is.
        recipe: The recipe for training; None for the defaults.
        options: The method's options, such as `Distillation`; a tuple with the start's and the objective's options;
            None for the defaults.
        head: `copy` the old head, whose labels must be the task's; `resize` it to the task's labels, matched by name;
            or put a `fresh` head on the old weights.
        replace: Whether to use the tensors that an adapter stores in place of its base's (embeddings, norms, biases,
            magnitudes of DoRA) as they are, as PEFT does, rather than add their change to the new base.
        served_base: The path or hub id by which a server will name the new base, for the adapter's config and the model
            card; None for the name of the new base.
        force: Whether to accept an old base whose fingerprint differs from the recorded one.
        progress: Called at each step.

    Returns:
        The outcome.

    Raises:
        CheckpointError: A weight file is incomplete or damaged.
        DataError: The task's data cannot be used.
        MismatchError: Bases, adaptation and task do not belong together, an adapter has no effect, or weights or
            outputs are infinite or NaN.
        OutcomeError: `out` exists, and is not an outcome of the same inputs, or a figure is infinite or NaN.
        KindError: The method does not support the adaptation's kind, or the upgrade.
        RecipeError: There is no such method, an option is out of range, the head's policy is not supported, `replace`
            or `served_base` does not apply to the adaptation, or training diverged.
    """
    chosen = find_method(method)
    recipe = recipe or Recipe()
    out = Path(out)
    options = chosen.complete(options)
    check_options(method, options)
    if not isinstance(adaptation, Adaptation):
        adaptation = load_adaptation(adaptation)
    _check_head(head, method, chosen.heads(options))
    lineage = adaptation.check_base(upgrade.old, force=force)
    upgrade = with_adaptation_tokens(adaptation, upgrade)
    data = load_data(task, recipe.seed)
    options = chosen.for_task(options, data.task)
    upgrade = with_deployment_tokenizers(adaptation, upgrade, data.task)
    if "labels" in chosen.needs(options):
        data.require_labels(f"method {method}")
    data = data.with_virtual_tokens(adaptation.num_virtual_tokens, upgrade.new.max_input_length)
    data = _match_head(data, adaptation, head)
    inputs: dict[str, Any] = {
        "method": method,
        "options": chosen.record(options),
        "recipe": recipe.record(),
        "head": head,
        "task": data.digest(),
        "old_base": upgrade.old.fingerprint,
        "new_base": upgrade.new.fingerprint,
        "adaptation": adaptation.fingerprint,
    }
    if data.task.head_in_base:
        heads = {"old_head": upgrade.old, "new_head": upgrade.new}
        inputs |= {key: base.language_head_fingerprint for key, base in heads.items() if base.language_head_fingerprint}
        inputs |= {"texts": text_digest(upgrade.old, upgrade.new), **further_inputs(data.task)}
    if adaptation.family.replaces_base_tensors(adaptation, upgrade.old):
        inputs["replace"] = replace
    elif replace:
        raise RecipeError(f"{adaptation.path}: stores nothing in place of its base's tensors. Leave out replace.")
    if served_base is not None:
        if adaptation.kind == "full":
            raise RecipeError(f"{adaptation.path}: is a full fine-tune, which is served alone. Leave out served_base.")
        if chosen.kind(adaptation.kind) == "full":
            raise RecipeError(f"method {method} makes a full fine-tune, which is served alone. Leave out served_base.")
        inputs["served_base"] = served_base
    inputs |= chosen.contents(options, recipe.seed)
    existing = find_outcome(out, inputs, (upgrade.old, upgrade.new))
    if existing:
        return existing
    upgrade.check_finite()
    old_head = data.head if head == "copy" else stored_head(adaptation, upgrade.old)
    old_model = load_old_model(adaptation, upgrade, old_head)
    measure_effect(old_model, adaptation, upgrade.old, data)  # raises if an adapter has no effect
    resolved = recipe.resolve(len(data.train), learning_rate(chosen.kind(adaptation.kind), data.task))
    source = Source(
        adaptation=str(adaptation.path),
        fingerprint=adaptation.fingerprint,
        old_base=upgrade.old.name,
        old_base_fingerprint=upgrade.old.fingerprint,
        lineage=lineage,
    )
    with resumable_folder(out, inputs) as work_folder:
        existing = find_outcome(out, inputs, (upgrade.old, upgrade.new))
        if existing:  # another process has written it since
            return existing
        staging = empty_folder(work_folder / "whole")
        row_match = match_token_rows(adaptation, upgrade)
        job = Job(
            upgrade=upgrade,
            adaptation=adaptation,
            data=data,
            recipe=resolved,
            work_folder=work_folder,
            output_folder=staging / "adaptation",
            progress=progress,
            row_match=row_match,
            head=head,
            replace=replace,
        )
        if row_match:
            job.notes["vocabulary"] = row_match.summary()
        start_time = time.perf_counter()
        curve = chosen.run(job, options)
        if served_base is not None:
            set_served_base(job.output_folder, served_base)
        seconds = curve[-1]["seconds"] if curve else time.perf_counter() - start_time
        job.notes.setdefault("seconds", round(seconds, 2))
        return record_outcome(
            staging,
            out,
            upgrade.new,
            data,
            resolved,
            curve,
            inputs,
            method=method,
            recycled_from=source,
            notes=job.notes,
            labelled_rows=job.labelled_rows,
            scores_agreement=chosen.scores_agreement(options),
            progress=progress,
        )


def _check_head(head: str, method: str, supported_heads: Sequence[str]) -> None:
    """Refuse a policy for the old head that is unknown, or that the method does not support."""
    if head not in HEAD_POLICIES:
        raise RecipeError(f"head must be one of {', '.join(HEAD_POLICIES)}, found {head!r}.")
    if head not in supported_heads:
        raise RecipeError(
            f"method {method} uses the old head: head must be {' or '.join(supported_heads)}, found {head}."
        )


def _match_head(data: TaskData, adaptation: Adaptation, head: HeadPolicy) -> TaskData:
    """Return the data with labels in the order of the new head, or refuse a policy that the task does not support."""
    if head not in data.task.head_policies:
        policies = " or ".join(data.task.head_policies)
        raise RecipeError(f"with a task of type {data.task.type}, head must be {policies}, found {head}.")
    if head != "fresh":
        check_task_type(adaptation, data.task)
    return match_labels(adaptation, data) if head == "copy" else data
