"""The order in which training sees examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

GROUPED_BATCHES = 50
"""Batches that examples are sorted by length within, as transformers' `get_length_grouped_indices` has it."""


def plan_order(
    lengths: np.ndarray[Any, np.dtype[np.int64]], batch_size: int, steps: int, seed: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the order in which a training sees examples, each batch of similar length.

    The order depends on the arguments only: methods that are compared see the same batches, and an interrupted
    training resumes at the same example.

    Args:
        lengths: The length of each example, in tokens.
        batch_size: Examples per step.
        steps: The number of steps.
        seed: The seed of the order.

    Returns:
        Example indices, of shape (steps × batch_size,), from successive passes over the data; the last may be partial.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    total = steps * batch_size
    examples = len(lengths)
    order = np.concatenate([random.permutation(examples) for _ in range(-(-total // examples))])[:total]
    window = batch_size * min(GROUPED_BATCHES, max(1, examples // batch_size))
    for start in range(0, total, window):
        grouped = order[start : start + window]
        grouped = grouped[np.argsort(-lengths[grouped], kind="stable")]
        batches = grouped.reshape(-1, batch_size)
        order[start : start + window] = batches[random.permutation(len(batches))].reshape(-1)
    return order
