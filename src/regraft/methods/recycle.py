"""Runs one method on one adaptation, scores what came of it, and records it as an outcome."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import (
    HEAD_POLICIES,
    Adaptation,
    HeadPolicy,
    Outcome,
    check_compatibility,
    check_task_type,
    find_outcome,
    load_adaptation,
    load_model,
    stored_head,
    write_outcome,
)
from regraft.adaptation.outcome import versions
from regraft.adaptation.outcome_record import BaseRecord, Cost, OutcomeRecord, Scores, Source, TaskRecord
from regraft.adaptation.tokens import match_token_rows, with_adaptation_tokens
from regraft.checkpoint import check_finite, resumable_folder
from regraft.errors import CheckpointError, MismatchError, RecipeError
from regraft.methods.job import Job
from regraft.methods.options import check_options
from regraft.methods.registry import find_method
from regraft.model import Deployment, check_effect, match_labels
from regraft.progress import Progress, silent
from regraft.recipe import best_step, check_trained
from regraft.task import chance_score, load_data
from regraft.tuning import Recipe, learning_rate, plan_order

if TYPE_CHECKING:
    from collections.abc import Collection

    from regraft.base import Base
    from regraft.checkpoint import Checkpoint
    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade

SPLITS = ("dev", "test")
JUDGED_BY_OLD_MODEL = ("score", "cannot_know")  # notes of methods whose curves are of agreement with it: it rises


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
    force: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Get weights for the new base out of weights tuned on the old one.

    Args:
        upgrade: The old and the new base.
        adaptation: What was tuned on the old base, or its folder.
        task: The task it was tuned for: a task file, a `Task` or its data.
        method: The name of one of `regraft.methods.methods()`, or START+OBJECTIVE.
        out: Where the outcome folder is written. If it is there, made from the same, nothing is done.
        recipe: How to train.
        options: The method's own options, as `Distillation`; a tuple of those of its start and its objective; None for
            defaults.
        head: `copy` the old head, whose labels must be the task's; `resize` it to the task's labels, matched by name;
            or put a `fresh` one on the old weights.
        replace: Put what an adapter stores in place of its base's tensors (embeddings, norms, biases, magnitudes of a
            DoRA) onto the new base as it is stored, as PEFT would, rather than what tuning changed in it.
        force: Take the old base in spite of another fingerprint.
        progress: Told of each step.

    Returns:
        The outcome.

    Raises:
        CheckpointError: A file of weights is not whole.
        DataError: The task's data cannot be used.
        MismatchError: Bases, adaptation and task do not belong together.
        OutcomeError: Something else is at `out`.
        RecipeError: There is no such method, or an option is out of its range.
    """
    chosen, recipe, out = find_method(method), recipe or Recipe(), Path(out)
    options = chosen.complete(options)
    check_options(method, options)
    if not isinstance(adaptation, Adaptation):
        adaptation = load_adaptation(adaptation)
    if head not in HEAD_POLICIES:
        raise RecipeError(f"head is one of {', '.join(HEAD_POLICIES)}, found {head!r}.")
    if head not in (heads := chosen.heads(options)):
        taken = " or ".join(heads)
        raise RecipeError(f"method {method} goes by the old head's outputs: it takes head {taken} only, found {head}.")
    lineage = adaptation.check_base(upgrade.old, force=force)
    upgrade = with_adaptation_tokens(adaptation, upgrade)
    data = load_data(task, recipe.seed)
    if "labels" in chosen.needs(options):
        data.require_labels(f"method {method}")
    data = data.with_virtual_tokens(adaptation.virtual_tokens, upgrade.new.max_input_length)
    if head not in data.task.head_policies:
        raise RecipeError(f"the head of a {data.task.type} is {' or '.join(data.task.head_policies)}, found {head}.")
    if head != "fresh":
        check_task_type(adaptation, data.task)
    if head == "copy":
        data = match_labels(adaptation, data)
    inputs: dict[str, Any] = {
        "method": method,
        "options": chosen.record(options),
        "recipe": dataclasses.asdict(recipe),
        "head": head,
        "task": data.digest(),
        "old_base": upgrade.old.fingerprint,
        "new_base": upgrade.new.fingerprint,
        "adaptation": adaptation.fingerprint,
    }
    if adaptation.family.replaces_base_tensors(adaptation, upgrade.old):
        inputs["replace"] = replace
    elif replace:
        raise RecipeError(f"{adaptation.path}: stores nothing in place of its base's tensors: leave out replace.")
    inputs |= chosen.contents(options, recipe.seed)
    if done := find_outcome(out, inputs, (upgrade.old, upgrade.new)):
        return done
    upgrade.check_finite()
    old_head = data.head if head == "copy" else stored_head(adaptation, upgrade.old)
    check_effect(check_compatibility(adaptation, upgrade, old_head), adaptation, upgrade.old, data)
    resolved = recipe.resolve(len(data.train), learning_rate(adaptation.kind))
    source = Source(
        adaptation=str(adaptation.path),
        fingerprint=adaptation.fingerprint,
        old_base=upgrade.old.name,
        old_base_fingerprint=upgrade.old.fingerprint,
        lineage=lineage,
    )
    with resumable_folder(out, inputs) as work:
        if done := find_outcome(out, inputs, (upgrade.old, upgrade.new)):  # another process has made it since
            return done
        staging = new_folder(work / "whole")
        rows, into = match_token_rows(adaptation, upgrade), staging / "adaptation"
        job = Job(upgrade, adaptation, data, resolved, work, into, progress, rows, head, replace)
        if rows:
            job.notes["vocabulary"] = rows.summary()
        started = time.perf_counter()
        curve = chosen.run(job, options)
        job.notes.setdefault("seconds", round(curve[-1]["seconds"] if curve else time.perf_counter() - started, 2))
        return record_outcome(
            staging, out, upgrade.new, data, resolved, curve, inputs, method=method,
            recycled_from=source, notes=job.notes, labelled=job.labelled, progress=progress,
        )  # fmt: skip


