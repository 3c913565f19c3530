"""Reading and checking the header of a safetensors file, without reading its tensors.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.json_file import MAX_JSON_BYTES, parse_json
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

LENGTH_BYTES = 8
"""The size of the header's length, a little-endian unsigned integer with which a file begins."""
MAX_TENSORS = 150_000  # the largest open models have 142,000: weights and scales of 384 experts in 61 layers
"""The most tensors that are read from a file or an index."""
MAX_DIMENSIONS = 64  # the limit of torch
"""The most dimensions of a tensor."""
MAX_INTEGER = 2**63 - 1  # the limit of torch for sizes
"""The largest size of a dimension, and the largest offset in bytes."""
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""The bytes of an element, by safetensors dtype."""
FLOATING = ("F64", "F32", "F16", "BF16")  # eight-bit weights are quantised
"""The dtypes of weights that are not quantised."""
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""The names of torch's dtypes, by safetensors dtype."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype.

    Args:
        name: The name of the dtype, such as `F32` or `BF16`.
    """
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype, such as `F32` or `BF16`.

    Args:
        dtype: A dtype of torch.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    for name, torch_name in TORCH_NAMES.items():
        if f"torch.{torch_name}" == str(dtype):
            return name
    raise CheckpointError(f"a tensor of dtype {dtype} cannot be stored as safetensors. Convert it first.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's dtype, shape and position on disk.

    Args:
        name: The tensor's name in the file.
        dtype: The safetensors dtype, such as `F32` or `BF16`.
        shape: The size of each dimension.
        file: The safetensors file that has the data.
        start: The position of the first byte of the data in the file.
        end: The position after the last byte of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file.

    Args:
        file: The safetensors file, of which only the header is read.

    Returns:
        The tensors of the file by name, in the order of their data.

    Raises:
        CheckpointError: The file cannot be read, is truncated or is a pointer of Git LFS, or its header is malformed or
            too large.
    """
    header, data_start, file_bytes = _read_json_header(file)
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its safetensors header is not a JSON object. Copy the file again.")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{file}: names {len(header):,} tensors; at most {MAX_TENSORS:,} are read.")
    tensors = [_parse_entry(file, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r:.200} starts at byte {tensor.start:,}, expected {position:,}: the "
                "header has a gap or an overlap. Copy the file again."
            )
        if tensor.end > file_bytes:
            raise CheckpointError(
                f"{file}: the file is truncated: tensor {tensor.name!r:.200} ends at byte {tensor.end:,}, but the file "
                f"has {file_bytes:,}. Copy it again."
            )
        position = tensor.end
    if position != file_bytes:
        raise CheckpointError(f"{file}: {file_bytes - position:,} bytes after the last tensor. Copy the file again.")
    return {tensor.name: tensor for tensor in tensors}


def _read_json_header(file: Path) -> tuple[Any, int, int]:
    """Return the parsed header, the position of the first byte after it, and the file's size in bytes."""
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            encoded_length = stream.read(LENGTH_BYTES)
            if encoded_length == b"version ":
                raise CheckpointError(
                    f"{file}: is a pointer of Git LFS, not the file itself. Download the file: git lfs pull."
                )
            length = int.from_bytes(encoded_length, "little")
            data_start = LENGTH_BYTES + length
            if file_bytes < data_start:
                raise CheckpointError(
                    f"{file}: not a complete safetensors file: its header claims {length:,} bytes, but the file has "
                    f"{file_bytes:,}. It was probably truncated while it was copied. Copy it again."
                )
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{file}: its header has {length:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
            return parse_json(stream.read(length)), data_start, file_bytes
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: its safetensors header is not valid JSON ({error}). Copy the file again."
        ) from error


def _parse_entry(file: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    """Check a tensor's entry in the header, whose offsets are relative to the end of the header."""
    if not isinstance(entry, dict):
        raise _malformed_entry_error(file, name, entry)
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    for integers in (shape, offsets):
        if not (isinstance(integers, list) and all(type(n) is int and 0 <= n <= MAX_INTEGER for n in integers)):
            raise _malformed_entry_error(file, name, entry)
    if not (isinstance(dtype, str) and dtype in ITEM_BYTES):
        raise CheckpointError(
            f"{file}: tensor {name!r:.200} has dtype {dtype!r:.200}, which is not one of {', '.join(ITEM_BYTES)}. "
            "Convert it to one of them."
        )
    if len(shape) > MAX_DIMENSIONS:
        raise _malformed_entry_error(file, name, entry)
    if len(offsets) != 2 or offsets[1] - offsets[0] != ITEM_BYTES[dtype] * math.prod(shape):
        raise CheckpointError(
            f"{file}: tensor {name!r:.200} of shape {shape} and dtype {dtype} cannot be bytes {offsets!s:.100}. Copy "
            "the file again."
        )
    return StoredTensor(name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _malformed_entry_error(file: Path, name: str, entry: object) -> CheckpointError:
    return CheckpointError(
        f"{file}: tensor {name!r:.200} has a malformed header entry {entry!s:.120}. Copy the file again."
    )
