"""A LoRA drawn out of a full fine-tune, in PEFT's format, without a model."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

from regraft.adaptation.layout import resolve_updates
from regraft.adaptation.lora import PARTS, START
from regraft.checkpoint import (
    TOKENIZER_FILES,
    DerivedTensors,
    copy_auxiliary_files,
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
    """A LoRA drawn out of a full fine-tune.

    Args:
        tensors: Those of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.
        kept: The share of the squared norm of all deltas that is in it.
        left_out: The share that is in tensors for which a LoRA has no place.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    kept: float
    left_out: float


@dataclasses.dataclass(frozen=True)
class _Budget:
    """How much of each delta is kept: a rank, or a share of the squared norm."""

    rank: int | None
    energy: float | None
    moments: Mapping[str, torch.Tensor]

    def factors(self, change: torch.Tensor, module: str = "") -> tuple[Factors, float]:
        """Return B and A of a delta [out, in] in float64, and the squared norm of what they leave of it."""
        b, a = low_rank(change, self.rank, self.energy, self.moments.get(module))
        b, a = b.float(), a.float()
        crossed = ((b.double().T @ change) * a.double()).sum()
        return (b, a), float(change.square().sum() - 2 * crossed) + inner_product((b, a), (b, a))


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
    """Draw a LoRA out of a full fine-tune: the best low-rank approximation of each linear layer's delta.

    Experts that are one parameter in memory get one rank, as PEFT needs it: the largest that any of them takes. Heads
    are kept whole; changes of embeddings, norms and biases have no place in a LoRA and are left out.

    Args:
        tuned: The full fine-tune.
        old: The base it was tuned on.
        rank: The rank of every layer; or
        energy: the share of each delta's squared norm to keep, which fixes its rank.
        progress: Told of each layer.
        moments: By layer, the second moments of its inputs, that weigh its delta; None to weigh all alike.
        heads: Tensors that are kept whole though the base has them too; those that it lacks are in any case.
        architecture: The fine-tune's class, by whose names in memory PEFT finds layers; None if transformers has none:
            then the stored names are taken for these.

    Returns:
        The LoRA.

    Raises:
        CheckpointError: One of the two holds values that are infinite or not a number.
        RecipeError: Not one of rank and energy is given.
        MismatchError: The two have nothing in common, or differ in shapes, or PEFT cannot load such a LoRA.
    """
    if (rank is None) == (energy is None):
        raise RecipeError("give either a rank or the energy to keep.")
    budget = _Budget(rank, energy, moments or {})
    stored = (tuned, old)
    if architecture is not None:
        tuned, old = (_in_memory(side, architecture) for side in stored)
    deltas = delta_all(tuned, old)
    changed = [name for name in deltas if name not in heads]
    shared = {name for name in align(old, tuned) if name not in heads}
    fresh = [name for name in tuned if name not in shared]
    linear = _linear(tuned, deltas, changed, architecture)
    fused = [n for n in changed if architecture is not None and len(shape_of(deltas, n)) == 3]
    lora = _Lora(fan_in_fan_out=any(linear.values()))
    total = lost = left_out = 0.0
    for done, name in enumerate(changed, 1):
        norm = _square(deltas, name)
        total += norm
        if name not in linear and name not in fused:
            left_out += norm
        elif norm and name in linear:
            module, change = name.removesuffix(".weight"), deltas[name].double()
            lora.layers[module], error = budget.factors(change.T if linear[name] else change, module)
            lost += error
        progress("extract", done, len(changed), {})
    if architecture is not None and any(_square(deltas, name) for name in fused):
        lost += _extract_experts(lora, deltas, fused, stored, architecture, budget)
    if not lora.layers and not lora.parameters:
        raise MismatchError("the fine-tune has changed no linear layer: there is nothing to draw a LoRA from.")
    tops = {name.split(".")[0] for name in shared}
    modules = sorted({n.rpartition(".")[0] if n.split(".")[0] in tops else n.split(".")[0] for n in fresh})
    tensors, config = lora.as_peft(modules)
    tensors |= {START + name: tuned[name].contiguous() for name in fresh}
    if architecture is not None:
        _check_loads(tensors, config, architecture)
    return ExtractedLora(tensors, config, (total - left_out - lost) / total, left_out / total)


