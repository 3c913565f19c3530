"""A LoRA as a change of weights: merged into its base, or drawn out of a full fine-tune. PEFT's format, no model."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adaptation import BASE_CHANGING_INITS, load_adaptation
from regraft.checkpoint import (
    TOKENIZER,
    Derived,
    Entry,
    copy_companions,
    dtype_of,
    publish,
    resumable_folder,
    shape_of,
    write_atomic,
    write_safetensors,
)
from regraft.errors import CheckpointError, MismatchError, OutcomeError, RecipeError
from regraft.progress import Progress, silent
from regraft.weights import align, delta_all, dora_weight, fold, kind_of, lora_delta, low_rank, scaling

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    Tensors = Mapping[str, torch.Tensor]

START = "base_model.model."
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


def merge_lora(adapter: Tensors, config: Mapping[str, Any], base: Tensors, start: Tensors | None = None) -> Derived:
    """Merge a LoRA into its base: W + scaling·B·A, or DoRA's renormalised weight; whole modules take their place.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.
        base: The base's tensors; their names may carry the prefix of a model with a head, or not.
        start: The adapter as it was initialised, for kinds that take their start out of the base (PiSSA, OLoRA).

    Returns:
        The merged tensors under the names of the model that was tuned, in the base's dtypes.

    Raises:
        CheckpointError: A tensor of the adapter is of no kind that is known here, or its start is needed and missing.
        MismatchError: A module that was tuned is not in the base, or has another shape there.
    """
    init = str(config.get("init_lora_weights", True)).lower()
    if start is None and init.startswith(BASE_CHANGING_INITS):
        raise CheckpointError(
            f"the LoRA was initialised by {init!r}, which took its start out of its base: give the adapter as it was "
            "before the first step (--start)."
        )
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for stored in adapter:
        name = stored.removeprefix(START)
        part = next((part for part in PARTS if name.endswith(part)), None)
        if part:
            modules.setdefault(name.removesuffix(part), {})[part] = stored
        elif "lora_" in name:
            raise CheckpointError(f"tensor {stored!r} of the LoRA is of a kind that cannot be merged.")
        else:
            whole[name.replace(".base_layer.", ".")] = stored  # a bias that was tuned beside the LoRA
    for module, parts in modules.items():
        if not {PARTS[0], PARTS[1]} <= parts.keys():
            raise CheckpointError(f"module {module!r} of the LoRA lacks one of {PARTS[0][1:]} and {PARTS[1][1:]}.")
    names = _base_names(base, [f"{module}.weight" for module in modules])
    if whole:  # the adapter brings a head of its own, which takes the place of the base's
        body = next(iter(modules)).split(".")[0] + "."
        names = {name: stored for name, stored in names.items() if name.startswith(body)}
    entries = {
        name: Entry(dtype_of(base, stored), shape_of(base, stored), ((base, stored),), _same)
        for name, stored in names.items()
    }
    for name, stored in whole.items():
        entries[name] = Entry(dtype_of(adapter, stored), shape_of(adapter, stored), ((adapter, stored),), _same)
    for module, parts in modules.items():
        name = f"{module}.weight"
        rank = shape_of(adapter, parts[PARTS[0]])[0]
        alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
        factor = scaling(rank, alpha, bool(config.get("use_rslora")))
        operands = ((base, names[name]), *((adapter, parts[part]) for part in PARTS if part in parts))
        weight = shape_of(base, names[name])
        transposed = bool(config.get("fan_in_fan_out"))  # Conv1D keeps its weight as [in, out]
        fits = (shape_of(adapter, parts[PARTS[1]])[0], shape_of(adapter, parts[PARTS[0]])[1])
        if weight != (fits[::-1] if transposed else fits):
            raise MismatchError(
                f"the LoRA changes module {module!r} by {fits}, and its weight in the base is {weight}."
            )
        if start is not None:
            if any(parts[part] not in start for part in PARTS[:2]) or PARTS[2] in parts:
                raise CheckpointError(f"the LoRA's start does not go with it: module {module!r} differs.")
            operands += tuple((start, parts[part]) for part in PARTS[:2])
        rule = functools.partial(_merged, scaling=factor, transposed=transposed, folded=start is not None)
        entries[name] = Entry(dtype_of(base, names[name]), shape_of(base, names[name]), operands, rule, False)
    return Derived(entries)


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
        raise CheckpointError("a DoRA that took its start out of its base cannot be made a plain LoRA.")
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
        "r": 2 * config["r"],
        "lora_alpha": wider * config["lora_alpha"],
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

    Returns:
        The LoRA.

    Raises:
        RecipeError: Not one of rank and energy is given.
        MismatchError: The two have nothing in common, or differ in shapes.
    """
    if (rank is None) == (energy is None):
        raise RecipeError("give either a rank or the energy to keep.")
    deltas = delta_all(tuned, old)
    known = align(old, tuned)
    tops = {name.split(".")[0] for name in known}
    fresh = [name for name in tuned if name not in known]
    heads = sorted({n.rpartition(".")[0] if n.split(".")[0] in tops else n.split(".")[0] for n in fresh})
    linear = [
        n for n in deltas if len(shape_of(deltas, n)) == 2 and n.endswith(".weight") and kind_of(n) != "embedding"
    ]
    found: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    total = kept = left_out = 0.0
    for done, name in enumerate(deltas, 1):
        change = deltas[name].double()
        norm = float(change.square().sum())
        total += norm
        if name not in linear:
            left_out += norm
        elif norm:
            module = name.removesuffix(".weight")
            b, a = low_rank(change, rank, energy, (moments or {}).get(module))
            ranks[module] = len(a)
            kept += norm - float((change - b.double() @ a.double()).square().sum())
            found |= {f"{START}{module}{PARTS[0]}": a.float(), f"{START}{module}{PARTS[1]}": b.float()}
        progress("extract", done, len(deltas), {})
    if not ranks:
        raise MismatchError("the fine-tune has changed no linear layer: there is nothing to draw a LoRA from.")
    found |= {START + name: tuned[name] for name in fresh}
    largest = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if {"classifier", "score"} & set(heads) else None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": {module: r for module, r in ranks.items() if r != largest},
        "alpha_pattern": {module: r for module, r in ranks.items() if r != largest},
        "target_modules": sorted(ranks),
        "modules_to_save": heads or None,
        "lora_dropout": 0.0,
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
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Give a folder that PEFT wrote.") from error
    if kind != "LORA":
        raise CheckpointError(f"{file}: is of type {kind}; only LORA can be merged.")
    return config


