"""A LoRA merged into its base: from files to tensors, without a model."""

from __future__ import annotations

import functools
import math
import re
import statistics
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adaptation import BASE_CHANGING_INITS, check_peft, load_adaptation
from regraft.adaptation.lora import PARTS, START
from regraft.adaptation.patterns import check_patterns
from regraft.checkpoint import Derived, Entry, dtype_of, read_json, shape_of
from regraft.errors import CheckpointError, MismatchError
from regraft.weights import dora_weight, fold, is_optional, lora_delta, scaling

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import torch

    Tensors = Mapping[str, torch.Tensor]

# settings with which a LoRA is not W + scaling · B · A of the base's own layers
CANNOT_MERGE = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip


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
    stored_modules = {name.removeprefix(START).rpartition(".")[0] for name in (*base, *adapter)}
    check_patterns(config, stored_modules, "the LoRA's adapter_config.json")
    if special := [key for key in CANNOT_MERGE if config.get(key)]:
        raise CheckpointError(
            f"the LoRA was set up with {', '.join(special)}, and is more than a change of its base's weights that can "
            "be merged here. Convert it instead: regraft adaptation convert --to full."
        )
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
    body = statistics.mode(module.split(".")[0] + "." for module in modules) if modules else ""
    _check_whole(config, modules, whole, names, body)
    if whole:  # the adapter brings a head of its own, which takes the place of the base's
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
        factor = lora_scaling(config, module, rank)
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


def lora_scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Give the factor on B·A of one module of a LoRA.

    Args:
        config: The content of `adapter_config.json`.
        module: The module's name in the model.
        rank: The module's rank.

    Returns:
        The factor.

    Raises:
        CheckpointError: Its alpha is no finite number.
    """
    patterns = (config.get("alpha_pattern") or {}).items()
    own = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", module))  # as PEFT matches them
    alpha = next(own, config.get("lora_alpha", 8))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"the LoRA's adapter_config.json: the alpha of module {module!r} is {alpha!r:.80}.")
    return scaling(rank, alpha, bool(config.get("use_rslora")))


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
    config = read_json(file)
    check_peft(folder, config)
    kind = config.get("peft_type")
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

    kind = str(read_json(base / "config.json").get("model_type"))
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


def _check_whole(
    config: Mapping[str, Any], modules: Collection[str], whole: Collection[str], names: Collection[str], body: str
) -> None:
    """Refuse a LoRA of which a part is lost, or that brings what is neither a head nor in the base."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    stray = [n for n in whole if n.startswith(body) and n not in names and not is_optional(n.removeprefix(body))]
    stray += [n for n in whole if re.search(r"\.(modules_to_save|original_module)\.", n)]
    if stray:
        raise CheckpointError(
            f"{len(stray)} tensors of the LoRA are of no place in its base: {', '.join(stray[:4])}. If PEFT loads it, "
            "convert it instead: regraft adaptation convert --to full."
        )
    if not config.get("target_modules"):
        return
    known = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    given: dict[str, Any] = {key: config.get(key) for key in known}
    try:
        asked = LoraConfig(**given)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the LoRA's adapter_config.json: PEFT cannot read it ({error}).") from error
    roles = {re.sub(r"\.\d+\.", ".N.", module) for module in modules}
    lost = [
        module
        for module in (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
        if module not in modules
        and re.sub(r"\.\d+\.", ".N.", module) in roles
        and check_target_module_exists(asked, module)
    ]
    if lost:
        raise CheckpointError(
            f"the LoRA tunes {len(lost)} modules of the base for which it holds no tensors: {', '.join(lost[:4])}. "
            "Either it is not whole, or it is of another base."
        )


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


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
