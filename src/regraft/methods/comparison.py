"""The record of a comparison of methods, `comparison.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from regraft.checkpoint.record import percent_to_share, read_record
from regraft.errors import OutcomeError

SCHEMA = 2  # regraft 0.1 wrote no schema, and recovery in percent


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one method with one seed, or their mean over seeds.

    Args:
        method: The name of the method.
        seeds: The seeds.
        start: The score on dev before the first step.
        dev: The best score on dev.
        test: The score on test, or on dev if there is no test. The figures below are of the same split.
        test_deviation: The standard deviation of that score over seeds; None for one seed.
        recovery: (score − majority) / (scratch's score − majority); None if that gap is below 3 points.
        steps_to_scratch: The steps until dev first reached scratch's last score; None if it never did.
        seconds_to_scratch: The same in seconds of training.
        negative_flips: The share of examples that the old deployment has right and this one wrong, 0–1.
        labels: The number of labelled training examples that were used.
        steps: The number of training steps.
        seconds: The seconds of training, or of the whole method if nothing is trained.
    """

    method: str
    seeds: tuple[int, ...]
    start: float
    dev: float
    test: float
    test_deviation: float | None
    recovery: float | None
    steps_to_scratch: float | None
    seconds_to_scratch: float | None
    negative_flips: float
    labels: float
    steps: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of several methods on one task.

    Args:
        task: The name of the task.
        metric: The name of its metric.
        split: The split of the final scores, `test` or `dev`.
        old: The old deployment's score on it: the mean over seeds, on which few-shot draws and splits may depend.
        majority: The score of the best prediction that ignores the input, likewise.
        rows: One row per method, over all seeds.
        outcomes: The outcome folders.
        schema: The schema of this record.
    """

    task: str
    metric: str
    split: str
    old: float
    majority: float
    rows: tuple[Row, ...]
    outcomes: tuple[str, ...]
    schema: int = SCHEMA


def read_comparison(content: dict[str, Any], file: str) -> Comparison:
    """Read a comparison from its JSON.

    Args:
        content: The content of `comparison.json`.
        file: The file's name for error messages.

    Returns:
        The comparison.

    Raises:
        OutcomeError: The schema is unknown, or a field is missing or of another type.
    """
    schema = content.get("schema", 1)
    if schema not in (1, SCHEMA):
        raise OutcomeError(
            f"{file}: has schema {schema!r:.40}, and this version of regraft reads 1 and {SCHEMA}. Run regraft compare "
            "again."
        )
    comparison = read_record(Comparison, content, file, "regraft compare")
    if schema == SCHEMA:
        return comparison
    rows = (dataclasses.replace(row, recovery=percent_to_share(row.recovery)) for row in comparison.rows)
    return dataclasses.replace(comparison, rows=tuple(rows), schema=SCHEMA)
