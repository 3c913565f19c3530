"""Conversion of an adaptation to a full fine-tune or to a LoRA."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import (
    Adaptation,
    extract_lora,
    load_adaptation,
    load_model,
    set_served_base,
    stored_head,
    write_adapter,
    write_graft,
    write_lineage,
    write_tokenizer,
    write_uniform,
)
from regraft.adaptation.tokens import match_token_rows, with_adaptation_tokens
from regraft.base import Base
from regraft.checkpoint import (
    check_finite,
    empty_folder,
    is_up_to_date,
    publish,
    read_results,
    resumable_folder,
    write_record,
)
from regraft.errors import CheckpointError, MismatchError, RecipeError
from regraft.naming import class_of
from regraft.progress import Progress, quiet, silent
from regraft.task import load_data
from regraft.upgrade import Upgrade, with_current_fingerprints

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.adaptation.extract import ExtractedLora
    from regraft.task import Head, Task, TaskData

KINDS = ("full", "lora")
"""The kinds that an adaptation can be converted to."""
MAX_TEXTS = 256
"""The most texts on which the moments of layers' inputs are measured; more measure better, and take longer."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Args:
        path: The folder of the new adaptation.
        kind: The kind of the new adaptation, `full` or `lora`.
        preserved: The share of the delta's squared norm that the new adaptation preserves, 0–1.
        excluded: The share of the delta's squared norm that is in tensors which the new kind cannot change, 0–1.
    """

    path: Path
    kind: str
    preserved: float
    excluded: float


def convert(
    adaptation: Adaptation | str | Path,
    old: Base | str | Path,
    out: str | Path,
    kind: str,
    *,
    new: Base | str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    task: Task | TaskData | str | Path | None = None,
    served_base: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Convert an adaptation to another kind, or a LoRA to another rank, on the base it was tuned on or on a new one.

    An adapter that multiplies or renormalises weights is converted to the change that it makes to the old base, even
    if the result is for a new base.

    Args:
        adaptation: The adaptation, or its folder.
        old: The base it was tuned on.
        out: The folder to write; a conversion of the same inputs is left as it is.
        kind: The new kind: `full` or `lora`.
        new: The base of the new adaptation; None for the old base.
        rank: For `lora`: the rank of every layer.
        energy: For `lora`, in place of a rank: the share of each delta's squared norm to preserve, 0–1.
        task: For `lora`: the task on whose texts layers' inputs are measured, to preserve outputs rather than weights.
        served_base: For `lora`: the path or hub id by which a server will name the base; None for the base's name.
        force: Whether to accept an old base whose fingerprint differs from the recorded one.
        progress: Called at each layer.

    Returns:
        The new adaptation's folder, and the shares of the delta that are preserved and excluded.

    Raises:
        CheckpointError: A weight file is incomplete or damaged.
        DataError: The task's data cannot be used.
        MismatchError: The adaptation does not belong to the old base, changes nothing in it, or has other tokens, which
            a LoRA cannot have.
        OutcomeError: `out` exists, and is not a conversion of the same inputs.
        RecipeError: There is no such conversion, an option is out of range or does not apply to the kind, or the result
            would not load completely.
    """
    adaptation = adaptation if isinstance(adaptation, Adaptation) else load_adaptation(adaptation)
    old = old if isinstance(old, Base) else Base.open(old)
    upgrade = Upgrade(old, new if new is not None else old)
    out = Path(out)
    keeps_kind = kind == adaptation.kind and (adaptation.family.tunes_base or (rank is None and energy is None))
    has_lora_options = any(option is not None for option in (rank, energy, task, served_base))
    _check_kind(adaptation, kind, keeps_kind=keeps_kind, has_lora_options=has_lora_options)
    data = None if task is None else load_data(task, 0)
    provenance = {
        "operation": "convert",
        "to": kind,
        "rank": rank,
        "energy": energy,
        "adaptation": adaptation.fingerprint,
        "settings": adaptation.config,
        "labels": adaptation.labels,
        "old": old.fingerprint,
        "new": upgrade.new.fingerprint if new is not None else None,
        "task": None if data is None else data.digest(),
        **({} if served_base is None else {"served_base": served_base}),
    }
    if is_up_to_date(out, provenance, lambda record: with_current_fingerprints(record, (upgrade.old, upgrade.new))):
        results = read_results(out)
        return Conversion(out, kind, results["kept"], results["left_out"])
    adaptation.check_base(old, force=force)
    upgrade = with_adaptation_tokens(adaptation, upgrade)
    old, target = upgrade.old, upgrade.new
    if kind == "lora" and not keeps_kind and match_token_rows(adaptation, Upgrade(old, old)) is not None:
        raise MismatchError(
            f"{adaptation.path}: has other tokens than {old.path}, which a LoRA cannot have. Use it without conversion "
            "(regraft recycle --method direct)."
        )
    head = stored_head(adaptation, old)
    preserved = 1.0
    excluded = 0.0
    with resumable_folder(out, {}) as work_folder:
        staging = empty_folder(work_folder / "whole")
        if keeps_kind:
            grafted = adaptation.family.graft(adaptation, upgrade)
            write_adapter(staging, grafted.tensors, grafted.config)
        else:
            full, model = _materialise(adaptation, old, head, empty_folder(work_folder / "full"))
            if kind == "lora":
                moments = None if data is None else _moments(model, old, data, progress)
                lora = _extract(full, model, old, rank, energy, moments, progress)
                preserved, excluded = lora.preserved, lora.excluded
                target_settings = {"base_model_name_or_path": target.name, "revision": None}
                task_settings = {"task_type": head.type.peft_task_type}
                write_adapter(staging, lora.tensors, {**lora.config, **task_settings, **target_settings})
            elif new is not None:
                write_graft(full, upgrade, staging, progress)
            else:
                staging = full.path
        if served_base is not None:
            set_served_base(staging, served_base)
        if head.type.uniform_loras:
            write_uniform(staging)
        write_tokenizer(target, staging)
        write_lineage(staging, target, adaptation.labels, adaptation.task_type)
        check_finite(load_adaptation(staging).checkpoint)
        try:
            load_model(load_adaptation(staging), target, head)
        except (CheckpointError, MismatchError) as error:
            raise RecipeError(
                f"{adaptation.path}: cannot be converted to {kind}, since the result would not load completely on "
                f"{target.path} ({error}). Use regraft recycle."
            ) from error
        write_record(staging, provenance, {"kept": preserved, "left_out": excluded})  # keys since regraft 0.1
        publish(staging, out)
    return Conversion(out, kind, preserved, excluded)


