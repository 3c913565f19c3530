"""What a task's examples look like, in figures, and what makes its scores doubtful."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.task.data import duplicates

if TYPE_CHECKING:
    from regraft.task.data import TaskData
    from regraft.task.split import Split

FEW = 10
"""With fewer examples one of them moves accuracy by more than 10 points, and a bootstrap has too little to resample."""


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """The figures of a split.

    Args:
        name: `train`, `dev` or `test`.
        source: What it was read from.
        examples: How many there are.
        counts: How many of each stratum, which in classification is a class.
        absent: The strata that no example has.
        median_words: Half of the examples have at most so many words (between blanks; a pair's texts together).
        p95_words: 95 % of the examples have at most so many words.
        max_words: The words of the longest example.
    """

    name: str
    source: str
    examples: int
    counts: dict[str, int]
    absent: tuple[str, ...]
    median_words: float
    p95_words: float
    max_words: int


def summarise(data: TaskData) -> list[SplitSummary]:
    """Sum up the splits of a task.

    Args:
        data: The task.

    Returns:
        The figures of train, of dev, and of test if there is one.
    """
    return [_summary(split, data) for split in (data.train, data.dev, data.test) if split is not None]


def _summary(split: Split, data: TaskData) -> SplitSummary:
    import numpy as np

    strata, names = data.task.strata(split.targets, data.labels)
    counts = dict(zip(names, np.bincount(strata, minlength=len(names)).tolist(), strict=True))
    words = np.array([data.task.count_words(inputs) for inputs in split.inputs])
    return SplitSummary(
        split.name,
        split.source,
        len(split),
        counts,
        tuple(name for name, count in counts.items() if not count),
        float(np.median(words)),
        float(np.quantile(words, 0.95)),
        int(words.max()),
    )


def data_warnings(data: TaskData) -> list[str]:
    """Find what makes the scores of a task doubtful.

    Args:
        data: The task.

    Returns:
        A sentence for each: labels that look alike or stand for missing ones, a dev or test split that is tiny or of a
        single class, texts of test that are in train too.
    """
    labels = data.task.label_warnings(data.labels) if data.labelled else []
    sentences = [f"{data.train.source}: {doubt}" for doubt in labels]
    for split in (data.dev, data.test):
        if split is not None and (why := weakness(data, split)):
            sentences.append(f"{split.source}: {split.name} has {why}.")
    if data.test is not None and (pairs := duplicates(data.train, data.test)):
        in_train, in_test = pairs[0]
        sentences.append(
            f"{data.test.source}: {len(pairs):,} of {len(data.test):,} examples of test are in train too (row "
            f"{in_test} there is row {in_train} of {data.train.source}); scores on them tell nothing of new texts."
        )
    return sentences


def weakness(data: TaskData, split: Split) -> str | None:
    """Say why scores on a split settle nothing, if so.

    Args:
        data: The task.
        split: Its dev or test.

    Returns:
        What it has, as `1 example, too few …`; None where it is large and mixed enough to measure on.
    """
    if len(split) < FEW:
        plural = "s" if len(split) > 1 else ""
        return f"{len(split)} example{plural}, too few to tell models apart: use {FEW} or more, better hundreds"
    return data.task.target_weakness(split.targets) if data.labelled else None
