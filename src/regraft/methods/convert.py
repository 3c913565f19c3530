"""Turns one kind of adaptation into another: a full fine-tune into a LoRA, an adapter into a full fine-tune."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import (
    Adaptation,
    extract_lora,
    load_adaptation,
    load_model,
    stored_head,
    write_adapter,
    write_graft,
    write_lineage,
    write_tokenizer,
)
from regraft.adaptation.tokens import match_token_rows, with_adaptation_tokens
from regraft.base import Base
from regraft.checkpoint import check_finite, is_up_to_date, publish, read_results, resumable_folder, write_record
from regraft.errors import CheckpointError, MismatchError, RecipeError
from regraft.methods.recycle import new_folder
from regraft.naming import class_of
from regraft.progress import Progress, quiet, silent
from regraft.task import load_data
from regraft.upgrade import Upgrade, with_current_fingerprints

if TYPE_CHECKING:
    import torch

    from regraft.task import Head, Task, TaskData

MEASURED = 256


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What came of a conversion.

    Args:
        path: The new adaptation's folder.
        kind: Its kind.
        kept: The share of the squared norm of the delta that is in it; 1 where nothing is left out.
        left_out: The share that is in tensors for which the new kind has no place.
    """

    path: Path
    kind: str
    kept: float
    left_out: float


def convert(
    adaptation: Adaptation | str | Path,
    old: Base | str | Path,
    out: str | Path,
    to: str,
    *,
    new: Base | str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    task: Task | TaskData | str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Write an adaptation as another kind, on the base it was tuned on or on the upgraded one.

    An adapter that multiplies or renormalises weights is worked out against the old base: on a new base it is the
    change that it made to the old one.

    Args:
        adaptation: What was tuned, or its folder.
        old: The base it was tuned on.
        out: Where the new adaptation is written.
        to: `full` or `lora`.
        new: The base that it is for; None for the old one.
        rank: To a LoRA: the rank of every layer; or
        energy: the share of each delta's squared norm to keep.
        task: To a LoRA: texts that layers' inputs are measured on, so that outputs rather than weights are kept.
        force: Take the old base in spite of another fingerprint.
        progress: Told of each layer.

    Returns:
        Where it is and what was lost.

    Raises:
        MismatchError: The adaptation does not belong to the old base, or changes nothing in it.
        OutcomeError: Something else is at `out`; what was made from the same is left as it is.
        RecipeError: There is no such conversion.
    """
    adaptation = adaptation if isinstance(adaptation, Adaptation) else load_adaptation(adaptation)
    old = old if isinstance(old, Base) else Base.open(old)
    upgrade, out = Upgrade(old, new if new is not None else old), Path(out)
    refold = to == adaptation.kind and (adaptation.family.tunes_base or (rank is None and energy is None))
    if to not in ("full", "lora"):
        raise RecipeError(f"an adaptation is converted to full or lora, found {to!r}.")
    if refold and not adaptation.changed_base:
        raise RecipeError(f"{adaptation.path} is of kind {to} already. To put it on a new base, recycle it (direct).")
    if to == "full" and (rank is not None or energy is not None or task is not None):
        raise RecipeError("rank, energy and texts are for a LoRA.")
    data = None if task is None else load_data(task, 0)
    provenance = {
        "operation": "convert", "to": to, "rank": rank, "energy": energy, "adaptation": adaptation.fingerprint,
        "settings": adaptation.config, "labels": adaptation.labels, "old": old.fingerprint,
        "new": upgrade.new.fingerprint if new is not None else None,
        "task": None if data is None else data.digest(),
    }  # fmt: skip
    if is_up_to_date(out, provenance, lambda record: with_current_fingerprints(record, (upgrade.old, upgrade.new))):
        return Conversion(out, to, **read_results(out))
    adaptation.check_base(old, force=force)
    upgrade = with_adaptation_tokens(adaptation, upgrade)
    old, target = upgrade.old, upgrade.new
    if to == "lora" and not refold and match_token_rows(adaptation, Upgrade(old, old)) is not None:
        raise MismatchError(
            f"{adaptation.path}: has other tokens than {old.path}, and a LoRA of it would not know them. Recycle it as "
            "it is (regraft recycle --method direct)."
        )
    head = stored_head(adaptation, old)
    kept, left_out = 1.0, 0.0
    with resumable_folder(out, {}) as work:
        staging = new_folder(work / "whole")
        if refold:
            carried = adaptation.family.graft(adaptation, upgrade)
            write_adapter(staging, carried.tensors, carried.settings)
        else:
            source, model = _materialise(adaptation, old, head, new_folder(work / "full"))
            if to == "lora":
                moments = None if data is None else _moments(model, old, data, progress)
                heads = [name for name in model.state_dict() if not name.startswith(old.prefix + ".")]
                sides = source.checkpoint, old.checkpoint
                lora = extract_lora(*sides, rank, energy, progress, moments, heads, class_of(source.checkpoint))
                kept, left_out = lora.kept, lora.left_out
                on_target = {"base_model_name_or_path": target.name, "revision": None}
                write_adapter(staging, lora.tensors, {**lora.config, **on_target})
            elif new is not None:
                write_graft(source, upgrade, staging, progress)
            else:
                staging = source.path
        write_tokenizer(target, staging)
        write_lineage(staging, target, adaptation.labels, adaptation.task_type)
        check_finite(load_adaptation(staging).checkpoint)
        try:
            load_model(load_adaptation(staging), target, head)
        except (CheckpointError, MismatchError) as error:
            raise RecipeError(
                f"{adaptation.path}: what it would be as {to} does not load wholly on {target.path}: it can be "
                f"recycled, but not converted ({error})"
            ) from error
        write_record(staging, provenance, {"kept": kept, "left_out": left_out})
        publish(staging, out)
    return Conversion(out, to, kept, left_out)


def _materialise(adaptation: Adaptation, old: Base, head: Head, folder: Path) -> tuple[Adaptation, Any]:
    """Return an adaptation as a full fine-tune of its base, with its model."""
    model = load_model(adaptation, old, head)
    merged = adaptation.family.merged(adaptation, model, old, head)
    if merged is model:
        return adaptation, model
    with quiet():
        merged.save_pretrained(folder)
        write_tokenizer(old, folder)
    return dataclasses.replace(load_adaptation(folder), base=adaptation.base, labels=adaptation.labels), merged


def _moments(model: Any, base: Base, data: TaskData, progress: Progress) -> dict[str, torch.Tensor]:
    from regraft.model import Deployment, input_moments

    deployment = Deployment(model, base, data, "fp32")
    examples = deployment.examples(data.train.take(range(min(MEASURED, len(data.train)))))
    return input_moments(deployment.model, examples, progress)
