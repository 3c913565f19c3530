"""Old weights put onto the new base, without any tuning, straight from files to files."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adaptation import write_lineage
from regraft.adaptation.fit import check_body, config_of
from regraft.adaptation.head import stored_labels
from regraft.adaptation.kinds import check_start, read_config
from regraft.adaptation.lora import fold_start
from regraft.adaptation.model import attach, fresh_model, load_model
from regraft.adaptation.replaced import graft_replaced, renumbered_settings, replaced_parameter
from regraft.adaptation.save import write_adapter, write_tokenizer
from regraft.adaptation.tokens import tuned_rows
from regraft.checkpoint import Derived, Entry, write_atomic, write_checkpoint
from regraft.errors import MismatchError
from regraft.naming import named
from regraft.transformers_folder import upgraded_settings
from regraft.vocabulary import write_vocabulary
from regraft.weights import counterparts, graft, graft_rows, is_optional

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.upgrade import Upgrade


def write_graft(
    adaptation: Adaptation, upgrade: Upgrade, into: Path, progress: Progress, *, replace: bool = False
) -> dict[str, list[str]]:
    """Write old tuned weights for the new base: new + (tuned − old), or the adapter; the head is copied.

    A LoRA that took its start out of the old base is written as the plain LoRA that it amounts to there. What an
    adapter stores in place of its base's tensors is grafted like a full fine-tune's.

    Source: Qin et al., 2023 (arXiv:2305.08702), section 4.1.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        into: The folder to fill, plain transformers or PEFT.
        progress: Told of each tensor.
        replace: Whether an adapter's tensors take the place of the new base's as they are stored.

    Returns:
        Tensors that the outcome's notes name: `grafted_in_place_of_the_base`, those of an adapter that take the place
        of the base's; `copied_as_a_base_lacks_it`, those of a full fine-tune that pre-training left out of one base.

    Raises:
        MismatchError: A tensor of the body is not in the bases, or has another shape there.
    """
    if adaptation.kind == "full":
        write_carried(adaptation, upgrade, graft_body(adaptation, upgrade, lambda _: graft), {}, into, progress)
        return notes_of(adaptation, upgrade, ())
    tensors, settings, replaced = grafted_adapter(adaptation, upgrade, replace=replace)
    write_carried(adaptation, upgrade, tensors, settings, into, progress)
    return notes_of(adaptation, upgrade, replaced)


def notes_of(adaptation: Adaptation, upgrade: Upgrade, replaced: Sequence[str]) -> dict[str, list[str]]:
    """Name the tensors that an outcome's notes name.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        replaced: The tensors of an adapter that were grafted in place of the base's.

    Returns:
        As `write_graft` does.
    """
    if adaptation.kind == "full":
        sides = upgrade.new.named, named(adaptation.checkpoint, config_of(adaptation)), upgrade.old.named
        left_out = list(counterparts(*sides).left_out)
    else:
        in_old, in_new = (
            {name for name in adaptation.checkpoint if replaced_parameter(name, base)}
            for base in (upgrade.old, upgrade.new)
        )
        left_out = sorted(in_old ^ in_new)
    notes = {"grafted_in_place_of_the_base": list(replaced), "copied_as_a_base_lacks_it": left_out}
    return {key: names for key, names in notes.items() if names}


def grafted_adapter(
    adaptation: Adaptation, upgrade: Upgrade, *, replace: bool = False
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Any], tuple[str, ...]]:
    """Make an adapter for the new base: the same change of whatever tensors it changes.

    Args:
        adaptation: Any but a full fine-tune.
        upgrade: The two bases.
        replace: Whether its tensors take the place of the new base's as they are stored.

    Returns:
        The tensors, the content of `adapter_config.json`, and the names of the grafted tensors, which stand in place of
        the base's.

    Raises:
        CheckpointError: Its start cannot be found again from the base alone.
        MismatchError: A tensor has another shape than the base's, or the new base lacks the old one's pooler.
    """
    _check_pooler(adaptation, upgrade)
    tensors, settings = plain_adapter(adaptation, upgrade.old)
    rows = tuned_rows(adaptation, upgrade)
    grafted, replaced = graft_replaced(adaptation, tensors, upgrade, rows, replace=replace)
    return grafted, renumbered_settings(adaptation, settings, rows), replaced


def write_carried(
    adaptation: Adaptation,
    upgrade: Upgrade,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    into: Path,
    progress: Progress,
) -> None:
    """Write what an adaptation became on the new base, with its settings, the tokenizer and whose base it is.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        tensors: For the new base, by stored name.
        settings: The content of an adapter's `adapter_config.json`; of a full fine-tune they follow from its own.
        into: The folder to fill, plain transformers or PEFT.
        progress: Told of each piece.
    """
    into.mkdir(parents=True, exist_ok=True)
    if adaptation.kind == "full":
        write_checkpoint(into, tensors, progress=lambda _, *rest: progress("graft", *rest))
        write_atomic(into / "config.json", json.dumps(_grafted_config(adaptation, upgrade), indent=2) + "\n")
    else:
        write_adapter(into, tensors, {**settings, "base_model_name_or_path": upgrade.new.name, "revision": None})
    rows = tuned_rows(adaptation, upgrade)
    if rows is not None and (adaptation.kind == "full" or rows.own):
        write_vocabulary(into, upgrade.new.path, adaptation.path, upgrade.old.path, rows)
    else:
        write_tokenizer(upgrade.new, into)
    write_lineage(into, upgrade.new, adaptation.labels)


def graft_body(
    adaptation: Adaptation,
    upgrade: Upgrade,
    rule_of: Callable[[str], Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]],
    *,
    elementwise: bool = True,
) -> Derived:
    """Put a full fine-tune onto the new base, tensor by tensor of the body; what no base has, as the head, is copied.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        rule_of: Gives, for a name inside the body, what makes a tensor from the new base's, the tuned and the old one.
        elementwise: Whether that gives the same on flat pieces of the tensors.

    Returns:
        The tensors, computed when they are asked for, in the fine-tune's dtypes and under the names its class writes.

    Raises:
        MismatchError: A tensor of the body is not in the bases, or has another shape there.
    """
    _check_body(adaptation, upgrade)
    old, new, tuned = upgrade.old.named, upgrade.new.named, named(adaptation.checkpoint, config_of(adaptation))
    pairs, rows = counterparts(new, tuned, old), tuned_rows(adaptation, upgrade)
    entries = {}
    for name, entry in tuned.entries.items():
        if name in pairs.new and rows is not None and name in tuned.by_token:
            operands = ((new, pairs.new[name]), (tuned, name), (old, pairs.old[name]))
            by_row = functools.partial(graft_rows, match=rows, rule=rule_of(tuned.keys_of[name]))
            entries[name] = Entry(entry.dtype, rows.shape(entry.shape), operands, by_row, elementwise=False)
        elif name in pairs.new:
            operands = ((new, pairs.new[name]), (tuned, name), (old, pairs.old[name]))
            entries[name] = Entry(entry.dtype, entry.shape, operands, rule_of(tuned.keys_of[name]), elementwise)
        else:  # the head, which is no difference between two bases but a thing of its own
            entries[name] = entry
    return Derived(entries)


def plain_adapter(adaptation: Adaptation, old: Base) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]:
    """Return an adapter's tensors and config such that they mean the same change on any base.

    Args:
        adaptation: Any but a full fine-tune.
        old: The base it was tuned on.

    Returns:
        Both as they are stored; of a LoRA that took its start out of its base, those of the plain LoRA.

    Raises:
        CheckpointError: Its start cannot be found again from the base alone.
    """
    if not adaptation.changed_base:
        return adaptation.checkpoint, adaptation.config
    check_start(adaptation)
    model = attach(fresh_model(old, stored_labels(adaptation, old), 0), old, read_config(adaptation), 0)
    return fold_start(adaptation.checkpoint, model.regraft_start, adaptation.config)


def check_fit(adaptation: Adaptation, upgrade: Upgrade, labels: Sequence[str]) -> Any:
    """Refuse an adaptation that does not fit its base or its task, before anything is written.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        labels: The label names, in the order of the head's outputs.

    Returns:
        The old deployment: the adaptation on the old base, as a model.

    Raises:
        CheckpointError: A tensor of the adaptation is missing or has no place in the model.
        MismatchError: The adaptation has other sizes than its base, or another number of labels.
    """
    if adaptation.kind == "full":
        _check_body(adaptation, upgrade)
    return load_model(adaptation, upgrade.old, labels)


def _check_pooler(adaptation: Adaptation, upgrade: Upgrade) -> None:
    """Refuse a new base that lacks a pooler which the adapter was tuned with and does not store."""
    old, new = upgrade.old, upgrade.new
    lost = [name for name in sorted(old.body.keys() - new.body.keys()) if is_optional(name)]
    lost = [name for name in lost if not any(stored.endswith(f".{name}") for stored in adaptation.checkpoint)]
    if lost and new.has_pooler:
        raise MismatchError(
            f"{new.path}: lacks {', '.join(lost)}, which {adaptation.path} was tuned with on {old.path}: pre-training "
            f"left it out. Add it to the new base: regraft weights graft --new {new.path} --tuned {old.path} --old "
            f"{old.path} --out FOLDER."
        )


def _check_body(adaptation: Adaptation, upgrade: Upgrade) -> None:
    for base in (upgrade.old, upgrade.new):
        check_body(adaptation, base)


def _grafted_config(adaptation: Adaptation, upgrade: Upgrade) -> dict[str, Any]:
    """Return what `config.json` says on the new base, whose settings it has wherever the tuning changed none."""
    tuned, old, new = config_of(adaptation).to_dict(), upgrade.old.config.to_dict(), upgrade.new.config.to_dict()
    same = tuned_rows(adaptation, upgrade) is None
    return adaptation.config | upgraded_settings(tuned, old, new, is_decoder=upgrade.old.is_decoder, has_same_ids=same)
