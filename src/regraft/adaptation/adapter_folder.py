"""The files of an adapter in PEFT's layout: names, checks before tensors are read, and writing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import read_json, write_atomic, write_safetensors
from regraft.errors import MAX_LISTED, CheckpointError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from regraft.checkpoint import Checkpoint

MAX_UNCHECKED_SIZE = 1024  # arbitrary: takes so little memory that no stored tensor need confirm it
"""The largest rank or number of virtual tokens that is not compared with the stored tensors."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SET_VALUED_KEYS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
"""The keys of `adapter_config.json` whose lists PEFT writes in an order that differs from run to run."""


def check_peft(folder: Path, config: dict[str, Any]) -> None:
    """Check that an adapter is in PEFT's format, and does not make PEFT import a module that it names.

    Args:
        folder: The adapter's folder.
        config: The content of its `adapter_config.json`.

    Raises:
        CheckpointError: The config has no `peft_type`, as in the adapters library, or names a module to import.
    """
    file = f"{folder}/{ADAPTER_CONFIG}"
    if config.get("peft_type") is None:
        if isinstance(config.get("config"), dict | str) or "model_class" in config:
            raise CheckpointError(
                f"{file}: has no peft_type: it is in the format of the adapters library (AdapterHub, "
                "adapter-transformers), which neither PEFT nor regraft reads. Tune it again (regraft tune "
                "--kind bottleneck or pfeiffer), or merge it with that library and use the merged model."
            )
        raise CheckpointError(
            f"{file}: has no peft_type, so it is not an adapter of PEFT. Was it saved by save_pretrained?"
        )
    if config.get("megatron_config"):
        raise CheckpointError(
            f"{file}: megatron_config makes PEFT import {config.get('megatron_core')!r:.80}, but regraft runs no code "
            "that a checkpoint names. Merge the adapter with the tool that tuned it, and use the merged model."
        )


def check_adapter(folder: Path, config: dict[str, Any]) -> None:
    """Check that an adapter's folder is in PEFT's layout and complete.

    Args:
        folder: The adapter's folder.
        config: The content of its `adapter_config.json`.

    Raises:
        CheckpointError: The adapter is not in PEFT's format or names a module to import, its number of virtual tokens
            is not a positive integer, or its weights are missing, in shards, or stored beside those of a whole model.
    """
    check_peft(folder, config)
    model_files = sorted(entry.name for entry in folder.glob("model*.safetensors*"))
    if model_files:
        raise CheckpointError(
            f"{folder}: has an adapter and a whole model ({', '.join(model_files[:MAX_LISTED])}). Which of them was "
            "tuned? Move them to separate folders."
        )
    shards = sorted(file.name for file in folder.glob("adapter_model*.safetensors*") if file.name != ADAPTER_WEIGHTS)
    if shards:
        raise CheckpointError(
            f"{folder}: has {', '.join(shards[:MAX_LISTED])}, but PEFT reads an adapter from {ADAPTER_WEIGHTS} only. "
            "Load it with the tool that saved it, and call save_pretrained of PEFT."
        )
    num_virtual_tokens = config.get("num_virtual_tokens")
    if num_virtual_tokens is not None and (type(num_virtual_tokens) is not int or num_virtual_tokens < 1):
        raise CheckpointError(
            f"{folder}/{ADAPTER_CONFIG}: num_virtual_tokens is {num_virtual_tokens!r}, not a whole number above 0. "
            "Correct it, or download the folder again."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        remedy = "Download the folder again, or call save_pretrained of PEFT again."
        if pickles:
            remedy = (
                f"{pickles[0]} is a pickle, which can run code and is not read. If you trust it, load it with PEFT and "
                "call save_pretrained."
            )
        raise CheckpointError(f"{folder}: has {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}. {remedy}")


def check_sizes(checkpoint: Checkpoint, config: dict[str, Any], file: Path) -> None:
    """Check that an adapter's config has no larger sizes than its tensors, before PEFT allocates memory for them.

    Args:
        checkpoint: The adapter's tensors.
        config: The content of its `adapter_config.json`.
        file: The path of that file.

    Raises:
        CheckpointError: A rank or a number of virtual tokens exceeds `MAX_UNCHECKED_SIZE` and all tensors' dimensions.
    """
    largest = max((size for stored_tensor in checkpoint.tensors.values() for size in stored_tensor.shape), default=0)
    sizes: list[tuple[str, Any]] = []
    if config["peft_type"] != "LOKR":  # a LoKr's r only bounds the ranks of its factors
        sizes += [(name, config.get(name)) for name in ("r", "num_virtual_tokens")]
    if isinstance(config.get("rank_pattern"), dict):
        sizes += config["rank_pattern"].items()
    for name, size in sizes:
        if type(size) is int and size > max(largest, MAX_UNCHECKED_SIZE):
            raise CheckpointError(
                f"{file}: {name} is {size:,}, but the largest dimension of a stored tensor is {largest:,}. Correct it, "
                "or download the folder again."
            )


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter in PEFT's layout.

    Args:
        folder: The folder to write; created if it does not exist.
        tensors: The tensors by stored name.
        config: The content of `adapter_config.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / ADAPTER_WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()})
    write_adapter_config(folder, config)


def write_adapter_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json`, with the values of `SET_VALUED_KEYS` sorted so that equal adapters have equal files.

    Args:
        folder: The adapter's folder.
        config: The content of `adapter_config.json`.
    """
    ordered = {name: sorted(config[name]) for name in SET_VALUED_KEYS if isinstance(config.get(name), (list, set))}
    write_atomic(folder / ADAPTER_CONFIG, json.dumps({**config, **ordered}, indent=2, sort_keys=True) + "\n")


def set_served_base(folder: Path, served_base: str) -> None:
    """Record the base of an adapter as a server names it, which vLLM compares as a string.

    Args:
        folder: The adapter's folder.
        served_base: The path or hub id that the server gets as its model.

    Raises:
        RecipeError: The folder has no adapter.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise RecipeError(
            f"served_base is {served_base!r}, but a full fine-tune records no base: it is served alone. Leave it out."
        )
    write_adapter_config(folder, {**read_json(file), "base_model_name_or_path": served_base, "revision": None})
