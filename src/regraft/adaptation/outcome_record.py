"""What `outcome.json` holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from regraft.checkpoint.record import Count, read_record
from regraft.errors import OutcomeError
from regraft.task.types.type import DEFAULT_TYPE

SCHEMA = 2
READ = (1, 2)  # the first has no `right` in predictions.jsonl, which follows from labels and predictions


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """The task of an outcome.

    Args:
        name: Its name.
        metric: Its metric.
        digest: Of its data.
        train: The number of its training examples.
        type: Its type; regraft 0.1 recorded none and had one alone.
    """

    name: str
    metric: str
    digest: str
    train: Count
    type: str = DEFAULT_TYPE


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of an outcome; None where there is no such split, or no label.

    Args:
        dev: Of the final weights on dev.
        dev_majority: Of guessing without looking at an input there.
        test: Of the final weights on test.
        test_majority: Of guessing there.
        dev_at_start: On dev before the first step.
    """

    dev: float | None = None
    dev_majority: float | None = None
    test: float | None = None
    test_majority: float | None = None
    dev_at_start: float | None = None

    def of(self, split: str) -> float | None:
        """Return the score of the final weights.

        Args:
            split: `dev` or `test`.

        Returns:
            The score.
        """
        return self.test if split == "test" else self.dev

    def majority(self, split: str) -> float | None:
        """Return the score of guessing without looking at an input.

        Args:
            split: `dev` or `test`.

        Returns:
            The score.
        """
        return self.test_majority if split == "test" else self.dev_majority


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an outcome took.

    Args:
        steps: Optimiser steps.
        seconds: Seconds of training, or of the whole method where nothing is trained.
        labels: How many labelled training examples were seen.
    """

    steps: Count
    seconds: float
    labels: Count


@dataclasses.dataclass(frozen=True)
class BaseRecord:
    """A base model by its name.

    Args:
        name: Its folder or hub id.
        fingerprint: Of its weights.
    """

    name: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Source:
    """What an adaptation was recycled from.

    Args:
        adaptation: The outdated adaptation's folder.
        fingerprint: Of its weights.
        old_base: The base it was tuned on.
        old_base_fingerprint: Of that base's weights.
        lineage: Whether it is proven to be of that base: `proven`, `unproven` or `forced`.
    """

    adaptation: str
    fingerprint: str
    old_base: str
    old_base_fingerprint: str
    lineage: str


@dataclasses.dataclass(frozen=True)
class OutcomeRecord:
    """The record of an outcome.

    Args:
        method: The method's name; `tune` for what was tuned.
        kind: The kind of adaptation.
        inputs: What the outcome is made from: options, recipe, digest of the data, fingerprints.
        task: The task.
        labels: The label names, in the order of the head's outputs.
        seed: The seed of this run.
        recipe: How it was trained, with what followed from the data filled in.
        scores: Its scores.
        best_step: The step whose weights were kept.
        cost: What it took.
        notes: What the method found out.
        base: The base that the adaptation lives on.
        recycled_from: Where it comes from; None of what was tuned.
        versions: Of the libraries.
        schema: Of this record.
    """

    method: str
    kind: str
    inputs: dict[str, Any]
    task: TaskRecord
    labels: tuple[str, ...]
    seed: int
    recipe: dict[str, Any]
    scores: Scores
    best_step: Count
    cost: Cost
    notes: dict[str, Any]
    base: BaseRecord
    recycled_from: Source | None
    versions: dict[str, str]
    schema: int = SCHEMA


def read_outcome_record(content: dict[str, Any], file: str) -> OutcomeRecord:
    """Read the record of an outcome.

    Args:
        content: What `outcome.json` holds.
        file: Its name, for the message.

    Returns:
        The record.

    Raises:
        OutcomeError: It has another schema, or a field is missing or of another type.
    """
    if content.get("schema") not in READ:
        raise OutcomeError(f"{file}: has schema {content.get('schema')!r:.40}, this regraft reads {READ}.")
    return read_record(OutcomeRecord, content, file, "the method that made it")
