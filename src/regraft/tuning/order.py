"""The order of examples in training."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regraft.task import Split
    from regraft.task.split import Integers
    from regraft.task.types import Examples

logger = logging.getLogger(__name__)

GROUPED_BATCHES = 50
"""The most consecutive batches whose examples are sorted by length together; the same limit as in transformers'
`get_length_grouped_indices`."""


def plan_order(lengths: Integers, batch_size: int, steps: int, seed: int) -> Integers:
    """Draw the order in which a training sees examples, with examples of similar length in each batch.

    The order depends on the arguments only: methods that are compared see the same batches, and an interrupted
    training resumes at the same example.

    Args:
        lengths: The length of each example, in tokens.
        batch_size: Examples per step.
        steps: Optimiser steps of the training.
        seed: The seed of the order.

    Returns:
        Example indices, of shape (steps × batch_size,): successive passes over the data, of which the last may be cut
        short, reordered within windows of up to `GROUPED_BATCHES` batches. A window may contain the end of a pass and
        the start of the next.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    total = steps * batch_size
    num_examples = len(lengths)
    num_passes = math.ceil(total / num_examples)
    order = np.concatenate([rng.permutation(num_examples) for _ in range(num_passes)])[:total]
    window = batch_size * min(GROUPED_BATCHES, max(1, num_examples // batch_size))
    for start in range(0, total, window):
        indices = order[start : start + window]
        by_length = indices[np.argsort(-lengths[indices], kind="stable")]
        batches = by_length.reshape(-1, batch_size)
        order[start : start + window] = batches[rng.permutation(len(batches))].reshape(-1)
    return order


def plan_labelled_order(
    examples: Examples, split: Split, batch_size: int, steps: int, seed: int, max_length: int
) -> Integers:
    """Draw the order of a training as `plan_order` does, without the examples that have no row to learn from.

    Args:
        examples: The tokenised training examples, at least one with a row.
        split: The same examples, for messages.
        batch_size: Examples per step.
        steps: Optimiser steps of the training.
        seed: The seed of the order.
        max_length: The number of tokens that examples were truncated to, for messages.

    Returns:
        Example indices, of shape (steps × batch_size,).
    """
    import numpy as np

    if examples.tokens is None:
        return plan_order(examples.lengths, batch_size, steps, seed)
    indices = np.flatnonzero([bool(tokens) for tokens in examples.tokens])
    if len(indices) < len(examples):
        logger.warning(
            "%s: %s of %s training examples have nothing to learn within %s tokens, such as a prompt that fills them; "
            "they are left out. Raise max_length if the base takes more.",
            split.source,
            f"{len(examples) - len(indices):,}",
            f"{len(examples):,}",
            f"{max_length:,}",
        )
    order: Integers = indices[plan_order(examples.lengths[indices], batch_size, steps, seed)]
    return order
