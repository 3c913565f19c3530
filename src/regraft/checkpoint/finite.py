"""A check of all elements of a checkpoint for infinities and NaN."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from regraft.checkpoint.header import FLOATING
from regraft.checkpoint.reader import chunk_ranges
from regraft.errors import MAX_LISTED, CheckpointError
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Collection

    from regraft.checkpoint.reader import Checkpoint

CHUNK_ELEMENTS = 1 << 22  # 16 MiB in float32: large reads, because only a minimum and a maximum are computed
"""The number of elements that are read at once."""


def check_finite(checkpoint: Checkpoint, progress: Progress = silent, names: Collection[str] | None = None) -> None:
    """Refuse a checkpoint that holds infinite or NaN values.

    Args:
        checkpoint: The weights, of which `CHUNK_ELEMENTS` are read at a time.
        progress: Called for each chunk, in elements.
        names: The names of the tensors to check; None for all. Integer tensors are not checked.

    Raises:
        CheckpointError: Some values are infinite or NaN; the message counts them by tensor.
    """
    import torch

    sizes = {
        name: math.prod(tensor.shape)
        for name, tensor in checkpoint.tensors.items()
        if tensor.dtype in FLOATING and (names is None or name in names)
    }
    total = sum(sizes.values())
    checked = 0
    nonfinite_counts: Counter[str] = Counter()
    for name, size in sizes.items():
        for start, count in chunk_ranges(size, CHUNK_ELEMENTS):
            values = checkpoint.flat_slice(name, start, count)
            if not all(map(math.isfinite, values.aminmax())):  # this test is forty times as fast as counting
                nonfinite_counts[name] += count - int(torch.isfinite(values).sum())
            checked += count
            progress("check", checked, total, {})
    if nonfinite_counts:
        listed = [f"{name} ({count:,} of {sizes[name]:,})" for name, count in nonfinite_counts.items()]
        raise CheckpointError(
            f"{checkpoint.path}: {len(listed)} tensors hold values that are infinite or NaN: "
            f"{', '.join(listed[:MAX_LISTED])}{' …' if len(listed) > MAX_LISTED else ''}. The training that wrote it "
            "diverged: use an earlier checkpoint."
        )
