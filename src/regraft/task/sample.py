"""Examples drawn by class, from a seed and the texts alone."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.task.split import Split

HELD_OUT = 0.1


def draw(split: Split, labels: Sequence[str], wanted: Sequence[int], seed: int) -> list[int]:
    """Draw a number of examples of each class.

    Examples are ranked by a hash of the seed and their content, so the draw is the same in whatever order they come.

    Args:
        split: What to draw from.
        labels: The label names, in the order of the classes.
        wanted: How many examples of each class; fewer where the split has fewer.
        seed: What the examples are drawn from.

    Returns:
        Indices, in the order drawn.
    """
    classes = split.labels.tolist()
    keys = [
        hashlib.sha256(json.dumps([seed, texts, labels[label]]).encode()).digest()
        for texts, label in zip(split.texts, classes, strict=True)
    ]
    left, drawn = list(wanted), []
    for index in sorted(range(len(keys)), key=keys.__getitem__):
        if left[classes[index]] > 0:
            left[classes[index]] -= 1
            drawn.append(index)
    return drawn


def hold_out(train: Split, labels: Sequence[str], seed: int) -> tuple[Split, Split]:
    """Part a dev split from train: a tenth of each class, at least one of each class that has two.

    Args:
        train: What to part.
        labels: The label names, in the order of the classes.
        seed: What the examples are drawn from.

    Returns:
        What is left of train, and dev; both in the order of the source.

    Raises:
        DataError: No class has an example to spare.
    """
    import dataclasses

    import numpy as np

    counts = np.bincount(train.labels, minlength=len(labels)).tolist()
    chosen = draw(train, labels, [max(1, round(HELD_OUT * count)) if count > 1 else 0 for count in counts], seed)
    if not chosen:
        raise DataError(
            f"{train.source}: has a single example of each class, so none can be held out as dev. "
            "Add examples, or name a file of them under `dev`."
        )
    is_dev = np.zeros(len(train), dtype=bool)
    is_dev[chosen] = True
    dev = dataclasses.replace(train.take(np.flatnonzero(is_dev)), name="dev")
    return train.take(np.flatnonzero(~is_dev)), dev