def _check_loads(tensors: Tensors, config: Mapping[str, Any], architecture: Architecture) -> None:
    """Refuse a LoRA that PEFT could not load on the class that it is drawn out of."""
    try:
        resolve_updates({name: tensor.to("meta") for name, tensor in tensors.items()}, config, architecture)
    except (CheckpointError, MismatchError) as error:
        raise MismatchError(
            f"a LoRA of this {type(architecture.model).__name__} is nothing that PEFT loads: {error} Keep the full "
            "fine-tune, or carry its delta (regraft weights delta)."
        ) from error


def write_lora(lora: ExtractedLora, out: Path, base: str, tokenizer_of: Path, provenance: Mapping[str, Any]) -> None:
    """Write a LoRA as PEFT does.

    Args:
        lora: From `extract_lora`.
        out: The folder to be; seen whole or not at all.
        base: What its base is called.
        tokenizer_of: Whose tokenizer files are copied.
        provenance: What it is made from, as JSON, for `is_up_to_date`.

    Raises:
        OutcomeError: Something is at `out`.
    """
    with resumable_folder(out, {}) as work:
        staging = work / "whole"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write_safetensors(staging / "adapter_model.safetensors", lora.tensors)
        config = {**lora.config, "base_model_name_or_path": base}
        write_atomic(staging / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_auxiliary_files(tokenizer_of, staging, TOKENIZER_FILES)
        write_record(staging, provenance)
        publish(staging, out)


@dataclasses.dataclass
class _Lora:
    """Factors by the names under which PEFT finds what they change.

    Args:
        fan_in_fan_out: Whether any layer keeps its weight as [in, out].
        layers: B and A of modules.
        parameters: B and A of each expert of a parameter.
        inside: By parameter, how many others of its module are wrapped around it.
        shared_rank: The one rank of experts that are stored apart and one parameter in memory.
    """

    fan_in_fan_out: bool = False
    layers: dict[str, Factors] = dataclasses.field(default_factory=dict)
    parameters: dict[str, list[Factors]] = dataclasses.field(default_factory=dict)
    inside: dict[str, int] = dataclasses.field(default_factory=dict)
    shared_rank: int | None = None

    def as_peft(self, modules_to_save: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors and the config as PEFT stores them."""
        import torch
        from peft import __version__

        ranks = {module: len(a) for module, (_, a) in self.layers.items()}
        tensors: dict[str, torch.Tensor] = {}
        for module, (b, a) in self.layers.items():
            tensors |= {f"{START}{module}{PARTS[0]}": a.contiguous(), f"{START}{module}{PARTS[1]}": b.contiguous()}
        for parameter, experts in self.parameters.items():
            ranks[parameter] = max(len(a) for _, a in experts)
            padded = [_padded(factors, ranks[parameter]) for factors in experts]
            path = START + parameter.rpartition(".")[0] + ".base_layer" * self.inside[parameter]
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
    """Add the factors of fused experts, by the names of single experts if PEFT fuses these; return what they lose."""
    names = [name for parameter in fused for name in architecture.parts_of(parameter)]
    lost = 0.0
    if _fuses(lora, names, architecture):
        sides = [{architecture.identify(name): name for name in side} for side in stored]
        factors = {}
        for name in names:
            change = delta(*(side[own[name]] for side, own in zip(stored, sides, strict=True))).double()
            factors[name.removesuffix(".weight")], error = _of_expert(change, budget)
            lost += error
        lora.shared_rank = max(len(a) for _, a in factors.values())
        lora.layers |= {module: _padded(both, lora.shared_rank) for module, both in factors.items()}
        return lost
    touched = [name for name in fused if _square(deltas, name)]
    for parameter in touched:
        path, _, own = parameter.rpartition(".")
        module = architecture.model.get_submodule(path)
        order = [n for n, _ in module.named_parameters(recurse=False) if f"{path}.{n}" in touched]
        lora.inside[parameter] = len(order) - 1 - order.index(own)
        turned = bool(getattr(module, "is_transposed", False))
        experts = [_of_expert((e.T if turned else e).double(), budget) for e in deltas[parameter]]
        lora.parameters[parameter] = [factors for factors, _ in experts]
        lost += sum(error for _, error in experts)
    return lost


def _of_expert(change: torch.Tensor, budget: _Budget) -> tuple[Factors, float]:
    if change.any():
        return budget.factors(change)
    return (change.new_zeros(len(change), 1).float(), change.new_zeros(1, change.shape[1]).float()), 0.0


def _padded(factors: Factors, rank: int) -> Factors:
    """Fill factors up to a rank with zeros, which changes nothing of their product."""
    b, a = factors
    wide_b, wide_a = b.new_zeros(len(b), rank), a.new_zeros(rank, a.shape[1])
    wide_b[:, : b.shape[1]], wide_a[: len(a)] = b, a
    return wide_b, wide_a


def _fuses(lora: _Lora, names: list[str], architecture: Architecture) -> bool:
    """Return whether PEFT makes a LoRA of fused experts of LoRAs of these, beside the layers that there are."""
    import torch

    apart = _Lora(layers=dict(lora.layers), shared_rank=1)
    for name in names:
        shape = architecture.stored[name].shape
        if len(shape) != 2:
            return False
        ends = torch.empty(shape[0], 1, device="meta"), torch.empty(1, shape[1], device="meta")
        apart.layers[name.removesuffix(".weight")] = ends
    tensors, config = apart.as_peft([])
    try:
        _check_loads(tensors, config, architecture)
    except MismatchError:
        return False
    return True


def _linear(tuned: Tensors, deltas: Tensors, changed: list[str], architecture: Architecture | None) -> dict[str, bool]:
    """Name the weights of linear layers, with whether they are kept as [in, out]."""
    matrices = [n for n in changed if len(shape_of(deltas, n)) == 2 and n.endswith(".weight")]
    if architecture is None:
        linear = [n for n in matrices if kind_of(n) != "embedding"]
        return dict.fromkeys(linear, _are_turned(tuned, linear))
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = {name: architecture.model.get_submodule(name.removesuffix(".weight")) for name in matrices}
    return {n: isinstance(m, Conv1D) for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}


def _in_memory(side: Tensors, architecture: Architecture) -> DerivedTensors:
    """Present a checkpoint as the class's parameters, without those that are others once more."""
    parameters = architecture.in_memory(side)
    return DerivedTensors({name: entry for name, entry in parameters.specs.items() if name not in architecture.ties})


def _square(deltas: DerivedTensors, name: str) -> float:
    """Return a delta's squared norm, from pieces of it where these are read by themselves; refuse one that is none."""
    sides = deltas.specs[name].operands
    apart = all(not isinstance(side, DerivedTensors) or side.specs[own].elementwise for side, own in sides)
    size = math.prod(shape_of(deltas, name))
    step = CHUNK_ELEMENTS if apart else max(size, 1)
    parts = (flat_slice(deltas, name, at, min(step, size - at)) for at in range(0, size, step))
    square = math.fsum(float(part.double().square().sum()) for part in parts)
    if not math.isfinite(square):
        raise CheckpointError(
            f"tensor {name!r}: what tuning changed is infinite or not a number (regraft weights inspect --check-finite "
            "counts such values): take a checkpoint from before the training diverged."
        )
    return square


def _are_turned(tuned: Tensors, linear: list[str]) -> bool:
    """Judge by their biases whether layers keep their weights as [in, out], as GPT-2's do."""
    sides = [
        (shape_of(tuned, name), shape_of(tuned, bias)[0])
        for name in linear
        if (bias := name.removesuffix("weight") + "bias") in tuned
    ]
    telling = [(shape, size) for shape, size in sides if shape[0] != shape[1]]
    return bool(telling) and all(shape[1] == size for shape, size in telling)
