"""What came of several methods, as `comparison.json` holds it."""

from __future__ import annotations

import dataclasses
from typing import Any

from regraft.checkpoint.record import percent_to_share, read_record
from regraft.errors import OutcomeError

SCHEMA = 2  # regraft 0.1 wrote no schema, and recovery in percent


@dataclasses.dataclass(frozen=True)
class Row:
    """One method with one seed, or the mean over seeds.

    Args:
        method: Its name.
        seeds: The seeds it stands for.
        start: The score on dev before the first step.
        dev: The best score on dev.
        test: The score on test; on dev where there is no test. The figures below are of the same split.
        test_deviation: Its standard deviation over seeds, None for one seed.
        recovery: (score − majority) / (scratch's score − majority), None where that gap is below 3 points.
        steps_to_scratch: Steps until dev first reached scratch's last score, None if it never did.
        seconds_to_scratch: The same in seconds of training.
        negative_flips: The share of examples the old deployment had right and this has wrong.
        labels: Labelled training examples that were seen.
        steps: Steps of the whole training.
        seconds: Seconds of it; of the whole method where nothing is trained.
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
    """What came of several methods.

    Args:
        task: The task's name.
        metric: Its metric.
        split: What the final scores are measured on, `test` or `dev`.
        old: The old deployment's score there: the old weights on the old base. The mean over seeds, as few-shot draws
            and splits may change with them.
        majority: The score of guessing without looking at an input, likewise.
        rows: One a method, over all seeds.
        outcomes: The outcome folders.
        schema: Of this record.
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
    """Read a comparison.

    Args:
        content: What `comparison.json` holds.
        file: Its name, for the message.

    Returns:
        The comparison.

    Raises:
        OutcomeError: It has another schema, or a field is missing or of another type.
    """
    schema = content.get("schema", 1)
    if schema not in (1, SCHEMA):
        raise OutcomeError(
            f"{file}: has schema {schema!r:.40}, this regraft reads 1 and {SCHEMA}. Make it again with this regraft's "
            "`regraft compare`."
        )
    comparison = read_record(Comparison, content, file, "regraft compare")
    if schema == SCHEMA:
        return comparison
    rows = (dataclasses.replace(row, recovery=percent_to_share(row.recovery)) for row in comparison.rows)
    return dataclasses.replace(comparison, rows=tuple(rows), schema=SCHEMA)
