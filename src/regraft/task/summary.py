"""Statistics of a task's examples, and warnings about problems that make its scores unreliable."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.task.data import find_duplicates

if TYPE_CHECKING:
    from regraft.task.data import TaskData
    from regraft.task.split import Split

MIN_EXAMPLES = 10
"""The least size of a split: in a smaller one, one example moves accuracy by more than 10 points."""


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """The statistics of a split.

    Args:
        name: `train`, `dev` or `test`.
        source: The file or data set that the examples were read from.
        examples: The number of examples.
        counts: The number of examples by stratum; in classification, a stratum is a class.
        absent: The strata without examples.
        median_words: The median number of words per example, separated by whitespace, in both texts of a pair.
        p95_words: The 95th percentile of the number of words per example.
        max_words: The number of words of the longest example.
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
    """Compute the statistics of a task's splits.

    Returns:
        The statistics of train, dev, and test if the task has one.
    """
    return [_summarise_split(split, data) for split in (data.train, data.dev, data.test) if split is not None]


def _summarise_split(split: Split, data: TaskData) -> SplitSummary:
    """Count the examples of a split by stratum, and the words per example."""
    import numpy as np

    strata, names = data.task.strata(split.targets, data.labels)
    counts = dict(zip(names, np.bincount(strata, minlength=len(names)).tolist(), strict=True))
    words = np.array([data.task.count_words(inputs) for inputs in split.inputs])
    return SplitSummary(
        name=split.name,
        source=split.source,
        examples=len(split),
        counts=counts,
        absent=tuple(name for name, count in counts.items() if not count),
        median_words=float(np.median(words)),
        p95_words=float(np.quantile(words, 0.95)),
        max_words=int(words.max()),
    )


def data_warnings(data: TaskData) -> list[str]:
    """Describe problems that make a task's scores unreliable.

    Returns:
        One message per problem: label names that look alike or look like missing values, a dev or test split that is
        tiny or of a single class, test examples that are also in train.
    """
    label_warnings = data.task.label_warnings(data.labels) if data.labelled else []
    warnings = [f"{data.train.source}: {warning}" for warning in label_warnings]
    for split in (data.dev, data.test):
        problem = weakness(data, split) if split is not None else None
        if split is not None and problem:
            warnings.append(f"{split.source}: {split.name} has {problem}.")
    pairs = find_duplicates(data.train, data.test)
    if data.test is not None and pairs:
        train_row, test_row = pairs[0]
        warnings.append(
            f"{data.test.source}: {len(pairs):,} of {len(data.test):,} test examples are also in train (row "
            f"{test_row} is row {train_row} of {data.train.source}); scores on them say nothing about new texts."
        )
    return warnings


def weakness(data: TaskData, split: Split) -> str | None:
    """Explain why scores on a split cannot tell models apart.

    Args:
        data: The task's data.
        split: The dev or test split of `data`.

    Returns:
        A noun phrase such as `1 example, too few …`; None if the split is large and varied enough.
    """
    if len(split) < MIN_EXAMPLES:
        plural = "s" if len(split) > 1 else ""
        return (
            f"{len(split)} example{plural}, too few to tell models apart: use at least {MIN_EXAMPLES}, better hundreds"
        )
    return data.task.target_weakness(split.targets) if data.labelled else None
