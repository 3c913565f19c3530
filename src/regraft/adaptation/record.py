"""The small files beside an adaptation's tensors: what it records of its base and its labels."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import read_json, write_atomic
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from regraft.base import Base

RECORD = "lineage.json"
OUTCOME = "outcome.json"


def read_lineage(folder: Path) -> tuple[tuple[str, ...] | None, str | None, str | None]:
    """Read what regraft wrote beside an adaptation, in its own folder and in the outcome that it is part of.

    Args:
        folder: The adaptation's folder.

    Returns:
        The label names in the order of the head's outputs, the fingerprint of the base, and the type of task; None
        what is unknown.

    Raises:
        CheckpointError: A record is malformed, or the two contradict each other.
    """
    files = [folder / RECORD, *([folder.parent / OUTCOME] if folder.name == "adaptation" else [])]
    found = [(file, *_lineage(read_json(file), file)) for file in files if file.is_file()]
    for what, place in (("labels", 1), ("base", 2), ("task type", 3)):
        said = [entry for entry in found if entry[place] is not None]
        if len({entry[place] for entry in said}) > 1:
            told = " and ".join(f"{entry[0]} says {entry[place]!r:.100}" for entry in said)
            raise CheckpointError(f"{folder}: its records contradict each other on its {what}: {told}. Which is right?")
    labels = next((entry[1] for entry in found if entry[1] is not None), None)
    base = next((entry[2] for entry in found if entry[2] is not None), None)
    return labels, base, next((entry[3] for entry in found if entry[3] is not None), None)


def labels_of_config(config: dict[str, Any], folder: Path) -> tuple[str, ...] | None:
    """Read the label names of a classifier's `config.json`.

    Args:
        config: Its content.
        folder: The folder it is in.

    Returns:
        The names in the order of the head's outputs; None if there are only transformers' placeholders.

    Raises:
        CheckpointError: They are no names of outputs from 0 on, or its two maps contradict each other.
    """
    names, numbers = config.get("id2label") or {}, config.get("label2id") or {}
    if not isinstance(names, dict) or sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        raise CheckpointError(f"{folder}/config.json: id2label is {names!r:.100}, not names of the outputs from 0 on.")
    labels = tuple(str(names[str(i)]) for i in range(len(names)))
    if isinstance(numbers, dict) and any(str(numbers.get(label, i)) != str(i) for i, label in enumerate(labels)):
        raise CheckpointError(
            f"{folder}/config.json: id2label is {names!r:.100} and label2id {numbers!r:.100}: which is right?"
        )
    _refuse_twins(labels, f"{folder}/config.json: id2label")
    placeholders = tuple(f"LABEL_{i}" for i in range(len(labels)))
    return labels if labels and labels != placeholders else None


def reconcile_labels(
    known: tuple[str, ...] | None, configured: tuple[str, ...] | None, folder: Path
) -> tuple[str, ...] | None:
    """Hold the labels that regraft recorded against those of `config.json`.

    Args:
        known: From `recorded`.
        configured: From `labels_of_config`.
        folder: The adaptation's folder.

    Returns:
        The labels.

    Raises:
        CheckpointError: They are not the same names in the same order.
    """
    if known and configured and known != configured:
        raise CheckpointError(
            f"{folder}: its records contradict each other on its labels: {RECORD} says {', '.join(known[:8])}, "
            f"config.json {', '.join(configured[:8])}. Which is the order of the head's outputs?"
        )
    return known or configured


def write_lineage(folder: Path, base: Base, labels: Sequence[str] | None, task_type: str | None) -> None:
    """Write beside an adaptation's tensors what neither transformers nor PEFT records: base, labels, type of task.

    Args:
        folder: The adaptation's folder.
        base: The base it lives on.
        labels: The label names, in the order of the head's outputs; None if unknown.
        task_type: The type of task that it is for; None if unknown.
    """
    record = {
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "labels": list(labels) if labels is not None else None,
        "task_type": task_type,
    }
    write_atomic(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _lineage(record: dict[str, Any], file: Path) -> tuple[tuple[str, ...] | None, str | None, str | None]:
    labels, base = record.get("labels"), record.get("base") or {}
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise CheckpointError(f"{file}: labels is {labels!r:.100}, not a list of names.")
    if not isinstance(base, dict):
        raise CheckpointError(f"{file}: base is {base!r:.100}, not an object with a fingerprint.")
    _refuse_twins(labels or [], f"{file}: labels")
    mark = base.get("fingerprint")
    task, task_type = record.get("task"), record.get("task_type")
    if isinstance(task, dict):  # as in the record of an outcome
        task_type = task.get("type")
    return tuple(labels) if labels else None, str(mark) if mark else None, str(task_type) if task_type else None


def _refuse_twins(labels: tuple[str, ...] | list[str], where: str) -> None:
    twins = sorted(label for label, count in Counter(labels).items() if count > 1)
    if twins:
        raise CheckpointError(f"{where} names {', '.join(map(repr, twins[:4]))} more than once.")
