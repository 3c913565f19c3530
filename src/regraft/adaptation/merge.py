"""A LoRA merged into its base: from files to tensors, without a model."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import check_peft
from regraft.adaptation.layout import resolve_updates
from regraft.adaptation.lora import START, is_initialised_from_base
from regraft.adaptation.patterns import check_patterns
from regraft.adaptation.tuned_class import text_config_change, tuned_architecture, untied_by_setting
from regraft.adaptation.update import Update
from regraft.architecture import BUFFER
from regraft.checkpoint import DerivedTensors, TensorSpec, are_equal, output_dtype, read_json, shape_of
from regraft.errors import CheckpointError, MismatchError
from regraft.weights import is_optional

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from regraft.architecture import Architecture
    from regraft.checkpoint import Checkpoint

    Tensors = Mapping[str, torch.Tensor]

# settings with which a LoRA is not W + scaling · B · A of the base's own layers, and whether PEFT merges it
CANNOT_MERGE = {
    "alora_invocation_tokens": False, "arrow_config": False, "kasa_config": True, "layer_replication": True,
    "monteclora_config": True, "use_bdlora": True, "use_qalora": False, "velora_config": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MergedLora:
    """A LoRA merged into its base.

    Args:
        tensors: Those of the tuned model, computed when they are asked for, by the names it is saved under.
        config: What the base's `config.json` must say otherwise.
    """

    tensors: DerivedTensors
    config: dict[str, Any]


def merge_lora(
    adapter: Tensors,
    config: Mapping[str, Any],
    base: Checkpoint,
    start: Tensors | None = None,
    labels: Sequence[str] | None = None,
) -> MergedLora:
    """Merge a LoRA into its base, as PEFT does: W + scaling·B·A, or DoRA's renormalised weight; whole tensors replaced.

    Everything else of the base is kept. Tied tensors of which one side alone was tuned are two in the result.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.
        base: The base, a transformers folder with or without a head.
        start: The adapter as it was initialised, for kinds that take their start out of the base (PiSSA, OLoRA).
        labels: The names of a classifier's labels, where they are known.

    Returns:
        The merged model, in the base's dtypes; what is quantised there, in bfloat16.

    Raises:
        CheckpointError: A tensor of the adapter has no place in the model, or its start is needed and missing.
        MismatchError: The base lacks what the model needs, or has another shape there.
    """
    modules = {name.removeprefix(START).rpartition(".")[0] for name in (*base, *adapter)}
    check_patterns(config, modules, "the LoRA's adapter_config.json")
    _check_kind(config, start)
    architecture, changed = tuned_architecture(adapter, config, base, labels)
    stored = architecture.in_memory(base)
    adapter, updates = resolve_updates(adapter, config, architecture)
    if start is not None:
        _check_start(adapter, start, updates)
    sources, untied = _follow_ties(stored, adapter, updates, architecture)
    if untied and (freed := untied_by_setting(architecture)).issuperset(untied):
        changed |= text_config_change(base, architecture, changed, "tie_word_embeddings", False)
        untied = sorted(freed)  # the setting unties all of them
    absent, entries = [], {}
    for name, tensor in architecture.parameters.items():
        if name in architecture.ties and name not in untied:
            continue
        update = updates.get(name)
        if update is None and sources.get(name) not in stored:
            absent.append(name)
            continue
        entries[name] = _entry(stored, sources.get(name), adapter, update, start)
        if entries[name].shape != tuple(tensor.shape):
            raise MismatchError(
                f"{base.path}: tensor {name!r} is {entries[name].shape}, and the model that the LoRA was tuned in has "
                f"room for {tuple(tensor.shape)}. If tokens were added, the LoRA must hold all rows of both the "
                "embeddings and the head: save it again where it was tuned, with save_embedding_layers=True, or merge "
                "it there (merge_and_unload)."
            )
    _check_whole(absent, architecture, base)
    merged = architecture.saved(DerivedTensors(entries))
    beside = {
        name: TensorSpec(output_dtype(base, name), shape_of(base, name), ((base, name),))
        for name in base
        if architecture.identify(name) is None and not BUFFER.search(name)
    }
    merged.specs.update(beside)
    return MergedLora(merged, changed)


def lora_settings(folder: Path) -> dict[str, Any]:
    """Read how a LoRA was set up.

    Args:
        folder: A PEFT folder.

    Returns:
        The content of its `adapter_config.json`.

    Raises:
        CheckpointError: It is no LoRA.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: holds no {file.name}, so it is no adapter, which is what can be merged.")
    config = read_json(file)
    check_peft(folder, config)
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(f"{file}: is of type {peft_type}; only LORA can be merged.")
    return config


