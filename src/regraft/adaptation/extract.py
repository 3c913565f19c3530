"""Extracting a LoRA in PEFT's format from a full fine-tune, without a model in memory."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation.layout import resolve_updates
from regraft.adaptation.lora import PARTS, PEFT_PREFIX
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
from regraft.weights import align, delta, delta_all, inner_product, kind_of, low_rank

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import torch

    from regraft.architecture import Architecture

    Tensors = Mapping[str, torch.Tensor]
    Factors = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class ExtractedLora:
    """A LoRA extracted from a full fine-tune.

    Args:
        tensors: The tensors of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.
        preserved: The share of the squared norm of all deltas that the LoRA preserves.
        excluded: The share that is in tensors which a LoRA cannot change.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    preserved: float
    excluded: float


@dataclasses.dataclass(frozen=True)
class _Budget:
    """The rank of each delta's approximation, or the share of its squared norm to preserve."""

    rank: int | None
    energy: float | None
    moments: Mapping[str, torch.Tensor]

    def factors(self, change: torch.Tensor, module: str = "") -> tuple[Factors, float]:
        """Return B and A of a delta [out, in] in float64, and the squared norm of the error; an expert's may be 0."""
        if not change.any():
            return (change.new_zeros(len(change), 1).float(), change.new_zeros(1, change.shape[1]).float()), 0.0
        b, a = low_rank(change, self.rank, self.energy, self.moments.get(module))
        b, a = b.float(), a.float()
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
    Changes of embeddings, norms and biases are left out, because a LoRA cannot represent them.

    Args:
        tuned: The full fine-tune.
        old: The base it was tuned on.
        rank: The rank of every layer. Either this or `energy` is required.
        energy: The share of each delta's squared norm to preserve, which determines its rank.
        progress: Called for each layer.
        moments: The second moments of the inputs by layer, which weight the errors; None for equal weights.
        heads: The names of tensors to store in full although the base has them; others that it lacks always are.
        architecture: The fine-tune's class, for the names in memory that PEFT uses; None to use the stored names, if
            transformers has no such class.

    Raises:
        CheckpointError: A checkpoint has infinite or NaN values.
        RecipeError: Both or neither of rank and energy are set.
        MismatchError: The two have no common tensors or differ in shapes, or PEFT cannot load such a LoRA.
    """
    if (rank is None) == (energy is None):
        raise RecipeError("set either a rank or the energy to preserve.")
    budget = _Budget(rank, energy, moments or {})
    stored = (tuned, old)
    if architecture is not None:
        tuned, old = (_parameters(checkpoint, architecture) for checkpoint in stored)
    deltas = delta_all(tuned, old)
    changed = [name for name in deltas if name not in heads]
    in_base = {name for name in align(old, tuned) if name not in heads}
    stored_in_full = [name for name in tuned if name not in in_base]
    linear = _linear_weights(tuned, deltas, changed, architecture)
    fused = [name for name in changed if architecture is not None and len(shape_of(deltas, name)) == 3]
    lora = _Lora(fan_in_fan_out=any(linear.values()))
    total = errors = excluded = 0.0  # squared norms
    for number, name in enumerate(changed, 1):
        squared_norm = _squared_norm(deltas, name)
        total += squared_norm
        if name not in linear and name not in fused:
            excluded += squared_norm
        elif squared_norm and name in linear:
            module = name.removesuffix(".weight")
            change = deltas[name].double()
            lora.layers[module], error = budget.factors(change.T if linear[name] else change, module)
            errors += error
        progress("extract", number, len(changed), {})
    if architecture is not None and any(_squared_norm(deltas, name) for name in fused):
        errors += _extract_experts(lora, deltas, fused, stored, architecture, budget)
    if not lora.layers and not lora.parameters:
        raise MismatchError("the fine-tune has changed no linear layer, so no LoRA can be extracted.")
    shared_modules = {name.split(".")[0] for name in in_base}
    modules = {
        name.rpartition(".")[0] if name.split(".")[0] in shared_modules else name.split(".")[0]
        for name in stored_in_full
    }
    tensors, config = lora.as_peft(sorted(modules))
    tensors |= {PEFT_PREFIX + name: tuned[name].contiguous() for name in stored_in_full}
    if architecture is not None:
        _check_loads(tensors, config, architecture)
    return ExtractedLora(tensors, config, (total - excluded - errors) / total, excluded / total)


def _check_loads(tensors: Tensors, config: Mapping[str, Any], architecture: Architecture) -> None:
    """Check that PEFT can load a LoRA on the class that it was extracted from."""
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
        base: The name of its base.
        tokenizer_folder: The folder to copy the tokenizer from.
        provenance: The inputs, as JSON, for `is_up_to_date`.

    Raises:
        OutcomeError: The output folder exists.
    """
    with resumable_folder(out, {}) as work:
        staging = empty_folder(work / "whole")
        write_safetensors(staging / "adapter_model.safetensors", lora.tensors)
        config = {**lora.config, "base_model_name_or_path": base}
        write_atomic(staging / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_auxiliary_files(tokenizer_folder, staging, TOKENIZER_FILES)
        write_record(staging, provenance)
        publish(staging, out)


@dataclasses.dataclass
class _Lora:
    """The factors of a LoRA by PEFT's names of modules and parameters.

    Args:
        fan_in_fan_out: Whether a layer stores its weight as [in, out].
        layers: B and A of each module.
        parameters: B and A of each expert of a fused parameter.
        num_outer_wrappers: The number of PEFT's wrappers around that of each parameter.
        shared_rank: The common rank of experts that are stored separately and fused in memory.
    """

    fan_in_fan_out: bool = False
    layers: dict[str, Factors] = dataclasses.field(default_factory=dict)
    parameters: dict[str, list[Factors]] = dataclasses.field(default_factory=dict)
    num_outer_wrappers: dict[str, int] = dataclasses.field(default_factory=dict)
    shared_rank: int | None = None

    def as_peft(self, modules_to_save: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors and the config in PEFT's format."""
        import torch
        from peft import __version__

        ranks = {module: len(a) for module, (_, a) in self.layers.items()}
        tensors: dict[str, torch.Tensor] = {}
        for module, (b, a) in self.layers.items():
            tensors |= {
                f"{PEFT_PREFIX}{module}{PARTS[0]}": a.contiguous(),
                f"{PEFT_PREFIX}{module}{PARTS[1]}": b.contiguous(),
            }
        for parameter, experts in self.parameters.items():
            ranks[parameter] = max(len(a) for _, a in experts)
            padded = [_padded(factors, ranks[parameter]) for factors in experts]
            path = PEFT_PREFIX + parameter.rpartition(".")[0] + ".base_layer" * self.num_outer_wrappers[parameter]
            tensors[path + PARTS[0]] = torch.cat([a for _, a in padded])
            tensors[path + PARTS[1]] = torch.stack([b for b, _ in padded], dim=2).flatten(1)
        rank = self.shared_rank or max(ranks.values())
        pattern = {name: r for name, r in ranks.items() if r != rank}
        config = {
            "peft_type": "LORA",
            "peft_version": __version__,
            "task_type": "SEQ_CLS" if {"classifier", "score"} & set(modules_to_save) else None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(self.layers),
            "modules_to_save": modules_to_save or None,
            "lora_dropout": 0.0,
            "fan_in_fan_out": self.fan_in_fan_out and not self.parameters,
            "bias": "none",
            "inference_mode": True,
        }
        return tensors, config | ({"target_parameters": sorted(self.parameters)} if self.parameters else {})


def _extract_experts(
    lora: _Lora,
    deltas: DerivedTensors,
    fused: list[str],
    stored: tuple[Tensors, Tensors],
    architecture: Architecture,
    budget: _Budget,
) -> float:
    """Add the factors of fused experts, named as separate experts if PEFT fuses those; return their squared error."""
    names = [name for parameter in fused for name in architecture.parts_of(parameter)]
    errors = 0.0
    if _can_peft_fuse(lora, names, architecture):
        tuned, old = stored
        tuned_names = {architecture.identify(name): name for name in tuned}
        old_names = {architecture.identify(name): name for name in old}
        factors = {}
        for name in names:
            change = delta(tuned[tuned_names[name]], old[old_names[name]]).double()
            factors[name.removesuffix(".weight")], error = budget.factors(change)
            errors += error
        lora.shared_rank = max(len(a) for _, a in factors.values())
        lora.layers |= {module: _padded(pair, lora.shared_rank) for module, pair in factors.items()}
        return errors
    changed = [name for name in fused if _squared_norm(deltas, name)]
    for parameter in changed:
        path, _, parameter_name = parameter.rpartition(".")
        module = architecture.model.get_submodule(path)
        order = [name for name, _ in module.named_parameters(recurse=False) if f"{path}.{name}" in changed]
        lora.num_outer_wrappers[parameter] = len(order) - 1 - order.index(parameter_name)
        transposed = bool(getattr(module, "is_transposed", False))
        experts = [budget.factors((expert.T if transposed else expert).double()) for expert in deltas[parameter]]
        lora.parameters[parameter] = [factors for factors, _ in experts]
        errors += sum(error for _, error in experts)
    return errors


def _padded(factors: Factors, rank: int) -> Factors:
    """Pad factors with zeros to a rank, which does not change their product."""
    b, a = factors
    padded_b, padded_a = b.new_zeros(len(b), rank), a.new_zeros(rank, a.shape[1])
    padded_b[:, : b.shape[1]], padded_a[: len(a)] = b, a
    return padded_b, padded_a


def _can_peft_fuse(lora: _Lora, names: list[str], architecture: Architecture) -> bool:
    """Return whether PEFT converts LoRAs of separate experts to one of fused experts, beside the other layers."""
    import torch

    candidate = _Lora(layers=dict(lora.layers), shared_rank=1)
    for name in names:
        shape = architecture.stored[name].shape
        if len(shape) != 2:
            return False
        factors = torch.empty(shape[0], 1, device="meta"), torch.empty(1, shape[1], device="meta")
        candidate.layers[name.removesuffix(".weight")] = factors
    tensors, config = candidate.as_peft([])
    try:
        _check_loads(tensors, config, architecture)
    except MismatchError:
        return False
    return True


def _linear_weights(
    tuned: Tensors, deltas: Tensors, changed: list[str], architecture: Architecture | None
) -> dict[str, bool]:
    """Return the names of the weights of linear layers, and whether each is stored as [in, out]."""
    matrices = [name for name in changed if len(shape_of(deltas, name)) == 2 and name.endswith(".weight")]
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
    """Return a delta's squared norm, computed in chunks if its operands can be read so; check that it is finite."""
    is_divisible = all(
        not isinstance(tensors, DerivedTensors) or tensors.specs[operand].elementwise
        for tensors, operand in deltas.specs[name].operands
    )
    size = math.prod(shape_of(deltas, name))
    ranges = chunk_ranges(size, CHUNK_ELEMENTS if is_divisible else max(size, 1))
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
    sizes = [
        (shape_of(tuned, name), shape_of(tuned, bias)[0])
        for name in linear
        if (bias := name.removesuffix("weight") + "bias") in tuned
    ]
    rectangular = [(shape, size) for shape, size in sizes if shape[0] != shape[1]]
    return bool(rectangular) and all(shape[1] == size for shape, size in rectangular)
