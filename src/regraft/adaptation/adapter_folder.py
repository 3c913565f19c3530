"""The files of an adapter in PEFT's layout: their names, checks before anything is read, and writing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import write_atomic, write_safetensors
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from regraft.checkpoint import Checkpoint

MAX_UNCHECKED_SIZE = 1024  # a rank or prompt of this size takes little memory even if no tensor confirms it
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# settings that PEFT writes in arbitrary order
NAME_SETS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")


def check_peft(folder: Path, config: dict[str, Any]) -> None:
    """Check that an adapter is one of PEFT's, and does not make PEFT run code that it names.

    Args:
        folder: The adapter's folder.
        config: The content of its `adapter_config.json`.

    Raises:
        CheckpointError: It is of another library, or names code.
    """
    file = f"{folder}/{ADAPTER_CONFIG}"
    if config.get("peft_type") is None:
        if isinstance(config.get("config"), dict | str) or "model_class" in config:
            raise CheckpointError(
                f"{file}: has no peft_type: it is of the adapters library (AdapterHub, adapter-transformers), which "
                "neither PEFT nor regraft reads. Tune it again (regraft tune --kind bottleneck or pfeiffer), or merge "
                "it with that library and use the merged model."
            )
        raise CheckpointError(
            f"{file}: has no peft_type, so it is no adapter of PEFT. Was it saved by save_pretrained?"
        )
    if config.get("megatron_config"):
        raise CheckpointError(
            f"{file}: megatron_config makes PEFT import {config.get('megatron_core')!r:.80}, but regraft runs no code "
            "that a checkpoint names. Merge the adapter with the tool that tuned it, and give the merged model."
        )


def check_adapter(folder: Path, config: dict[str, Any]) -> None:
    """Check that PEFT can read an adapter's folder completely.

    Args:
        folder: The adapter's folder.
        config: The content of its `adapter_config.json`.

    Raises:
        CheckpointError: Files are missing, ambiguous, or written by another tool.
    """
    check_peft(folder, config)
    if model_files := sorted(entry.name for entry in folder.glob("model*.safetensors*")):
        raise CheckpointError(
            f"{folder}: has an adapter and a whole model ({', '.join(model_files[:4])}). Which of them was tuned? "
            "Move them to separate folders."
        )
    shards = sorted(file.name for file in folder.glob("adapter_model*.safetensors*") if file.name != ADAPTER_WEIGHTS)
    if shards:
        raise CheckpointError(
            f"{folder}: has {', '.join(shards[:4])}, but PEFT reads an adapter from {ADAPTER_WEIGHTS} only. Load it "
            "with the tool that saved it, and call save_pretrained of PEFT."
        )
    virtual = config.get("num_virtual_tokens")
    if virtual is not None and (type(virtual) is not int or virtual < 1):
        raise CheckpointError(
            f"{folder}/{ADAPTER_CONFIG}: num_virtual_tokens is {virtual!r}, not a whole number above 0."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        raise CheckpointError(
            f"{folder}: has {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}. "
            + (
                f"{pickles[0]} is a pickle, which can run code and is not read. If you trust it, load it with PEFT and "
                "call save_pretrained."
                if pickles
                else "Download the folder again, or call save_pretrained of PEFT again."
            )
        )


def check_sizes(checkpoint: Checkpoint, config: dict[str, Any], file: Path) -> None:
    """Check that the config's sizes are those of stored tensors, before PEFT allocates memory for them.

    Args:
        checkpoint: The adapter's tensors.
        config: The content of its `adapter_config.json`.
        file: The path of that file.

    Raises:
        CheckpointError: A rank or a number of virtual tokens is larger than all stored tensors.
    """
    largest = max((size for stored_tensor in checkpoint.tensors.values() for size in stored_tensor.shape), default=0)
    ranks = config.get("rank_pattern")
    sizes = {name: config.get(name) for name in ("r", "num_virtual_tokens")} if config["peft_type"] != "LOKR" else {}
    for name, size in [*sizes.items(), *(ranks.items() if isinstance(ranks, dict) else ())]:
        if type(size) is int and size > max(largest, MAX_UNCHECKED_SIZE):
            raise CheckpointError(f"{file}: {name} is {size:,}, and no stored tensor has more than {largest:,} rows.")


def write_adapter(into: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter in PEFT's layout.

    Args:
        into: The folder.
        tensors: The tensors by stored name.
        config: The content of `adapter_config.json`.
    """
    into.mkdir(parents=True, exist_ok=True)
    write_safetensors(into / ADAPTER_WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()})
    write_settings(into, config)


def write_settings(into: Path, config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json`; lists that PEFT writes in an order that differs from run to run are sorted.

    Args:
        into: The adapter's folder.
        config: The content of `adapter_config.json`.
    """
    ordered = {name: sorted(config[name]) for name in NAME_SETS if isinstance(config.get(name), (list, set))}
    write_atomic(into / ADAPTER_CONFIG, json.dumps({**config, **ordered}, indent=2, sort_keys=True) + "\n")
