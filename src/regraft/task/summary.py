"""What a task's examples look like, in figures."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regraft.task.data import Split, TaskData


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """The figures of a split.

    Args:
        name: `train`, `dev` or `test`.
        source: What it was read from.
        examples: How many there are.
        counts: How many of each label, in the order of the classes.
        absent: The labels that no example has.
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
    return [_summary(split, data.labels) for split in (data.train, data.dev, data.test) if split is not None]


def _summary(split: Split, labels: tuple[str, ...]) -> SplitSummary:
    import numpy as np

    counts = dict(zip(labels, np.bincount(split.labels, minlength=len(labels)).tolist(), strict=True))
    words = np.array([sum(len(text.split()) for text in texts) for texts in split.texts])
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
