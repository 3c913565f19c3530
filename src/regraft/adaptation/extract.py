"""Extraction of a LoRA in PEFT's format from the tensors of a full fine-tune."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from regraft.adaptation.layout import resolve_updates
from regraft.adaptation.lora import PEFT_PREFIX
from regraft.adaptation.lora_factors import LoraFactors, pad_factors
from regraft.checkpoint import (
    TOKENIZER_FILES,
    DerivedTensors,
    chunk_ranges,
    copy_auxiliary_files,
    empty_folder,
    flat_slice,
    publish,
    resumable_folder,
    shape_of,
    write_atomic,
    write_record,
    write_safetensors,
)
from regraft.checkpoint.derived import CHUNK_ELEMENTS
from regraft.errors import CheckpointError, MismatchError, RecipeError
from regraft.progress import Progress, silent
from regraft.task.types import task_types
from regraft.weights import align, delta, delta_all, inner_product, kind_of, low_rank

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import torch

    from regraft.architecture import Architecture
    from regraft.checkpoint.derived import Tensors

    Factors = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class ExtractedLora:
    """A LoRA extracted from a full fine-tune.

    Args:
        tensors: The tensors of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.
        preserved: The share of the squared norm of all deltas that the LoRA preserves, from 0 to 1. Tensors that are
            stored in full do not count, here and in `excluded`.
        excluded: The share of the squared norm of all deltas that is in tensors for which the LoRA has no factors.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    preserved: float
    excluded: float


@dataclasses.dataclass(frozen=True)
class _Approximation:
    """The criterion by which deltas are approximated: a rank, or the share of the squared norm to preserve.

    `moments` are the second moments of the inputs by linear layer, which weight the errors.
    """

    rank: int | None
    energy: float | None
    moments: Mapping[str, torch.Tensor]

    def factors(self, change: torch.Tensor, module: str = "") -> tuple[Factors, float]:
        """Approximate a delta [out, in] in float64 by B and A in float32, and return them with the squared error."""
        if not change.any():  # a single expert may be unchanged; PEFT requires a rank of at least 1
            return (change.new_zeros(len(change), 1).float(), change.new_zeros(1, change.shape[1]).float()), 0.0
        b, a = low_rank(change, self.rank, self.energy, self.moments.get(module))
        b, a = b.float(), a.float()  # as they are stored, so that the error includes rounding
        cross_term = ((b.double().T @ change) * a.double()).sum()
        return (b, a), float(change.square().sum() - 2 * cross_term) + inner_product((b, a), (b, a))


def extract_lora(
    tuned: Tensors,
    old: Tensors,
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress = silent,
    moments: Mapping[str, torch.Tensor] | None = None,
    heads: Collection[str] = (),
    architecture: Architecture | None = None,
) -> ExtractedLora:
    """Extract a LoRA from a full fine-tune: the best low-rank approximation of each linear layer's delta.

    Fused experts get a common rank, which PEFT requires: the largest that any of them needs. Heads are stored in full.
    Changes of embeddings, norms and biases are left out: the LoRA has factors for linear layers and experts only.

    Args:
        tuned: The tensors of the full fine-tune.
        old: The tensors of the base it was tuned on.
        rank: The rank of every layer. Either this or `energy` is required.
        energy: The share of each delta's squared norm to preserve, which determines its rank.
        progress: Called for each tensor that both models have, apart from `heads`.
        moments: The second moments of the inputs by linear layer, which weight the errors; None for equal weights. The
            errors of fused experts always have equal weights.
        heads: The names of tensors to store in full although the base has them. Tensors that the base lacks are always
            stored in full.
        architecture: The fine-tune's class, for the names in memory that PEFT uses; None to use the stored names, if
            transformers has no such class.

    Raises:
        CheckpointError: A checkpoint has infinite or NaN values.
        RecipeError: Both or neither of rank and energy are set, or one is out of range.
        MismatchError: `tuned` and `old` have no common tensors, differ in shapes, or differ in no linear layer, or PEFT
            cannot load such a LoRA.
    """
    if (rank is None) == (energy is None):
        raise RecipeError("set either a rank or the energy to preserve.")
    approximation = _Approximation(rank, energy, moments or {})
    stored = (tuned, old)
    if architecture is not None:
        tuned, old = (_parameters(checkpoint, architecture) for checkpoint in stored)
    deltas = delta_all(tuned, old)
    compared = [name for name in deltas if name not in heads]
    in_base = {name for name in align(old, tuned) if name not in heads}
    stored_in_full = [name for name in tuned if name not in in_base]
    linear = _linear_weights(tuned, deltas, compared, architecture)
    fused = [name for name in compared if architecture is not None and len(shape_of(deltas, name)) == 3]
    lora = LoraFactors(fan_in_fan_out=any(linear.values()))
    total = errors = excluded = 0.0  # squared norms
    for count, name in enumerate(compared, 1):
        squared_norm = _squared_norm(deltas, name)
        total += squared_norm
        if name not in linear and name not in fused:
            excluded += squared_norm
        elif squared_norm and name in linear:
            module = name.removesuffix(".weight")
            change = deltas[name].double()
            lora.layers[module], error = approximation.factors(change.T if linear[name] else change, module)
            errors += error
        progress("extract", count, len(compared), {})
    if architecture is not None and any(_squared_norm(deltas, name) for name in fused):
        errors += _extract_experts(lora, deltas, fused, stored, architecture, approximation)
    if not lora.layers and not lora.parameters:
        raise MismatchError("the fine-tune changed no linear layer, so no LoRA can be extracted. Keep the fine-tune.")
    tensors, config = lora.to_peft(_modules_to_save(stored_in_full, in_base))
    tensors |= {PEFT_PREFIX + name: tuned[name].contiguous() for name in stored_in_full}
    if architecture is not None:
        for task_type in task_types().values():  # heads of different types may have the same names of tensors
            if type(architecture.model).__name__.endswith(task_type.auto_class.removeprefix("AutoModel")):
                config["task_type"] = task_type.peft_task_type
        _check_loads(tensors, config, architecture)
    return ExtractedLora(tensors, config, (total - excluded - errors) / total, excluded / total)


