"""The record of an outcome, as in `outcome.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from regraft.checkpoint.record import Count, read_record
from regraft.errors import OutcomeError
from regraft.task.types.type import DEFAULT_TYPE

SCHEMA = 2
"""The version of the format of `outcome.json` that is written."""
READABLE_SCHEMAS = (1, 2)  # predictions.jsonl of schema 1 lacks `right`, which follows from labels and predictions

AGREEMENT = "agreement with the old model on dev"
"""The note on the scores of a curve that is agreement, of which more is better."""
ANSWER_LOSS = "loss of the old model's answers on dev"
"""The note on the scores of a curve that is the loss of answers that the old model wrote, of which less is better."""


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """The task of an outcome.

    Args:
        name: The task's name.
        metric: The metric's name.
        digest: The digest of the data.
        train: The number of training examples.
        type: The name of the task type. Records of regraft 0.1, which had only the default type, lack it.
        selection: The name of the metric by which the best weights were selected; None if it is `metric`.
    """

    name: str
    metric: str
    digest: str
    train: Count
    type: str = DEFAULT_TYPE
    selection: str | None = None

    @property
    def curve_metric(self) -> str:
        """The name of the metric of the learning curve and of `Scores.dev_at_start`."""
        return self.selection or self.metric


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of an outcome; None for a split that is missing or has no targets.

    Args:
        dev: The dev score of the final weights.
        dev_majority: The dev score of guessing without looking at the input; None for a language model.
        test: The test score of the final weights.
        test_majority: The test score of guessing without looking at the input; None for a language model.
        dev_at_start: The dev score before the first step, by the metric of the learning curve.
    """

    dev: float | None = None
    dev_majority: float | None = None
    test: float | None = None
    test_majority: float | None = None
    dev_at_start: float | None = None

    def of(self, split: str) -> float | None:
        """Return the final weights' score.

        Args:
            split: `dev` or `test`.
        """
        return self.test if split == "test" else self.dev

    def majority(self, split: str) -> float | None:
        """Return the score of guessing without looking at the input.

        Args:
            split: `dev` or `test`.
        """
        return self.test_majority if split == "test" else self.dev_majority


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of an outcome.

    Args:
        steps: Optimiser steps.
        seconds: Seconds of training, or of the whole method if it does not train.
        labels: The number of labelled training examples used.
    """

    steps: Count
    seconds: float
    labels: Count


@dataclasses.dataclass(frozen=True)
class BaseRecord:
    """A base model.

    Args:
        name: The folder or hub id.
        fingerprint: The fingerprint of the weights.
    """

    name: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Source:
    """The adaptation that an outcome was recycled from.

    Args:
        adaptation: The folder of the old adaptation.
        fingerprint: The fingerprint of its weights.
        old_base: The base it was tuned on.
        old_base_fingerprint: The fingerprint of that base's weights.
        lineage: Whether it belongs to that base: `proven`, `unproven` or `forced`.
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
        method: The method's name; `tune` for an outcome of `tune`.
        kind: The kind of adaptation.
        inputs: The inputs of the run: options, recipe, digest of the data, fingerprints.
        task: The task.
        labels: The label names, in the order of the head's outputs.
        seed: The seed.
        recipe: The recipe, with the values that depend on the data filled in.
        scores: The scores.
        best_step: The step whose weights were selected.
        cost: The cost.
        notes: What the method measured or decided.
        base: The adaptation's base.
        recycled_from: The old adaptation; None for an outcome of `tune`.
        versions: The versions of Python and packages.
        schema: The version of this format.
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

    @property
    def curve_is_agreement(self) -> bool:
        """Whether the scores of the learning curve are agreement with the old model, not the task's metric."""
        return "score" in self.notes or "cannot_know" in self.notes  # `auto` of regraft 0.1 noted the latter alone

    @property
    def has_empty_curve(self) -> bool:
        """Whether the learning curve is empty: nothing was trained, and without labels nothing was scored."""
        return not self.cost.steps and self.scores.dev is None


def read_outcome_record(content: dict[str, Any], file: str) -> OutcomeRecord:
    """Read the record of an outcome.

    Args:
        content: The content of `outcome.json`.
        file: Path of the file, for error messages.

    Raises:
        OutcomeError: The schema is unknown, or a field is missing or has the wrong type.
    """
    if content.get("schema") not in READABLE_SCHEMAS:
        raise OutcomeError(
            f"{file}: has schema {content.get('schema')!r:.40}, this version of regraft reads {READABLE_SCHEMAS}. "
            "Update regraft."
        )
    return read_record(OutcomeRecord, content, file, "the method that made it")
