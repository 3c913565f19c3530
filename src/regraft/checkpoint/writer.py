"""Writes safetensors a tensor at a time: no more than one tensor is in memory."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING

from regraft.checkpoint.header import ITEM_BYTES
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from regraft.checkpoint.header import TensorInfo


def write_safetensors(file: Path, tensors: Mapping[str, TensorInfo], compute: Callable[[str], torch.Tensor]) -> None:
    """Write one safetensors file, computing each tensor when its turn comes.

    Args:
        file: Where to; seen whole or not at all.
        tensors: The dtype and shape of each tensor by name.
        compute: Gives the tensor of a name, in that dtype and shape.

    Raises:
        CheckpointError: A computed tensor has another size than announced, or the disk is full.
    """
    import torch

    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        info = tensors[name]
        size = ITEM_BYTES[info.dtype] * math.prod(info.shape)
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    beside = file.with_name(f".{file.name}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little"))
            stream.write(encoded)
            for name in order:
                data = compute(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                expected = ITEM_BYTES[tensors[name].dtype] * math.prod(tensors[name].shape)
                if data.nbytes != expected:
                    raise CheckpointError(f"{file}: tensor {name!r} has {data.nbytes:,} bytes, expected {expected:,}.")
                stream.write(data.data)
        os.replace(beside, file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written ({error.strerror or error}).") from error
    finally:
        beside.unlink(missing_ok=True)