def _modules_to_save(stored_in_full: Collection[str], in_base: Collection[str]) -> list[str]:
    """Return the modules of tensors that are stored in full: top-level ones, unless the base has a part of them."""
    shared = {name.split(".")[0] for name in in_base}
    modules = set()
    for name in stored_in_full:
        top_level = name.split(".")[0]
        modules.add(name.rpartition(".")[0] if top_level in shared else top_level)
    return sorted(modules)


def _check_loads(tensors: Tensors, config: Mapping[str, Any], architecture: Architecture) -> None:
    """Check that PEFT can load a LoRA on the class that it was extracted from, or raise a MismatchError."""
    try:
        resolve_updates({name: tensor.to("meta") for name, tensor in tensors.items()}, config, architecture)
    except (CheckpointError, MismatchError) as error:
        raise MismatchError(
            f"PEFT cannot load a LoRA of this {type(architecture.model).__name__}: {error} Keep the full fine-tune, or "
            "use its delta (regraft weights delta)."
        ) from error


def write_lora(
    lora: ExtractedLora, out: Path, base: str, tokenizer_folder: Path, provenance: Mapping[str, Any]
) -> None:
    """Write a LoRA in PEFT's format.

    Args:
        lora: The result of `extract_lora`.
        out: The output folder, which never exists incomplete.
        base: The name of the LoRA's base, for `base_model_name_or_path`.
        tokenizer_folder: The folder to copy the tokenizer from.
        provenance: The inputs, as JSON, for `is_up_to_date`.

    Raises:
        OutcomeError: The output folder exists.
    """
    with resumable_folder(out, {}) as work_folder:
        staging = empty_folder(work_folder / "whole")
        write_safetensors(staging / ADAPTER_WEIGHTS, lora.tensors)
        config = {**lora.config, "base_model_name_or_path": base}
        write_atomic(staging / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_auxiliary_files(tokenizer_folder, staging, TOKENIZER_FILES)
        write_record(staging, provenance)
        publish(staging, out)


def _extract_experts(
    lora: LoraFactors,
    deltas: DerivedTensors,
    fused: list[str],
    stored: tuple[Tensors, Tensors],
    architecture: Architecture,
    approximation: _Approximation,
) -> float:
    """Add the factors of fused experts to a LoRA, as separate experts if PEFT can fuse those.

    Returns:
        The squared error of the factors.
    """
    names = [name for parameter in fused for name in architecture.parts_of(parameter)]
    errors = 0.0
    if _can_peft_fuse(lora, names, architecture):
        tuned, old = stored
        tuned_names = {architecture.identify(name): name for name in tuned}
        old_names = {architecture.identify(name): name for name in old}
        factors = {}
        for name in names:
            change = delta(tuned[tuned_names[name]], old[old_names[name]]).double()
            factors[name.removesuffix(".weight")], error = approximation.factors(change)
            errors += error
        lora.shared_rank = max(len(a) for _, a in factors.values())
        lora.layers |= {module: pad_factors(pair, lora.shared_rank) for module, pair in factors.items()}
        return errors
    changed = [name for name in fused if _squared_norm(deltas, name)]
    for parameter in changed:
        path, _, parameter_name = parameter.rpartition(".")
        module = architecture.model.get_submodule(path)
        order = [name for name, _ in module.named_parameters(recurse=False) if f"{path}.{name}" in changed]
        lora.num_outer_wrappers[parameter] = len(order) - 1 - order.index(parameter_name)
        transposed = bool(getattr(module, "is_transposed", False))
        experts = [approximation.factors((expert.T if transposed else expert).double()) for expert in deltas[parameter]]
        lora.parameters[parameter] = [factors for factors, _ in experts]
        errors += sum(error for _, error in experts)
    return errors


def _can_peft_fuse(lora: LoraFactors, names: list[str], architecture: Architecture) -> bool:
    """Return whether PEFT converts LoRAs of separate experts to one of fused experts, beside the other layers."""
    import torch

    candidate = LoraFactors(layers=dict(lora.layers), shared_rank=1)
    for name in names:
        shape = architecture.stored[name].shape
        if len(shape) != 2:
            return False
        factors = torch.empty(shape[0], 1, device="meta"), torch.empty(1, shape[1], device="meta")
        candidate.layers[name.removesuffix(".weight")] = factors
    tensors, config = candidate.to_peft([])
    try:
        _check_loads(tensors, config, architecture)
    except MismatchError:
        return False
    return True


def _linear_weights(
    tuned: Tensors, deltas: Tensors, compared: list[str], architecture: Architecture | None
) -> dict[str, bool]:
    """Return the names of the compared weights of linear layers, and whether each is stored as [in, out]."""
    matrices = [name for name in compared if len(shape_of(deltas, name)) == 2 and name.endswith(".weight")]
    if architecture is None:
        linear = [name for name in matrices if kind_of(name) != "embedding"]
        return dict.fromkeys(linear, _are_transposed(tuned, linear))
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = {name: architecture.model.get_submodule(name.removesuffix(".weight")) for name in matrices}
    return {
        name: isinstance(module, Conv1D) for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)
    }


