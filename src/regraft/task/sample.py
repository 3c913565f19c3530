"""Stratified samples of examples, determined by a seed and the examples' content alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING

from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.task.split import Split
    from regraft.task.types import Task

HELD_OUT_FRACTION = 0.1
"""The fraction of each stratum of train held out as dev or test: train loses little, and they are not tiny."""
TEST_SEED = 0
"""The seed of a held-out test split: the same in all runs, so that no test example is in the train of another run."""


def draw_indices(split: Split, task: Task, labels: Sequence[str], counts: Sequence[int], seed: int) -> list[int]:
    """Draw a number of examples from each stratum; in classification, a stratum is a class.

    Examples are ranked by a hash of the seed and their content, so the sample does not depend on their order.

    Args:
        split: The examples to draw from.
        task: The task, which divides its examples into strata.
        labels: The label names, in the order of the outputs.
        counts: The number of examples to draw from each stratum; a stratum that has fewer is drawn whole.
        seed: The seed of the ranking.

    Returns:
        The indices of the drawn examples, in the order of their ranks.
    """
    strata = task.strata(split.targets, labels)[0].tolist()
    hashes = [
        hashlib.sha256(json.dumps([seed, inputs, task.describe(target, labels)]).encode()).digest()
        for inputs, target in zip(split.inputs, split.targets.tolist(), strict=True)
    ]
    remaining = list(counts)
    indices = []
    for index in sorted(range(len(hashes)), key=hashes.__getitem__):
        if remaining[strata[index]] > 0:
            remaining[strata[index]] -= 1
            indices.append(index)
    return indices


def hold_out(train: Split, task: Task, labels: Sequence[str], seed: int, name: str = "dev") -> tuple[Split, Split]:
    """Hold out a split from train: a tenth of each stratum, and at least one example of each that has two or more.

    Args:
        train: All training examples.
        task: The task, which divides its examples into strata.
        labels: The label names, in the order of the outputs.
        seed: The seed of the sample.
        name: The name of the split to hold out, `dev` or `test`.

    Returns:
        The remaining train split and the held-out split, both in the order of the source.

    Raises:
        DataError: No stratum has more than one example.
    """
    import numpy as np

    strata, names = task.strata(train.targets, labels)
    sizes = np.bincount(strata, minlength=len(names)).tolist()
    counts = [max(1, round(HELD_OUT_FRACTION * size)) if size > 1 else 0 for size in sizes]
    indices = draw_indices(train, task, labels, counts, seed)
    if not indices:
        raise DataError(
            f"{train.source}: there is a single example of each stratum, such as a class, so none can be held out "
            f"as {name}. Add examples, or name a source under `{name}`."
        )
    is_held_out = np.zeros(len(train), dtype=bool)
    is_held_out[indices] = True
    held_out = dataclasses.replace(train.take(np.flatnonzero(is_held_out)), name=name)
    return train.take(np.flatnonzero(~is_held_out)), held_out
