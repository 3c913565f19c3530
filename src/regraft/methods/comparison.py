"""The results of a comparison of methods, and their record in `comparison.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from regraft.checkpoint.record import percent_to_share, read_record
from regraft.errors import OutcomeError
from regraft.task.types.type import DEFAULT_TYPE

COMPARISON_FILE = "comparison.json"
SCHEMA = 2
"""The current schema. Schema 1, of regraft 0.1, has no field for the schema, and recovery in percent."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one method with one seed, or their mean over seeds.

    `start` and `dev` are scores by the metric that selects the best weights (`Comparison.curve_metric`).

    If a method's learning curve measures agreement with the old model rather than that metric, as that of `label-free`
    does, it has no relation to scratch's: `start` and the steps and seconds to scratch are None, and `dev` is the dev
    score of the final weights, or None if that is by another metric.

    Args:
        method: The name on the command line.
        seeds: The seed of the row, or all seeds that it is the mean of.
        start: The dev score before the first step; None if it was not measured.
        dev: The best dev score during training; see above.
        test: The test score; the dev score if there is no test split. Recovery and flips are on the same split.
        test_deviation: The standard deviation of `test` over seeds; None for one seed.
        recovery: (score − chance) / (scratch's score − chance); None if scratch gains nothing over chance, or less
            than `regraft.task.MIN_HEADROOM`.
        steps_to_scratch: The steps until the dev score reaches scratch's last one; None if it never does.
        seconds_to_scratch: The seconds of training until then; None if it never does.
        negative_flips: The share of examples that the old deployment predicts correctly and this method does not, 0–1;
            None if the metric does not tell which predictions are right.
        labels: The number of labelled training examples that were used.
        steps: The number of training steps.
        seconds: The seconds of training, or of the method if nothing is trained.
        keep: The score on what the task names in `keep`; None if it was not measured.
    """

    method: str
    seeds: tuple[int, ...]
    start: float | None
    dev: float | None
    test: float
    test_deviation: float | None
    recovery: float | None
    steps_to_scratch: float | None
    seconds_to_scratch: float | None
    negative_flips: float | None
    labels: float
    steps: float
    seconds: float
    keep: float | None = None


@dataclasses.dataclass(frozen=True)
class KeepScores:
    """The scores of the models before and after an upgrade on what a task names in `keep`.

    Args:
        metric: The name of the metric.
        old_base: The bare old base's score.
        new_base: The bare new base's score.
        old: The old deployment's score.
    """

    metric: str
    old_base: float
    new_base: float
    old: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of several methods on one task.

    Args:
        task: The name of the task.
        metric: The name of the task's metric.
        split: The split of the final scores, `test` or `dev`.
        old: The old deployment's score on the split: the mean over seeds, since few-shot draws depend on the seed.
        majority: The chance score on the split: the mean over seeds too. For a language model it is the score of the
            bare new base.
        rows: One row per method, over all seeds.
        outcomes: The outcome folders, one per seed and method.
        type: The name of the task type.
        selection: The name of the metric by which the best weights were selected; None if it is `metric`.
        keep: The scores on what the task names in `keep`: the means over seeds; None without.
        lm_eval: The scores by lm-evaluation-harness with the first seed, by model (`old deployment` or a method), task
            and metric; empty without.
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
    type: str = DEFAULT_TYPE
    selection: str | None = None
    keep: KeepScores | None = None
    lm_eval: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)

    @property
    def curve_metric(self) -> str:
        """The name of the metric of learning curves, and of `Row.start` and `Row.dev`."""
        return self.selection or self.metric


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
