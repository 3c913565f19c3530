"""Fingerprints of weights: a fast hash of named tensors that does not depend on how they are sharded."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from regraft.checkpoint.quantised import QuantisedTensor, stored_parts
from regraft.checkpoint.reader import chunk_ranges

if TYPE_CHECKING:
    from collections.abc import Callable

    from regraft.checkpoint.header import StoredTensor
    from regraft.checkpoint.reader import Checkpoint

# Part of every recorded fingerprint: changing these changes them all. 15 GB take about a second.
SAMPLES = 32
SAMPLE_BYTES = 256
READ_BYTES = 1 << 22  # 4 MiB per read of a full fingerprint


def fingerprint(
    checkpoint: Checkpoint, hashed_name: Callable[[str], str | None] | None = None, *, full: bool = False
) -> str:
    """Hash each tensor's name, dtype, shape and a fixed sample of its bytes.

    Tensors of up to 8 KiB are hashed whole. Of larger ones, 32 evenly spaced samples are hashed, including the first
    and last bytes, so that any further training changes the fingerprint.

    Args:
        checkpoint: The weights.
        hashed_name: Maps a tensor's name to the name to hash, or to None to leave the tensor out. By default all
            tensors are hashed under their own names.
        full: Whether to hash every byte.

    Returns:
        `sample:` or `full:` and 32 hexadecimal digits; independent of the order of tensors and files.
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
                for start, size in _all_ranges(part) if full else _sampled_ranges(part):
                    streams[part.file].seek(start)
                    digest.update(streams[part.file].read(size))
            dtype = f"{tensor.codes.dtype} {tensor.block}" if isinstance(tensor, QuantisedTensor) else tensor.dtype
            lines.append(f"{key}\0{dtype}\0{tensor.shape}\0{digest.hexdigest()}")
    finally:
        for stream in streams.values():
            stream.close()
    return ("full:" if full else "sample:") + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


def _sampled_ranges(tensor: StoredTensor) -> list[tuple[int, int]]:
    size = tensor.end - tensor.start
    if size <= SAMPLES * SAMPLE_BYTES:
        return [(tensor.start, size)]
    last = tensor.end - SAMPLE_BYTES
    return [(tensor.start + (last - tensor.start) * i // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]


def _all_ranges(tensor: StoredTensor) -> list[tuple[int, int]]:
    return [(tensor.start + start, size) for start, size in chunk_ranges(tensor.end - tensor.start, READ_BYTES)]
