"""A LoRA drawn out of a full fine-tune, or folded to what it amounts to on its base. PEFT's format, no model."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import (
    TOKENIZER,
    copy_companions,
    publish,
    resumable_folder,
    shape_of,
    write_atomic,
    write_safetensors,
)
from regraft.errors import CheckpointError, MismatchError, OutcomeError, RecipeError
from regraft.progress import Progress, silent
from regraft.weights import align, delta_all, fold, kind_of, low_rank

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import torch

    Tensors = Mapping[str, torch.Tensor]

START = "base_model.model."
FULL = "convert it to full (regraft adaptation convert)"
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")


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


def fold_start(
    adapter: Tensors, start: Tensors, config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Make a plain LoRA of one that took its start B0·A0 out of its base: B·A − B0·A0, of twice the rank.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        start: Those of the adapter as it was initialised.
        config: The content of `adapter_config.json`.

    Returns:
        The tensors and the config of the plain LoRA; the scaling of each module is what it was.

    Raises:
        CheckpointError: It is a DoRA too, or the two do not go together.
    """
    if config.get("use_dora"):
        raise CheckpointError(f"a DoRA that took its start out of its base cannot be made a plain LoRA: {FULL}.")
    if others := sorted(name for name in adapter if ".lora_" in name and not name.endswith(PARTS[:2])):
        raise CheckpointError(f"a LoRA with {others[0]!r} that began in its base cannot be made a plain LoRA: {FULL}.")
    folded = {name: adapter[name] for name in adapter if ".lora_" not in name}
    for a_name in (name for name in adapter if name.endswith(PARTS[0])):
        b_name = a_name.removesuffix(PARTS[0]) + PARTS[1]
        if any(n not in side for n in (a_name, b_name) for side in (adapter, start)):
            raise CheckpointError(f"the LoRA's start does not go with it: {a_name!r} differs.")
        b, a = fold((adapter[b_name], adapter[a_name]), (start[b_name], start[a_name]))
        folded |= {a_name: a, b_name: b}
    wider = 2**0.5 if config.get("use_rslora") else 2
    changed = {
        "init_lora_weights": True,
        "r": 2 * config.get("r", 8),
        "lora_alpha": wider * config.get("lora_alpha", 8),
        "rank_pattern": {pattern: 2 * rank for pattern, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {pattern: wider * alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items()},
    }
    return folded, {**config, **changed}


def extract_lora(
    tuned: Tensors,
    old: Tensors,
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress = silent,
    moments: Mapping[str, torch.Tensor] | None = None,
    heads: Collection[str] = (),
) -> ExtractedLora:
    """Draw a LoRA out of a full fine-tune: the best low-rank approximation of each linear layer's delta.

    Heads are kept whole; changes of embeddings, norms and biases have no place in a LoRA and are left out.

    Args:
        tuned: The full fine-tune.
        old: The base it was tuned on.
        rank: The rank of every layer; or
        energy: the share of each delta's squared norm to keep, which fixes its rank.
        progress: Told of each layer.
        moments: By layer, the second moments of its inputs, that weigh its delta; None to weigh all alike.
        heads: Tensors that are kept whole though the base has them too; those that it lacks are in any case.

    Returns:
        The LoRA.

    Raises:
        CheckpointError: One of the two holds values that are infinite or not a number.
        RecipeError: Not one of rank and energy is given.
        MismatchError: The two have nothing in common, or differ in shapes.
    """
    if (rank is None) == (energy is None):
        raise RecipeError("give either a rank or the energy to keep.")
    deltas = delta_all(tuned, old)
    changed = [name for name in deltas if name not in heads]
    known = [name for name in align(old, tuned) if name not in heads]
    tops = {name.split(".")[0] for name in known}
    fresh = [name for name in tuned if name not in known]
    modules = sorted({n.rpartition(".")[0] if n.split(".")[0] in tops else n.split(".")[0] for n in fresh})
    linear = [
        n for n in changed if len(shape_of(deltas, n)) == 2 and n.endswith(".weight") and kind_of(n) != "embedding"
    ]
    turned = _are_turned(tuned, linear)
    found: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    total = kept = left_out = 0.0
    for done, name in enumerate(changed, 1):
        change = deltas[name].double()
        norm = float(change.square().sum())
        if not math.isfinite(norm):
            raise CheckpointError(
                f"tensor {name!r}: what tuning changed is infinite or not a number (regraft weights inspect "
                "--check-finite counts such values): take a checkpoint from before the training diverged."
            )
        total += norm
        if name not in linear:
            left_out += norm
        elif norm:
            module, change = name.removesuffix(".weight"), change.T if turned else change
            b, a = low_rank(change, rank, energy, (moments or {}).get(module))
            ranks[module] = len(a)
            kept += norm - float((change - b.double() @ a.double()).square().sum())
            found |= {f"{START}{module}{PARTS[0]}": a.float(), f"{START}{module}{PARTS[1]}": b.float()}
        progress("extract", done, len(changed), {})
    if not ranks:
        raise MismatchError("the fine-tune has changed no linear layer: there is nothing to draw a LoRA from.")
    found |= {START + name: tuned[name] for name in fresh}
    largest = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if {"classifier", "score"} & set(modules) else None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": {module: r for module, r in ranks.items() if r != largest},
        "alpha_pattern": {module: r for module, r in ranks.items() if r != largest},
        "target_modules": sorted(ranks),
        "modules_to_save": modules or None,
        "lora_dropout": 0.0,
        "fan_in_fan_out": turned,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {name: tensor.contiguous() for name, tensor in found.items()}
    return ExtractedLora(tensors, config, kept / total, left_out / total)


def write_lora(lora: ExtractedLora, out: Path, base: str, tokenizer_of: Path) -> None:
    """Write a LoRA as PEFT does.

    Args:
        lora: From `extract_lora`.
        out: The folder to be; seen whole or not at all.
        base: What its base is called.
        tokenizer_of: Whose tokenizer files are copied.

    Raises:
        OutcomeError: Something is at `out`.
    """
    if out.exists():
        raise OutcomeError(f"{out}: exists already. Choose another --out or remove it.")
    with resumable_folder(out, {}) as work:
        whole = work / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        write_safetensors(whole / "adapter_model.safetensors", lora.tensors)
        config = {**lora.config, "base_model_name_or_path": base}
        write_atomic(whole / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_companions(tokenizer_of, whole, TOKENIZER)
        publish(whole, out)


def _are_turned(tuned: Tensors, linear: list[str]) -> bool:
    """Tell by their biases whether layers keep their weights as [in, out], as GPT-2's do."""
    sides = [
        (shape_of(tuned, name), shape_of(tuned, bias)[0])
        for name in linear
        if (bias := name.removesuffix("weight") + "bias") in tuned
    ]
    telling = [(shape, size) for shape, size in sides if shape[0] != shape[1]]
    return bool(telling) and all(shape[1] == size for shape, size in telling)
