"""The order in which training sees examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

GROUPED_BATCHES = 50


def plan_order(
    lengths: np.ndarray[Any, np.dtype[np.int64]], batch_size: int, steps: int, seed: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Fix which examples each step of a training sees, batches being of similar length.

    The order depends on nothing but its arguments, so methods can be compared on it and an interrupted run finds
    its place in it.

    Args:
        lengths: The length of each example, in tokens.
        batch_size: Examples a step.
        steps: How many steps.
        seed: What the order is drawn from.

    Returns:
        Example indices, steps × batch_size in one row: as many whole passes over the data as that takes.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    total, examples = steps * batch_size, len(lengths)
    order = np.concatenate([random.permutation(examples) for _ in range(-(-total // examples))])[:total]
    window = batch_size * min(GROUPED_BATCHES, max(1, examples // batch_size))
    for start in range(0, total, window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches = part.reshape(-1, batch_size)
        order[start : start + window] = batches[random.permutation(len(batches))].reshape(-1)
    return order
