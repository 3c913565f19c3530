"""The records in an adaptation's folder: its base, labels and task type."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.checkpoint import read_json, write_atomic
from regraft.errors import MAX_LISTED, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from regraft.base import Base

LINEAGE_FILE = "lineage.json"
OUTCOME_FILE = "outcome.json"


class LineageRecord(NamedTuple):
    """The lineage of an adaptation as it is recorded; None for what is unknown.

    Args:
        labels: The label names, in the order of the head's outputs.
        base: The fingerprint of the base.
        task_type: The name of the task type.
    """

    labels: tuple[str, ...] | None = None
    base: str | None = None
    task_type: str | None = None


def read_lineage(folder: Path) -> LineageRecord:
    """Read what regraft recorded in an adaptation's folder, and in the outcome that it is part of.

    Args:
        folder: The adaptation's folder.

    Raises:
        CheckpointError: A record is malformed, or the two contradict each other.
    """
    files = [folder / LINEAGE_FILE, *([folder.parent / OUTCOME_FILE] if folder.name == "adaptation" else [])]
    records = {file: _parse_lineage(read_json(file), file) for file in files if file.is_file()}
    merged = {}
    for field, name in (("labels", "labels"), ("base", "base"), ("task_type", "task type")):
        values = {file: value for file, record in records.items() if (value := getattr(record, field)) is not None}
        if len(set(values.values())) > 1:
            listed = " and ".join(f"{file} says {value!r:.100}" for file, value in values.items())
            raise CheckpointError(
                f"{folder}: its records contradict each other on its {name}: {listed}. Remove the wrong one."
            )
        merged[field] = next(iter(values.values()), None)
    return LineageRecord(**merged)


def labels_of_config(config: dict[str, Any], folder: Path) -> tuple[str, ...] | None:
    """Read the label names from the `config.json` of a classifier.

    Args:
        config: The content of `config.json`.
        folder: Its folder.

    Returns:
        The names in the order of the head's outputs; None if there are none, or only the placeholders of
        transformers.

    Raises:
        CheckpointError: `id2label` does not number the outputs from 0 on, repeats a name, or contradicts `label2id`.
    """
    names, numbers = config.get("id2label") or {}, config.get("label2id") or {}
    if not isinstance(names, dict) or sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        raise CheckpointError(
            f"{folder}/config.json: id2label is {names!r:.100}, not names of the outputs from 0 on. Correct it."
        )
    labels = tuple(str(names[str(i)]) for i in range(len(names)))
    if isinstance(numbers, dict) and any(str(numbers.get(label, i)) != str(i) for i, label in enumerate(labels)):
        raise CheckpointError(
            f"{folder}/config.json: id2label is {names!r:.100}, but label2id is {numbers!r:.100}. Correct one of them."
        )
    _check_distinct(labels, f"{folder}/config.json: id2label")
    placeholders = tuple(f"LABEL_{i}" for i in range(len(labels)))
    return labels if labels and labels != placeholders else None


def reconcile_labels(
    recorded: tuple[str, ...] | None, configured: tuple[str, ...] | None, folder: Path
) -> tuple[str, ...] | None:
    """Return the labels that regraft recorded, or else those of `config.json`.

    Args:
        recorded: The labels of `read_lineage`.
        configured: The result of `labels_of_config`.
        folder: The adaptation's folder.

    Raises:
        CheckpointError: Both are known, and they differ in names or order.
    """
    if recorded and configured and recorded != configured:
        listed, others = (", ".join(labels[:MAX_LISTED]) for labels in (recorded, configured))
        raise CheckpointError(
            f"{folder}: its records contradict each other on its labels: {LINEAGE_FILE} has {listed}, config.json "
            f"{others}. Correct the one that is not in the order of the head's outputs."
        )
    return recorded or configured


def write_lineage(folder: Path, base: Base, labels: Sequence[str] | None, task_type: str | None) -> None:
    """Write an adaptation's base, labels and task type, which transformers and PEFT do not record.

    Args:
        folder: The adaptation's folder.
        base: The base.
        labels: The label names, in the order of the head's outputs; None if unknown.
        task_type: The name of the task type; None if unknown.
    """
    record = {
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "labels": list(labels) if labels is not None else None,
        "task_type": task_type,
    }
    write_atomic(folder / LINEAGE_FILE, json.dumps(record, indent=2) + "\n")


def _parse_lineage(record: dict[str, Any], file: Path) -> LineageRecord:
    labels = record.get("labels")
    base = record.get("base") or {}
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise CheckpointError(f"{file}: labels is {labels!r:.100}, not a list of names. Correct it.")
    if not isinstance(base, dict):
        raise CheckpointError(f"{file}: base is {base!r:.100}, not an object with a fingerprint. Correct it.")
    _check_distinct(labels or [], f"{file}: labels")
    fingerprint = base.get("fingerprint")
    task, task_type = record.get("task"), record.get("task_type")
    if isinstance(task, dict):  # in the record of an outcome
        task_type = task.get("type")
    return LineageRecord(
        tuple(labels) if labels else None,
        str(fingerprint) if fingerprint else None,
        str(task_type) if task_type else None,
    )


def _check_distinct(labels: Sequence[str], origin: str) -> None:
    repeated = sorted(label for label, count in Counter(labels).items() if count > 1)
    if repeated:
        listed = ", ".join(map(repr, repeated[:MAX_LISTED]))
        raise CheckpointError(f"{origin} names {listed} more than once. Correct the names.")
