"""Numbers that are none: a check of every value of a checkpoint."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from regraft.checkpoint.header import FLOATING
from regraft.errors import CheckpointError
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Collection

    from regraft.checkpoint.reader import Checkpoint

CHUNK_ELEMENTS = 1 << 22


def check_finite(checkpoint: Checkpoint, progress: Progress = silent, names: Collection[str] | None = None) -> None:
    """Refuse a checkpoint with values that are infinite or not a number.

    Args:
        checkpoint: The weights, read in pieces of a few megabytes.
        progress: Told of each piece, in numbers.
        names: The tensors to check; None for all.

    Raises:
        CheckpointError: There are some; the message counts them by tensor.
    """
    import torch

    sizes = {
        name: math.prod(info.shape)
        for name, info in checkpoint.tensors.items()
        if info.dtype in FLOATING and (names is None or name in names)
    }
    total, done = sum(sizes.values()), 0
    found: dict[str, int] = {}
    for name, count in sizes.items():
        for start in range(0, count, CHUNK_ELEMENTS):
            size = min(CHUNK_ELEMENTS, count - start)
            values = checkpoint.flat_slice(name, start, size)
            if not all(map(math.isfinite, values.aminmax())):  # forty times as fast as to count
                found[name] = found.get(name, 0) + size - int(torch.isfinite(values).sum())
            done += size
            progress("check", done, total, {})
    if found:
        named = ", ".join(f"{name} ({count:,} of {sizes[name]:,})" for name, count in list(found.items())[:4])
        raise CheckpointError(
            f"{checkpoint.path}: {len(found)} tensors hold values that are infinite or not a number: {named}"
            f"{' …' if len(found) > 4 else ''}. The training that wrote it diverged: take an earlier checkpoint."
        )