def _check_kind(config: Mapping[str, Any], start: Tensors | None) -> None:
    special = [key for key in CANNOT_MERGE if config.get(key)]
    if special:
        remedy = (
            "Merge it with PEFT: merge_and_unload, then save_pretrained."
            if all(CANNOT_MERGE[key] for key in special)
            else "PEFT merges no such adapter either: serve it beside its base."
        )
        raise CheckpointError(
            f"the LoRA was set up with {', '.join(special)}, and is more than a change of its base's weights that can "
            f"be merged here. {remedy}"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if start is None and is_initialised_from_base(init):
        raise CheckpointError(
            f"the LoRA was initialised by {init!r}, which took its start out of its base: give the adapter as it was "
            "before the first step (--start)."
        )


def _follow_ties(
    stored: Tensors, adapter: Tensors, updates: dict[str, Update], architecture: Architecture
) -> tuple[dict[str, str], list[str]]:
    """Have tied parameters share what takes the place of one of them.

    Returns:
        The stored tensor of each parameter, and the parameters that are no longer equal to what they are tied to.
    """
    sources = {name: name for name in stored}
    untied = []
    for tied, source in architecture.ties.items():
        if tied in stored and source in stored and not are_equal(stored, tied, stored, source):
            untied.append(tied)  # transformers ties no two tensors that differ in the checkpoint
            continue
        sources.setdefault(tied, sources.get(source, tied))
        for ours, theirs in ((tied, source), (source, tied)):
            weight = updates[theirs].weight if theirs in updates else None
            if weight and not (ours in updates and updates[ours].weight):
                updates[ours] = dataclasses.replace(updates.get(ours) or Update(), weight=weight)
        if not _alike(adapter, updates.get(tied), updates.get(source)):
            untied.append(tied)
    return sources, untied


def _check_whole(absent: Sequence[str], architecture: Architecture, base: Checkpoint) -> None:
    start = f"{architecture.prefix}."
    classifies = "Classification" in type(architecture.model).__name__
    computed = architecture.model._keys_to_ignore_on_save or ()  # as Marian's positions, which no file holds
    lost = [n for n in absent if n not in computed and (classifies or not is_optional(n.removeprefix(start)))]
    if lost:
        raise MismatchError(
            f"{len(lost)} tensors of the {type(architecture.model).__name__} that was tuned are neither in {base.path} "
            f"nor in the LoRA, and would be drawn at random: {', '.join(lost[:4])}. Give the base that it was tuned "
            "on; if these were drawn before tuning, they had to be saved with it (modules_to_save)."
        )


def _check_start(adapter: Tensors, start: Tensors, updates: Mapping[str, Update]) -> None:
    for update in updates.values():
        if not update.accepts_start(start):
            raise CheckpointError(
                f"the LoRA's start does not go with it: {(update.operands or ('a tensor',))[0]!r} differs."
            )


def _entry(
    stored: Tensors, source: str | None, adapter: Tensors, update: Update | None, start: Tensors | None
) -> TensorSpec:
    """Return how one parameter is made."""
    if update is not None and update.copied:
        weight: tuple[Tensors, str] = (adapter, update.copied)
    elif source in stored:
        weight = (stored, str(source))
    else:
        raise MismatchError(f"the LoRA changes a tensor that the base lacks, by {(update and update.operands)!r:.200}.")
    dtype, shape = output_dtype(*weight), shape_of(*weight)
    if update is None or not update.applied:
        return TensorSpec(dtype, shape, (weight,))
    operands = (weight, *((adapter, name) for name in update.applied))
    if start is not None:
        operands += tuple((start, name) for name in update.applied)
    rule = functools.partial(update.apply, is_folded=start is not None)
    if source is not None and source in stored:
        dtype = output_dtype(stored, source)
    return TensorSpec(dtype, shape, operands, rule, elementwise=False)


def _alike(adapter: Tensors, first: Update | None, second: Update | None) -> bool:
    """Return whether two parameters that are tied in the base are still the same once they are updated."""
    if first is None or second is None:
        return first is second
    if type(first) is not type(second) or (first.scale, first.rows) != (second.scale, second.rows):
        return False
    pairs = [(first.weight, second.weight), *zip(first.operands, second.operands, strict=False)]
    if len(first.operands) != len(second.operands):
        return False
    if first.transposed == second.transposed:
        return all(a == b or (a and b and are_equal(adapter, a, adapter, b)) for a, b in pairs)
    (b, a), (other_b, other_a) = first.operands[:2], second.operands[:2]
    same_weight = first.weight == second.weight or (
        first.weight and second.weight and are_equal(adapter, first.weight, adapter, second.weight)
    )
    return (
        bool(same_weight)
        and len(first.operands) == 2  # a DoRA's lengths are of rows in one and of columns in the other
        and adapter[b].T.equal(adapter[other_a])
        and adapter[a].T.equal(adapter[other_b])
    )
