"""Fingerprints of weights: fast hashes of named tensors that do not depend on sharding."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from regraft.checkpoint.quantised_tensor import QuantisedTensor, stored_parts
from regraft.checkpoint.reader import chunk_ranges

if TYPE_CHECKING:
    from collections.abc import Callable

    from regraft.checkpoint.header import StoredTensor
    from regraft.checkpoint.reader import Checkpoint

# Changing these constants changes all recorded fingerprints. With them, 15 GB take about a second.
SAMPLES = 32
"""The number of samples of a tensor."""
SAMPLE_BYTES = 256
"""The size of a sample."""
HEX_DIGITS = 32  # 128 bits of SHA-256
"""The number of digits of a fingerprint."""
READ_BYTES = 1 << 22
"""The bytes per read of a full fingerprint, 4 MiB."""


def fingerprint(
    checkpoint: Checkpoint, hashed_name: Callable[[str], str | None] | None = None, *, full: bool = False
) -> str:
    """Hash each tensor's name, dtype, shape and bytes, by default only a fixed sample of the bytes.

    Tensors of at most `SAMPLES` · `SAMPLE_BYTES` bytes are always hashed completely. By default, `SAMPLES` evenly
    spaced samples of a larger tensor are hashed, including the first and last bytes, so that further training changes
    the fingerprint.

    Args:
        checkpoint: The weights, which are read from their files.
        hashed_name: Maps a tensor's name to the name to hash, or to None to leave the tensor out. By default all
            tensors are hashed under their own names.
        full: Whether to hash every byte.

    Returns:
        `sample:` or `full:` and `HEX_DIGITS` hexadecimal digits; independent of the order of tensors and files.
    """
    streams = {file: file.open("rb") for file in checkpoint.files}
    try:
        lines = []
        for name, tensor in checkpoint.tensors.items():
            key = hashed_name(name) if hashed_name else name
            if key is None:
                continue
            digest = hashlib.sha256()
            for part in stored_parts(tensor):
                for start, num_bytes in _all_ranges(part) if full else _sampled_ranges(part):
                    streams[part.file].seek(start)
                    digest.update(streams[part.file].read(num_bytes))
            dtype = f"{tensor.codes.dtype} {tensor.block}" if isinstance(tensor, QuantisedTensor) else tensor.dtype
            lines.append(f"{key}\0{dtype}\0{tensor.shape}\0{digest.hexdigest()}")
    finally:
        for stream in streams.values():
            stream.close()
    digits = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:HEX_DIGITS]
    return f"full:{digits}" if full else f"sample:{digits}"


def _sampled_ranges(tensor: StoredTensor) -> list[tuple[int, int]]:
    """Return the start in the file and the number of bytes of each sample."""
    num_bytes = tensor.end - tensor.start
    if num_bytes <= SAMPLES * SAMPLE_BYTES:
        return [(tensor.start, num_bytes)]
    last_offset = num_bytes - SAMPLE_BYTES
    return [(tensor.start + last_offset * i // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]


def _all_ranges(tensor: StoredTensor) -> list[tuple[int, int]]:
    return [(tensor.start + offset, length) for offset, length in chunk_ranges(tensor.end - tensor.start, READ_BYTES)]
