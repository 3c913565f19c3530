"""Merging a LoRA into its base, from files to files, without a model in memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, check_peft
from regraft.adaptation.layout import resolve_updates
from regraft.adaptation.lora import CONVERT_REMEDY, PEFT_PREFIX, is_initialised_from_base
from regraft.adaptation.patterns import check_patterns
from regraft.adaptation.tuned_class import text_config_change, tuned_architecture, untied_by_setting
from regraft.adaptation.update import Update
from regraft.architecture import BUFFER
from regraft.checkpoint import DerivedTensors, TensorSpec, are_equal, output_dtype, read_json, shape_of
from regraft.errors import MAX_LISTED, CheckpointError, MismatchError
from regraft.weights import is_optional

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from regraft.architecture import Architecture
    from regraft.checkpoint import Checkpoint
    from regraft.checkpoint.derived import Tensors

UNMERGEABLE_SETTINGS = {
    "alora_invocation_tokens": False,
    "arrow_config": False,
    "kasa_config": True,
    "layer_replication": True,
    "monteclora_config": True,
    "use_bdlora": True,
    "use_qalora": False,
    "velora_config": True,
}
"""Settings with which a LoRA is not W + scaling·B·A for layers of the base, and whether PEFT merges it."""


@dataclasses.dataclass(frozen=True)
class MergedLora:
    """A LoRA merged into its base.

    Args:
        tensors: The tensors of the merged model by canonical name, which are computed when they are read.
        config: The settings of the base's `config.json` that change.
    """

    tensors: DerivedTensors
    config: dict[str, Any]


def merge_lora(
    adapter: Tensors,
    config: Mapping[str, Any],
    base: Checkpoint,
    initial_factors: Tensors | None = None,
    output_names: Sequence[str] | None = None,
) -> MergedLora:
    """Merge a LoRA into its base, as PEFT does: W + scaling·B·A, or a DoRA's renormalised weight, and replaced tensors.

    All other tensors of the base are kept. Tied tensors of which only one was tuned are untied in the result.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.
        base: The base, a transformers folder with or without a head.
        initial_factors: The initial adapter, for kinds that are initialised from the base (PiSSA, OLoRA).
        output_names: The names of a classifier's outputs, if they are known.

    Returns:
        The merged model, in the base's dtypes (bfloat16 for quantised ones).

    Raises:
        CheckpointError: A setting is invalid or not supported, a tensor of the adapter is missing or unexpected, or the
            initial adapter is needed or does not have the adapter's factors.
        MismatchError: The base lacks tensors of the model, or a tensor has a different shape than in the model.
    """
    modules = {name.removeprefix(PEFT_PREFIX).rpartition(".")[0] for name in (*base, *adapter)}
    check_patterns(config, modules, "the LoRA's adapter_config.json")
    _check_kind(config, initial_factors)
    architecture, changed = tuned_architecture(adapter, config, base, output_names)
    stored = architecture.in_memory(base)
    adapter, updates = resolve_updates(adapter, config, architecture)
    if initial_factors is not None:
        _check_initial_factors(initial_factors, updates)
    sources, untied = _follow_ties(stored, adapter, updates, architecture)
    if untied and (tied_by_setting := untied_by_setting(architecture)).issuperset(untied):
        changed |= text_config_change(base, architecture, changed, "tie_word_embeddings", False)
        untied = sorted(tied_by_setting)  # the setting unties all of them
    absent = []
    entries = {}
    for name, tensor in architecture.parameters.items():
        if name in architecture.ties and name not in untied:
            continue
        update = updates.get(name)
        if update is None and sources.get(name) not in stored:
            absent.append(name)
            continue
        entries[name] = _merged_spec(stored, sources.get(name), adapter, update, initial_factors)
        if entries[name].shape != tuple(tensor.shape):
            raise MismatchError(
                f"{base.path}: tensor {name!r} is {entries[name].shape}, expected {tuple(tensor.shape)} as in the "
                "model that the LoRA was tuned in. If tokens were added, the LoRA must store the embeddings and the "
                "head: save it again with save_embedding_layers=True, or merge it with PEFT (merge_and_unload)."
            )
    _check_complete(absent, architecture, base)
    merged = architecture.saved_tensors(DerivedTensors(entries))
    unknown_tensors = {
        name: TensorSpec(output_dtype(base, name), shape_of(base, name), ((base, name),))
        for name in base
        if architecture.identify(name) is None and not BUFFER.search(name)
    }
    merged.specs.update(unknown_tensors)
    return MergedLora(merged, changed)


def read_lora_config(folder: Path) -> dict[str, Any]:
    """Return the content of a LoRA's `adapter_config.json`.

    Args:
        folder: A PEFT folder.

    Raises:
        CheckpointError: The folder has no adapter, or its adapter is not a LoRA of PEFT.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no {file.name}, so it is not an adapter. Use the folder of a LoRA.")
    config = read_json(file)
    check_peft(folder, config)
    if config["peft_type"] != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {config['peft_type']}; only LORA can be merged. For another type, {CONVERT_REMEDY}."
        )
    return config


