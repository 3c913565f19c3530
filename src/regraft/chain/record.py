"""The content of `chain.json`: a chain of bases, and the result of each hop along it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from regraft.adaptation.outcome_record import BaseRecord  # noqa: TC001 (pydantic reads annotations)
from regraft.chain.file import Route  # noqa: TC001
from regraft.checkpoint import read_json
from regraft.checkpoint.record import Count, read_record
from regraft.errors import CheckpointError, OutcomeError
from regraft.task.types.type import DEFAULT_TYPE

RECORD = "chain.json"
"""The name of the file that holds the results, in a chain's folder."""
SCHEMA = 1
"""The version of the format that this regraft reads and writes."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A figure that is neither infinite nor NaN; no run writes any other."""


@dataclasses.dataclass(frozen=True)
class ChainRow:
    """The result of one hop: an adaptation on one base of a chain.

    Args:
        task: The name of the task.
        kind: The kind of the adaptation, such as `full` or `lora`.
        seed: The seed of the run.
        base: The index of the base, 0 for the first.
        method: The method that made the adaptation; `tune` on the first base.
        route: `hop by hop` or `at once`; None on the first two bases and for scratch, where the routes are the same.
        score: The score on test, or on dev if there is no test split.
        start: The score on dev before the first step, by the metric that selects the best weights.
        majority: The chance score on the split of `score`: for a language model, that of the bare base.
        negative_flips: The share of examples, of the split of `score`, that were right on the first base and are wrong
            here; None if the predictions cannot be compared.
        steps: The number of training steps on this base alone.
        labels: The number of labelled training examples used on this base.
        outcome: The outcome folder, relative to the chain's folder; empty for a refused hop.
        refused: The reason for a missing outcome, such as a method that does not support the kind; None if the hop has
            an outcome. A refused hop has no scores, and its steps and labels are 0.
        metric: The name of the task's metric. Records of regraft 0.1 lack it. The default stands for any metric of that
            version: of all of them, higher is better and 1 is the highest score.
        type: The name of the task type. Records of earlier versions lack it.
    """

    task: str
    kind: str
    seed: int
    base: Count
    method: str
    route: Route | None
    score: Finite | None
    start: Finite | None
    majority: Finite | None
    negative_flips: Finite | None
    steps: Count
    labels: Count
    outcome: str
    refused: str | None = None
    metric: str = "accuracy"
    type: str = DEFAULT_TYPE


@dataclasses.dataclass(frozen=True)
class ChainRecord:
    """A chain and its results so far.

    Args:
        bases: The name and fingerprint of each base, in the order of the chain.
        chain: The keys and values of the chain file, with defaults.
        rows: The result of each hop, in the order of the runs.
        schema: The version of this record's format.
    """

    bases: tuple[BaseRecord, ...]
    chain: dict[str, Any]
    rows: tuple[ChainRow, ...]
    schema: int = SCHEMA


def read_chain(out: str | Path) -> tuple[list[str], list[ChainRow]]:
    """Read the results of a chain so far.

    Args:
        out: The folder that the chain was run in.

    Returns:
        The names of the bases, and the result of each hop.

    Raises:
        OutcomeError: The folder has no `chain.json`, or the file is malformed or of a different schema.
    """
    file = Path(out) / RECORD
    command = "regraft chain run FILE --out DIR"
    try:
        content = read_json(file)
    except CheckpointError as error:
        raise OutcomeError(f"{file}: cannot be read ({error}). `{command}` writes it.") from error
    schema = content.get("schema")
    if schema != SCHEMA:
        raise OutcomeError(f"{file}: has schema {schema!r:.40}, this regraft reads {SCHEMA}. `{command}` writes it.")
    record = read_record(ChainRecord, content, str(file), command)
    for index, row in enumerate(record.rows):
        if row.base >= len(record.bases):
            raise OutcomeError(
                f"{file}: rows[{index}]: base: expected a number below {len(record.bases)}, found {row.base}. "
                f"Make it again with `{command}`."
            )
    return [base.name for base in record.bases], list(record.rows)