def merged_config(merged: Derived, folder: Path, base: Path) -> dict[str, Any]:
    """Tell what a base's `config.json` must say once a LoRA with a head is merged into it.

    Args:
        merged: From `merge_lora`.
        folder: The LoRA's folder.
        base: The base's folder.

    Returns:
        What to change: the architecture and the labels; nothing if the LoRA has no classification head.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    kind = json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type")
    sizes = [shape_of(merged, n)[0] for n in merged if re.search(r"^(?:classifier|score)\.(?:.*\.)?weight$", n)]
    if not sizes or kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return {}
    names = load_adaptation(folder).labels
    labels = names or tuple(f"LABEL_{i}" for i in range(min(sizes)))
    return {
        "architectures": [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[kind]],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _merged(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *more: torch.Tensor,
    scaling: float,
    transposed: bool,
    folded: bool,
) -> torch.Tensor:
    plain = weight.T if transposed else weight
    if folded:
        b, a = fold((b.double(), a.double()), (more[1].double(), more[0].double()))
    if more and not folded:
        merged = dora_weight(plain, b, a, scaling, more[0])
    else:
        merged = plain.double() + lora_delta(b, a, scaling)
    return merged.T if transposed else merged


def _base_names(base: Tensors, wanted: list[str]) -> dict[str, str]:
    """Name the base's tensors as the tuned model does, which may wrap the body under a prefix."""
    for prefix in ("", *sorted({name.split(".")[0] + "." for name in wanted})):
        names = {prefix + name: name for name in base}
        if all(name in names for name in wanted):
            return names
    missing = [name for name in wanted if name not in base]
    raise MismatchError(f"{len(missing)} modules that the LoRA tunes are not in the base: {', '.join(missing[:4])}.")


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches them
            return value
    return default


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