def _check_kind(config: Mapping[str, Any], initial_factors: Tensors | None) -> None:
    special = [key for key in UNMERGEABLE_SETTINGS if config.get(key)]
    if special:
        remedy = (
            "Merge it with PEFT: merge_and_unload, then save_pretrained."
            if all(UNMERGEABLE_SETTINGS[key] for key in special)
            else "PEFT does not merge it either: serve it as an adapter."
        )
        raise CheckpointError(
            f"the LoRA has the settings {', '.join(special)}, with which regraft cannot merge it. {remedy}"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if initial_factors is None and is_initialised_from_base(init):
        raise CheckpointError(
            f"the LoRA was initialised by {init!r} from its base: give the adapter as it was before the first step "
            "(--start)."
        )


def _follow_ties(
    stored: Tensors, adapter: Tensors, updates: dict[str, Update], architecture: Architecture
) -> tuple[dict[str, str], list[str]]:
    """Apply the replacement of a tied parameter to the other one too.

    Returns:
        The stored tensor of each parameter, and the parameters that are no longer equal to those they are tied to.
    """
    sources = {name: name for name in stored}
    untied = []
    for tied, source in architecture.ties.items():
        if tied in stored and source in stored and not are_equal(stored, tied, stored, source):
            untied.append(tied)  # transformers does not tie tensors that differ in the checkpoint
            continue
        sources.setdefault(tied, sources.get(source, tied))
        for parameter, partner in ((tied, source), (source, tied)):
            weight = updates[partner].weight if partner in updates else None
            if weight and not (parameter in updates and updates[parameter].weight):
                updates[parameter] = dataclasses.replace(updates.get(parameter) or Update(), weight=weight)
        if not _have_equal_results(adapter, updates.get(tied), updates.get(source)):
            untied.append(tied)
    return sources, untied


def _check_complete(absent: Sequence[str], architecture: Architecture, base: Checkpoint) -> None:
    prefix = f"{architecture.prefix}."
    is_classifier = "Classification" in type(architecture.model).__name__
    computed = architecture.model._keys_to_ignore_on_save or ()  # such as Marian's positions, which are not saved
    missing = [
        name
        for name in absent
        if name not in computed and (is_classifier or not is_optional(name.removeprefix(prefix)))
    ]
    if missing:
        raise MismatchError(
            f"{len(missing)} tensors of the tuned {type(architecture.model).__name__} are neither in {base.path} nor "
            f"in the LoRA: {', '.join(missing[:MAX_LISTED])}. Use the base that it was tuned on. If they were "
            "initialised before tuning, the LoRA should have saved them (modules_to_save)."
        )


def _check_initial_factors(initial_factors: Tensors, updates: Mapping[str, Update]) -> None:
    for update in updates.values():
        if not update.accepts_initial_factors(initial_factors):
            raise CheckpointError(
                f"the initial value of {update.operands[0]!r} cannot be subtracted: it is not B of a plain LoRA, "
                f"or the initial adapter lacks B or A. Use the LoRA's own initial adapter, or {CONVERT_REMEDY}."
            )


def _merged_spec(
    stored: Tensors, source: str | None, adapter: Tensors, update: Update | None, initial_factors: Tensors | None
) -> TensorSpec:
    """Return the specification of a merged parameter.

    Raises:
        MismatchError: The base lacks a parameter that the LoRA updates but does not replace.
    """
    if update is not None and update.copied_tensor:
        weight: tuple[Tensors, str] = (adapter, update.copied_tensor)
    elif source in stored:
        weight = (stored, str(source))
    else:
        assert update is not None  # otherwise the parameter is absent
        raise MismatchError(
            f"the LoRA changes a tensor that the base lacks, with {', '.join(update.operands)}. Use the base that it "
            "was tuned on."
        )
    dtype = output_dtype(*weight)
    shape = shape_of(*weight)
    if update is None or not update.applied_tensors:
        return TensorSpec(dtype, shape, (weight,))
    operands = (weight, *((adapter, name) for name in update.applied_tensors))
    if initial_factors is not None:
        operands += tuple((initial_factors, name) for name in update.applied_tensors)
    rule = functools.partial(update.apply, subtract_initial=initial_factors is not None)
    if source is not None and source in stored:
        dtype = output_dtype(stored, source)
    return TensorSpec(dtype, shape, operands, rule, elementwise=False)


def _have_equal_results(adapter: Tensors, first: Update | None, second: Update | None) -> bool:
    """Return whether two parameters that are tied in the base are still equal after their updates."""
    if first is None or second is None:
        return first is second
    if type(first) is not type(second) or (first.scale, first.rows) != (second.scale, second.rows):
        return False
    pairs = [(first.weight, second.weight), *zip(first.operands, second.operands, strict=False)]
    if len(first.operands) != len(second.operands):
        return False
    if first.transposed == second.transposed:
        return all(a == b or (a and b and are_equal(adapter, a, adapter, b)) for a, b in pairs)
    (first_b, first_a), (second_b, second_a) = first.operands[:2], second.operands[:2]
    has_same_weight = first.weight == second.weight or (
        first.weight and second.weight and are_equal(adapter, first.weight, adapter, second.weight)
    )
    return (
        bool(has_same_weight)
        and len(first.operands) == 2  # a DoRA scales the rows of one and the columns of the other
        and adapter[first_b].T.equal(adapter[second_a])
        and adapter[first_a].T.equal(adapter[second_b])
    )