def _parameters(checkpoint: Tensors, architecture: Architecture) -> DerivedTensors:
    """Return the class's parameters of a checkpoint, without tied duplicates."""
    parameters = architecture.in_memory(checkpoint)
    return DerivedTensors({name: entry for name, entry in parameters.specs.items() if name not in architecture.ties})


def _squared_norm(deltas: DerivedTensors, name: str) -> float:
    """Return a delta's squared norm, computed in chunks if its operands can be read in slices.

    Raises:
        CheckpointError: The delta has infinite or NaN values.
    """
    is_divisible = all(
        not isinstance(tensors, DerivedTensors) or tensors.specs[operand].elementwise
        for tensors, operand in deltas.specs[name].operands
    )
    num_elements = math.prod(shape_of(deltas, name))
    ranges = chunk_ranges(num_elements, CHUNK_ELEMENTS if is_divisible else max(num_elements, 1))
    chunks = (flat_slice(deltas, name, start, count) for start, count in ranges)
    squared_norm = math.fsum(float(chunk.double().square().sum()) for chunk in chunks)
    if not math.isfinite(squared_norm):
        raise CheckpointError(
            f"tensor {name!r}: the delta has infinite or NaN values (regraft weights inspect --check-finite counts "
            "them). Use a checkpoint from before the training diverged."
        )
    return squared_norm


def _are_transposed(tuned: Tensors, linear: list[str]) -> bool:
    """Infer from the sizes of biases whether layers store their weights as [in, out], like GPT-2."""
    evidence = []  # square weights tell nothing
    for name in linear:
        num_rows, num_columns = shape_of(tuned, name)
        bias = name.removesuffix("weight") + "bias"
        if bias in tuned and num_rows != num_columns:
            evidence.append(shape_of(tuned, bias)[0] == num_columns)
    return bool(evidence) and all(evidence)
