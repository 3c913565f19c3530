"""Tables of sets of labels: F1 and flips by label of two models, and the labels of examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.task.types.class_metrics import MICRO_F1
from regraft.task.types.view import Column, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.task.split import Integers, Split

MAX_LABEL_ROWS = 30
"""The number of labels in the table of a split, the most frequent ones: as many rows as fit on a screen."""


def label_comparison(targets: Integers, old: Integers, new: Integers, labels: Sequence[str]) -> Table:
    """Build a table of F1 and flips by label.

    Args:
        targets: The true sets of labels as 0 and 1, examples × labels.
        old: The old model's predictions, in the same form.
        new: The new model's predictions, in the same form.
        labels: The label names.
    """
    columns = (
        Column("label", "text"),
        Column("examples", "count"),
        Column("F1 before", "number"),
        Column("F1 after", "number"),
        Column("change", "change"),
        Column("negative flips", "count"),
        Column("positive flips", "count"),
    )
    rows = []
    for index, label in enumerate(labels):
        target, before, after = (sets[:, [index]] for sets in (targets, old, new))
        old_f1, new_f1 = (float(MICRO_F1.evaluate(target, sets).scores(None)[0]) for sets in (before, after))
        old_right, new_right = before == target, after == target
        negative, positive = int((old_right & ~new_right).sum()), int((~old_right & new_right).sum())
        rows.append((label, int(target.sum()), old_f1, new_f1, new_f1 - old_f1, negative, positive))
    return Table("F1 and flips by label", columns, tuple(rows))


def label_counts(split: Split, labels: Sequence[str]) -> tuple[Table, Table]:
    """Build tables of the number of examples by label, and by number of labels.

    Args:
        split: The examples, whose targets are sets of labels as 0 and 1, examples × labels.
        labels: The label names.
    """
    import numpy as np

    targets = split.targets
    figures = (Column("examples", "count"), Column("share", "share"))
    counts = targets.sum(axis=0)
    most_frequent = np.argsort(-counts, kind="stable")[:MAX_LABEL_ROWS]
    by_label = [(labels[index], int(counts[index]), float(counts[index] / len(targets))) for index in most_frequent]
    sizes = np.bincount(targets.sum(axis=1)).tolist()
    by_size = [(str(size), count, count / len(targets)) for size, count in enumerate(sizes) if count]
    title = f"Labels in {split.name}"
    if len(labels) > MAX_LABEL_ROWS:
        title += f", the {MAX_LABEL_ROWS} most frequent of {len(labels):,}"
    return (
        Table(title, (Column("label", "text"), *figures), tuple(by_label)),
        Table(f"Labels per example in {split.name}", (Column("labels", "text"), *figures), tuple(by_size)),
    )
