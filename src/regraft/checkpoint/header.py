"""The header of a safetensors file, read and checked without touching the data.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64  # torch's own
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATING = ("F64", "F32", "F16", "BF16")  # those that weights are in; eight bits are a quantised weight's


TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """Give torch's dtype for one of safetensors.

    Args:
        name: As in `F32` or `BF16`.

    Returns:
        The dtype.
    """
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Give safetensors' name of a torch dtype.

    Args:
        dtype: The dtype.

    Returns:
        As in `F32` or `BF16`.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    wanted = str(dtype).removeprefix("torch.")
    for name, known in TORCH_NAMES.items():
        if known == wanted:
            return name
    raise CheckpointError(f"a tensor of dtype {dtype} cannot be stored as safetensors.")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies on disk.

    Args:
        name: The tensor's name in the file.
        dtype: The safetensors dtype, as in `F32` or `BF16`.
        shape: Its size along each dimension.
        file: The safetensors file that holds it.
        start: First byte of its data in the file.
        end: One past the last byte of its data in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Args:
        file: The safetensors file.

    Returns:
        Every tensor of the file by name, in the order of their data.

    Raises:
        CheckpointError: The file is missing, ends early, or its header is malformed.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: not a whole safetensors file: its header claims {length:,} bytes and the file has "
                    f"{size:,}. It was probably cut off while it was copied: fetch it again."
                )
            header = parse_json(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its safetensors header is not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its safetensors header is not a JSON object. Fetch the file again.")
    data_start = 8 + length
    tensors = [_tensor_info(file, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda info: (info.start, info.end))
    position = data_start
    for info in tensors:
        if info.start != position:
            raise CheckpointError(
                f"{file}: tensor {info.name!r:.200} starts at byte {info.start:,}, expected {position:,}: the header "
                "has a gap or an overlap. Fetch the file again."
            )
        if info.end > size:
            raise CheckpointError(
                f"{file}: the file ends early: tensor {info.name!r:.200} needs bytes up to {info.end:,} and the file "
                f"has {size:,}. It was probably cut off while it was copied: fetch it again."
            )
        position = info.end
    if position != size:
        raise CheckpointError(f"{file}: {size - position:,} bytes after the last tensor. Fetch the file again.")
    return {info.name: info for info in tensors}


def parse_json(text: bytes) -> Any:
    """Parse JSON that must not name a thing twice.

    Args:
        text: UTF-8.

    Returns:
        What it says.

    Raises:
        ValueError: It is no JSON, or an object in it has a name twice.
    """
    return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)!r:.200} is there twice")
    return found


def _tensor_info(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    malformed = CheckpointError(f"{file}: tensor {name!r:.200} has a malformed header entry {str(entry)[:120]}.")
    if not isinstance(entry, dict):
        raise malformed
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise malformed
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{file}: tensor {name!r:.200} has dtype {dtype!r:.200}, which is not one of {', '.join(ITEM_BYTES)}."
        )
    if len(shape) > MAX_DIMENSIONS:
        raise malformed
    if len(offsets) != 2 or offsets[1] - offsets[0] != ITEM_BYTES[dtype] * math.prod(shape):
        raise CheckpointError(
            f"{file}: tensor {name!r:.200} of shape {shape} and dtype {dtype} cannot lie in bytes {offsets!s:.100}."
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])