def _check_kind(adaptation: Adaptation, kind: str, *, keeps_kind: bool, has_lora_options: bool) -> None:
    """Refuse an unknown kind, a kind that the adaptation already has, and options that the kind does not use."""
    if kind not in KINDS:
        raise RecipeError(f"an adaptation can be converted to {' or '.join(KINDS)}, found {kind!r}.")
    if keeps_kind and not adaptation.changed_base:
        raise RecipeError(f"{adaptation.path} is of kind {kind} already. To put it on a new base, recycle it (direct).")
    if kind == "full" and has_lora_options:
        raise RecipeError("rank, energy, a task and served_base apply to a LoRA only: leave them out.")


def _materialise(adaptation: Adaptation, old: Base, head: Head, folder: Path) -> tuple[Adaptation, Any]:
    """Return an adaptation as a full fine-tune of its base, written to a folder if it is not one yet; and its model."""
    model = load_model(adaptation, old, head)
    merged = adaptation.family.merge(adaptation, model, old, head)
    if merged is model:
        return adaptation, model
    with quiet():
        merged.save_pretrained(folder)
        write_tokenizer(old, folder)
    return dataclasses.replace(load_adaptation(folder), base=adaptation.base, labels=adaptation.labels), merged


def _extract(
    full: Adaptation,
    model: nn.Module,
    old: Base,
    rank: int | None,
    energy: float | None,
    moments: dict[str, torch.Tensor] | None,
    progress: Progress,
) -> ExtractedLora:
    """Extract a LoRA from a full fine-tune of the old base; the LoRA stores the tensors of the model's head."""
    head_names = [name for name in model.state_dict() if not name.startswith(old.prefix + ".")]
    model_class = class_of(full.checkpoint)
    return extract_lora(full.checkpoint, old.checkpoint, rank, energy, progress, moments, head_names, model_class)


def _moments(model: nn.Module, base: Base, data: TaskData, progress: Progress) -> dict[str, torch.Tensor]:
    """Compute the second moments of each linear layer's inputs on the task's first training texts."""
    from regraft.model import Deployment, input_moments

    deployment = Deployment(model, base, data, "fp32")
    texts = data.train.take(range(min(MAX_TEXTS, len(data.train))))
    return input_moments(deployment.model, deployment.examples(texts), progress)
