"""The header of a safetensors file, read and checked without touching the data.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.json_file import parse_json
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

MAX_HEADER_BYTES = 32_000_000  # Python's objects take up to twenty times as much
MAX_TENSORS = 150_000  # the largest open models have 142,000: weights and scales of 384 experts in 61 layers
MAX_DIMENSIONS = 64  # torch's own
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATING = ("F64", "F32", "F16", "BF16")  # those that weights are in; eight bits are a quantised weight's


TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for one of safetensors.

    Args:
        name: As in `F32` or `BF16`.

    Returns:
        The dtype.
    """
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a torch dtype.

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
class StoredTensor:
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


def read_header(file: Path) -> dict[str, StoredTensor]:
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
            start = stream.read(8)
            if start == b"version ":
                raise CheckpointError(
                    f"{file}: is a pointer of Git LFS, not the file itself. Fetch that: git lfs pull."
                )
            length = int.from_bytes(start, "little")
            if size >= 8 + length and length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: its header has {length:,} bytes; {MAX_HEADER_BYTES:,} are read of a file."
                )
            if size < 8 or length > size - 8:
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
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{file}: names {len(header):,} tensors; {MAX_TENSORS:,} are read of a file.")
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


def _tensor_info(file: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise _malformed(file, name, entry)
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise _malformed(file, name, entry)
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{file}: tensor {name!r:.200} has dtype {dtype!r:.200}, which is not one of {', '.join(ITEM_BYTES)}."
        )
    if len(shape) > MAX_DIMENSIONS:
        raise _malformed(file, name, entry)
    if len(offsets) != 2 or offsets[1] - offsets[0] != ITEM_BYTES[dtype] * math.prod(shape):
        raise CheckpointError(
            f"{file}: tensor {name!r:.200} of shape {shape} and dtype {dtype} cannot lie in bytes {offsets!s:.100}."
        )
    return StoredTensor(name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _malformed(file: Path, name: str, entry: object) -> CheckpointError:
    return CheckpointError(f"{file}: tensor {name!r:.200} has a malformed header entry {str(entry)[:120]}.")