def record_outcome(
    staging: Path,
    out: Path,
    base: Base,
    data: TaskData,
    recipe: Recipe,
    curve: list[dict[str, float]],
    inputs: dict[str, Any],
    *,
    method: str,
    recycled_from: Source | None,
    notes: dict[str, Any] | None = None,
    labelled: Collection[int] = (),
    progress: Progress,
) -> Outcome:
    """Load the adaptation that was just written, score it on dev and test, and publish the outcome.

    Args:
        staging: Holds `adaptation/`.
        out: Where the outcome is written.
        base: The base the adaptation lives on.
        data: The task's examples.
        recipe: As it was resolved.
        curve: The learning curve; empty if nothing was trained.
        inputs: What the outcome is made from.
        method: How it was made.
        recycled_from: Where it comes from, if it was recycled.
        notes: What the method found out; `labels` and `seconds` of it, where it has them, are its cost.
        labelled: Rows of the training examples whose labels were read beside those of the learning curve's steps.
        progress: Told of each batch.

    Returns:
        The outcome.

    Raises:
        MismatchError: Its weights or outputs are infinite or not a number, and nothing was trained.
        RecipeError: The same after training.
    """
    import numpy as np

    adaptation = load_adaptation(staging / "adaptation")
    if curve:
        check_trained(adaptation.checkpoint, recipe)
    else:
        _check_grafted(adaptation.checkpoint, base)
    deployment = Deployment(load_model(adaptation, base, data.head), base, data, recipe.precision, progress)
    notes = dict(notes or {})
    rows: list[dict[str, Any]] = []
    scores: dict[str, float | None] = {}
    for name in SPLITS:
        split = getattr(data, name)
        scores |= {name: None, f"{name}_majority": None}
        if split is None:
            continue
        if not deployment.is_finite(split):
            raise MismatchError(
                f"{base.path}: with the new weights on it, the outputs on {name} are infinite or not a number. Compute "
                "in fp32 (--precision), or take another method."
            )
        unknown, sure = [None] * len(split), deployment.confidence(split)
        columns = {
            "row": split.rows.tolist(),
            "label": split.targets.tolist() if data.labelled else unknown,
            "prediction": deployment.predictions(split),
            "right": deployment.right(split) if data.labelled else unknown,
            "confidence": unknown if sure is None else [round(value, 4) for value in sure],
        }
        rows += [{"split": name, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]
        if data.labelled:
            scores |= {name: deployment.score(split), f"{name}_majority": chance_score(data, split)}
    dev = scores["dev"]
    trained = bool(curve)
    curve = curve or [{"step": 0, "seconds": 0.0, "score": float(dev or 0.0)}]
    steps = int(curve[-1]["step"])
    by_old_model = not notes.keys().isdisjoint(JUDGED_BY_OLD_MODEL)
    merit = float if by_old_model else data.task.scoring.merit
    labels_read = set(labelled)
    if steps:
        alike = np.zeros(len(data.train), dtype=np.int64)  # lengths decide when an example comes, not whether
        order = plan_order(alike, recipe.batch_size, steps, recipe.seed)
        labels_read.update(data.train.rows[order].tolist())
    record = OutcomeRecord(
        method=method,
        kind=adaptation.kind,
        inputs=inputs,
        task=TaskRecord(data.name, data.metric, data.digest(), len(data.train), data.task.type),
        labels=tuple(data.labels),
        seed=recipe.seed,
        recipe=dataclasses.asdict(recipe),
        scores=Scores(**scores, dev_at_start=curve[0]["score"] if trained or data.labelled else None),
        best_step=best_step(curve, merit),
        cost=Cost(
            steps=steps,
            seconds=notes.pop("seconds", round(curve[-1]["seconds"], 2)),
            labels=notes.pop("labels", len(labels_read)),
        ),
        notes=notes,
        base=BaseRecord(base.name, base.fingerprint),
        recycled_from=recycled_from,
        versions=versions(),
    )
    return write_outcome(staging, out, record, curve, rows)


def _check_grafted(checkpoint: Checkpoint, base: Base) -> None:
    """Refuse to publish weights that are no numbers and that no training made so."""
    try:
        check_finite(checkpoint)
    except CheckpointError as error:
        raise MismatchError(
            f"what the method makes of the old weights on {base.path} is infinite or not a number. A base or the "
            "adaptation has such values (regraft weights inspect --check-finite names them), or an option is too large."
        ) from error


def new_folder(folder: Path) -> Path:
    """Make an empty folder, clearing away what an interrupted run left in its place.

    Args:
        folder: The folder.

    Returns:
        The folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
