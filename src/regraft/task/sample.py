"""Examples drawn by stratum, from a seed and their content alone."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.task.split import Split
    from regraft.task.types import Task

HELD_OUT = 0.1


def draw(split: Split, task: Task, labels: Sequence[str], counts: Sequence[int], seed: int) -> list[int]:
    """Draw a number of examples of each stratum, which in classification is a class.

    Examples are ranked by a hash of the seed and their content, so the draw is the same in whatever order they come.

    Args:
        split: What to draw from.
        task: The task.
        labels: The label names, in the order of the outputs.
        counts: How many examples of each stratum; fewer where the split has fewer.
        seed: What the examples are drawn from.

    Returns:
        Indices, in the order drawn.
    """
    strata = task.strata(split.targets, labels)[0].tolist()
    keys = [
        hashlib.sha256(json.dumps([seed, inputs, task.describe(target, labels)]).encode()).digest()
        for inputs, target in zip(split.inputs, split.targets.tolist(), strict=True)
    ]
    left, drawn = list(counts), []
    for index in sorted(range(len(keys)), key=keys.__getitem__):
        if left[strata[index]] > 0:
            left[strata[index]] -= 1
            drawn.append(index)
    return drawn


def hold_out(train: Split, task: Task, labels: Sequence[str], seed: int) -> tuple[Split, Split]:
    """Part a dev split from train: a tenth of each stratum, at least one of each stratum that has two.

    Args:
        train: What to part.
        task: The task.
        labels: The label names, in the order of the outputs.
        seed: What the examples are drawn from.

    Returns:
        What is left of train, and dev; both in the order of the source.

    Raises:
        DataError: No stratum has an example to spare.
    """
    import dataclasses

    import numpy as np

    strata, names = task.strata(train.targets, labels)
    sizes = np.bincount(strata, minlength=len(names)).tolist()
    counts = [max(1, round(HELD_OUT * size)) if size > 1 else 0 for size in sizes]
    chosen = draw(train, task, labels, counts, seed)
    if not chosen:
        raise DataError(
            f"{train.source}: has a single example of each class, so none can be held out as dev. "
            "Add examples, or name a file of them under `dev`."
        )
    is_dev = np.zeros(len(train), dtype=bool)
    is_dev[chosen] = True
    dev = dataclasses.replace(train.take(np.flatnonzero(is_dev)), name="dev")
    return train.take(np.flatnonzero(~is_dev)), dev
