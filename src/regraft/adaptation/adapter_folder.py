"""The files of an adapter in PEFT's layout: what they are called, checked before anything is read, and written."""

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

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SETS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")  # of names, held as sets by PEFT


def check_peft(folder: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter that is none of PEFT's, or that has PEFT run code that it names.

    Args:
        folder: The adapter's folder.
        config: The content of its `adapter_config.json`.

    Raises:
        CheckpointError: It is; the message says what it is and what to do.
    """
    where = f"{folder}/{ADAPTER_CONFIG}"
    if config.get("peft_type") is None:
        if isinstance(config.get("config"), dict | str) or "model_class" in config:
            raise CheckpointError(
                f"{where}: is of an adapter of the adapters library (AdapterHub, adapter-transformers), which has no "
                "peft_type. Neither PEFT nor regraft reads these: tune it anew (regraft tune --kind bottleneck or "
                "pfeiffer are the same kind), or merge it there and give the merged model."
            )
        raise CheckpointError(
            f"{where}: has no peft_type, so it is no adapter of PEFT. Was it saved by save_pretrained?"
        )
    if config.get("megatron_config"):
        raise CheckpointError(
            f"{where}: megatron_config has PEFT import {config.get('megatron_core')!r:.80}, and no code that a "
            "checkpoint names is run. Merge it where it was tuned, and give the merged model."
        )


def check_adapter(folder: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter's folder that PEFT would read in part, or not at all.

    Args:
        folder: The adapter's folder.
        config: The content of its `adapter_config.json`.

    Raises:
        CheckpointError: Files are missing, too many or of another tool; the message says what to do.
    """
    check_peft(folder, config)
    if strangers := sorted(entry.name for entry in folder.glob("model*.safetensors*")):
        raise CheckpointError(
            f"{folder}: holds an adapter and a whole model too ({', '.join(strangers[:4])}): which of them was "
            "tuned? Keep them in folders of their own."
        )
    shards = sorted(e.name for e in folder.glob("adapter_model*.safetensors*") if e.name != ADAPTER_WEIGHTS)
    if shards:
        raise CheckpointError(
            f"{folder}: holds {', '.join(shards[:4])}, and an adapter is one file, {ADAPTER_WEIGHTS}, of which PEFT "
            "would read that alone. Load it with what saved it and call save_pretrained of PEFT."
        )
    virtual = config.get("num_virtual_tokens")
    if virtual is not None and (type(virtual) is not int or virtual < 1):
        raise CheckpointError(f"{folder}/{ADAPTER_CONFIG}: num_virtual_tokens is {virtual!r}, not a number from 1.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        raise CheckpointError(
            f"{folder}: has no {ADAPTER_WEIGHTS} beside its {ADAPTER_CONFIG}. "
            + (
                f"{pickles[0]} is a pickle, which can run code and is not read: if you trust it, load it with PEFT and "
                "call save_pretrained."
                if pickles
                else "Fetch the whole folder again, or call save_pretrained of PEFT once more."
            )
        )


def check_sizes(checkpoint: Checkpoint, config: dict[str, Any], file: Path) -> None:
    """Refuse sizes that no stored tensor has, before PEFT makes room for them.

    Args:
        checkpoint: The adapter's tensors.
        config: The content of its `adapter_config.json`.
        file: That file.

    Raises:
        CheckpointError: A rank or a number of virtual tokens is beyond all tensors.
    """
    largest = max((size for info in checkpoint.tensors.values() for size in info.shape), default=0)
    ranks = config.get("rank_pattern")
    sizes = {name: config.get(name) for name in ("r", "num_virtual_tokens")} if config["peft_type"] != "LOKR" else {}
    for name, size in [*sizes.items(), *(ranks.items() if isinstance(ranks, dict) else ())]:
        if type(size) is int and size > max(largest, 1024):
            raise CheckpointError(f"{file}: {name} is {size:,}, and no stored tensor has more than {largest:,} rows.")


def write_adapter(into: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter in PEFT's layout.

    Args:
        into: The folder to fill.
        tensors: By stored name.
        config: The content of `adapter_config.json`.
    """
    into.mkdir(parents=True, exist_ok=True)
    write_safetensors(into / ADAPTER_WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()})
    write_settings(into, config)


def write_settings(into: Path, config: Mapping[str, Any]) -> None:
    """Write PEFT's settings; what it holds as sets, and so writes in an order that changes from run to run, sorted.

    Args:
        into: The adapter's folder.
        config: The content of `adapter_config.json`.
    """
    ordered = {name: sorted(config[name]) for name in SETS if isinstance(config.get(name), (list, set))}
    write_atomic(into / ADAPTER_CONFIG, json.dumps({**config, **ordered}, indent=2, sort_keys=True) + "\n")
