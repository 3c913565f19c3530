"""Which weights are these: a fast hash of named tensors, the same however they are sharded."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from regraft.checkpoint.quantised import QuantisedTensor, parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from regraft.checkpoint.header import StoredTensor
    from regraft.checkpoint.reader import Checkpoint

SAMPLES = 32
SAMPLE_BYTES = 256
PIECE_BYTES = 1 << 22


def fingerprint(checkpoint: Checkpoint, keep: Callable[[str], str | None] | None = None, *, full: bool = False) -> str:
    """Hash each tensor's name, dtype, shape and a fixed sample of its bytes.

    Tensors up to 8 KiB are hashed whole, larger ones at 32 evenly spaced places, their ends among them: any
    further training changes it, and 15 GB take about a second.

    Args:
        checkpoint: The weights.
        keep: Gives the name a tensor is hashed under, or None to leave it out. By default all, as they are named.
        full: Whether every byte is hashed.

    Returns:
        `sample:` or `full:` and 32 hexadecimal digits; independent of the order of tensors and files.
    """
    streams = {file: file.open("rb") for file in checkpoint.files}
    try:
        lines = []
        for name, info in checkpoint.tensors.items():
            key = keep(name) if keep else name
            if key is not None:
                digest = hashlib.sha256()
                for part in parts(info):
                    for start, size in _pieces(part) if full else _places(part):
                        streams[part.file].seek(start)
                        digest.update(streams[part.file].read(size))
                dtype = f"{info.codes.dtype} {info.block}" if isinstance(info, QuantisedTensor) else info.dtype
                lines.append(f"{key}\0{dtype}\0{info.shape}\0{digest.hexdigest()}")
    finally:
        for stream in streams.values():
            stream.close()
    return ("full:" if full else "sample:") + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


def _places(info: StoredTensor) -> list[tuple[int, int]]:
    size = info.end - info.start
    if size <= SAMPLES * SAMPLE_BYTES:
        return [(info.start, size)]
    last = info.end - SAMPLE_BYTES
    return [(info.start + (last - info.start) * i // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]


def _pieces(info: StoredTensor) -> list[tuple[int, int]]:
    return [(start, min(PIECE_BYTES, info.end - start)) for start in range(info.start, info.end, PIECE_BYTES)]
