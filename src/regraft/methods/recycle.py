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
    check_fit,
    find_outcome,
    load_adaptation,
    stored_head,
    write_outcome,
)
from regraft.adaptation.tokens import tuned_rows, with_own_tokens
from regraft.checkpoint import check_finite, resumable_folder
from regraft.errors import CheckpointError, MismatchError, RecipeError
from regraft.methods.label_free import LabelFree
from regraft.methods.method import Job
from regraft.methods.registry import check_options, find_method
from regraft.model.deployment import check_effect, match_labels
from regraft.progress import Progress, silent
from regraft.task import chance_score, load_data, score
from regraft.tuning.distill import Distillation
from regraft.tuning.recipe import Recipe, check_trained

if TYPE_CHECKING:
    from regraft.base import Base
    from regraft.checkpoint import Checkpoint
    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade

SPLITS = ("dev", "test")


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
        method: The name of one of `regraft.methods.methods()`.
        out: Where the outcome folder is written. If it is there, made from the same, nothing is done.
        recipe: How to train.
        options: The method's own options, as `Distillation`; None for its defaults.
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
    if chosen.options and options is None:
        options = chosen.options()
    if type(options) is not (chosen.options or type(None)):
        raise RecipeError(f"method {method} takes {chosen.options or 'no options'}, found {options!r}.")
    check_options(method, options)
    if not isinstance(adaptation, Adaptation):
        adaptation = load_adaptation(adaptation)
    if head not in HEAD_POLICIES:
        raise RecipeError(f"head is one of {', '.join(HEAD_POLICIES)}, found {head!r}.")
    if head != "copy" and isinstance(options, (Distillation, LabelFree)):
        raise RecipeError(f"method {method} learns the old head's outputs: it takes head copy only, found {head}.")
    lineage = adaptation.check_base(upgrade.old, force=force)
    upgrade = with_own_tokens(adaptation, upgrade)
    data = load_data(task, recipe.seed)
    if getattr(options, "labels", "labels" in chosen.needs):
        data.require_labels(f"method {method}")
    data = data.with_room(adaptation.virtual_tokens, upgrade.new.longest)
    if head == "copy":
        data = match_labels(adaptation, data)
    inputs: dict[str, Any] = {
        "method": method,
        "options": dataclasses.asdict(options) if options is not None else None,
        "recipe": dataclasses.asdict(recipe),
        "head": head,
        "task": data.digest(),
        "old_base": upgrade.old.fingerprint,
        "new_base": upgrade.new.fingerprint,
        "adaptation": adaptation.fingerprint,
    }
    if adaptation.family.replaces(adaptation, upgrade.old):
        inputs["replace"] = replace
    elif replace:
        raise RecipeError(f"{adaptation.path}: stores nothing in place of its base's tensors: leave out replace.")
    if chosen.contents:
        inputs |= chosen.contents(options, recipe.seed)
    if done := find_outcome(out, inputs, (upgrade.old, upgrade.new)):
        return done
    upgrade.check_finite()
    old_head = data.head if head == "copy" else stored_head(adaptation, upgrade.old)
    check_effect(check_fit(adaptation, upgrade, old_head), adaptation, upgrade.old, data)
    resolved = recipe.resolve(len(data.train), learning_rate(adaptation.kind))
    source = {
        "adaptation": str(adaptation.path),
        "fingerprint": adaptation.fingerprint,
        "old_base": upgrade.old.name,
        "old_base_fingerprint": upgrade.old.fingerprint,
        "lineage": lineage,
    }
    with resumable_folder(out, inputs) as work:
        if done := find_outcome(out, inputs, (upgrade.old, upgrade.new)):  # another process has made it since
            return done
        staging = new_folder(work / "whole")
        job = Job(upgrade, adaptation, data, resolved, work, staging / "adaptation", progress, head, replace)
        if rows := tuned_rows(adaptation, upgrade):
            job.notes["vocabulary"] = rows.summary()
        started = time.perf_counter()
        curve = chosen.run(job, options)
        job.notes.setdefault("seconds", round(curve[-1]["seconds"] if curve else time.perf_counter() - started, 2))
        return record_outcome(
            staging, out, upgrade.new, data, resolved, curve, inputs, method=method,
            recycled_from=source, notes=job.notes, progress=progress,
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
    recycled_from: dict[str, Any] | None,
    notes: dict[str, Any] | None = None,
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
        progress: Told of each batch.

    Returns:
        The outcome.

    Raises:
        MismatchError: Its weights or outputs are infinite or not a number, and nothing was trained.
        RecipeError: The same after training.
    """
    import numpy as np

    from regraft.adaptation import load_model
    from regraft.model import device, encode, predict
    from regraft.tuning import plan_order

    adaptation = load_adaptation(staging / "adaptation")
    if curve:
        check_trained(adaptation.checkpoint, recipe)
    else:
        _check_grafted(adaptation.checkpoint, base)
    model = load_model(adaptation, base, data.head).to(device())
    notes = dict(notes or {})
    rows: list[dict[str, Any]] = []
    scores: dict[str, float | None] = {}
    for name in SPLITS:
        split = getattr(data, name)
        if split is None:
            scores |= {name: None, f"{name}_majority": None}
            continue
        examples = encode(base, data, split)
        logits = predict(model, examples, recipe.precision, progress)
        if not logits.isfinite().all():
            raise MismatchError(
                f"{base.path}: with the new weights on it, the outputs on {name} are infinite or not a number. Compute "
                "in fp32 (--precision), or take another method."
            )
        found = logits.argmax(dim=1).tolist()
        confidences = [round(value, 4) for value in logits.softmax(dim=1).amax(dim=1).tolist()]
        scores |= dict.fromkeys((name, f"{name}_majority"))
        if data.labelled:
            scores |= {name: score(data.metric, split.labels, found), f"{name}_majority": chance_score(data, split)}
        known = split.labels.tolist() if data.labelled else [None] * len(split)
        rows += [
            {
                "split": name,
                "row": row,
                "label": label,
                "prediction": guess,
                "right": None if label is None else label == guess,
                "confidence": confidence,
            }
            for row, label, guess, confidence in zip(split.rows.tolist(), known, found, confidences, strict=True)
        ]
    dev = scores["dev"]
    trained = bool(curve)
    curve = curve or [{"step": 0, "seconds": 0.0, "score": float(dev or 0.0)}]
    steps = int(curve[-1]["step"])
    best = max(curve, key=lambda point: (point["score"], -point["step"]))
    seen = 0
    if steps:
        lengths = encode(base, data, data.train).lengths
        seen = len(np.unique(plan_order(lengths, recipe.batch_size, steps, recipe.seed)))
    record = {
        "method": method,
        "kind": adaptation.kind,
        "inputs": inputs,
        "task": {"name": data.name, "metric": data.metric, "digest": data.digest(), "train": len(data.train)},
        "labels": list(data.labels),
        "seed": recipe.seed,
        "recipe": dataclasses.asdict(recipe),
        "scores": {**scores, "dev_at_start": curve[0]["score"] if trained or data.labelled else None},
        "best_step": int(best["step"]),
        "cost": {
            "steps": steps,
            "seconds": notes.pop("seconds", round(curve[-1]["seconds"], 2)),
            "labels": notes.pop("labels", seen),
        },
        "notes": notes,
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "recycled_from": recycled_from,
    }
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


def learning_rate(kind: str) -> float:
    """Return the learning rate for a kind of adaptation where the recipe names none.

    Args:
        kind: As in `Adaptation`.

    Returns:
        The rate.
    """
    from regraft.tuning import ADAPTER_RATE, LEARNING_RATES

    return LEARNING_RATES.get(kind, ADAPTER_RATE)


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
