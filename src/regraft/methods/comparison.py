"""The results of a comparison of methods, and their record in `comparison.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from regraft.checkpoint.record import percent_to_share, read_record
from regraft.errors import OutcomeError

COMPARISON_FILE = "comparison.json"
SCHEMA = 2
"""The current schema. Schema 1, of regraft 0.1, has no field for the schema, and recovery in percent."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one method with one seed, or their mean over seeds.

    If a method's learning curve measures agreement with the old model rather than the metric, as that of `label-free`
    does, it has no relation to scratch's: `start` and the steps and seconds to scratch are None, and `dev` is the dev
    score of the final weights.

    Args:
        method: The name on the command line.
        seeds: The seed of the row, or all seeds that it is the mean of.
        start: The dev score before the first step; None if it was not measured.
        dev: The best dev score during training.
        test: The test score; the dev score if there is no test split. Recovery and flips are on the same split.
        test_deviation: The standard deviation of `test` over seeds; None for one seed.
        recovery: (score − chance) / (scratch's score − chance); None if scratch gains nothing over chance, or less
            than `regraft.task.MIN_HEADROOM`.
        steps_to_scratch: The steps until the dev score reaches scratch's last one; None if it never does.
        seconds_to_scratch: The seconds of training until then; None if it never does.
        negative_flips: The share of examples that the old deployment predicts correctly and this method does not, 0–1.
        labels: The number of labelled training examples that were used.
        steps: The number of training steps.
        seconds: The seconds of training, or of the method if nothing is trained.
    """

    method: str
    seeds: tuple[int, ...]
    start: float | None
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
        metric: The name of the task's metric.
        split: The split of the final scores, `test` or `dev`.
        old: The old deployment's score on the split: the mean over seeds, since few-shot draws depend on the seed.
        majority: The chance score on the split: the mean over seeds too.
        rows: One row per method, over all seeds.
        outcomes: The outcome folders, one per seed and method.
        schema: The schema of the record, `SCHEMA` after reading.
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
        content: The content of `comparison.json`, in the current or an earlier schema.
        file: The file's name for error messages.

    Returns:
        The comparison, in the current schema.

    Raises:
        OutcomeError: The schema is unknown, or a field is missing or of the wrong type.
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
