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

RECORD = "chain.json"
SCHEMA = 1
Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A figure; no run writes an infinite one or NaN."""


@dataclasses.dataclass(frozen=True)
class ChainRow:
    """One adaptation on one base of a chain.

    Args:
        task: The task's name.
        kind: The adaptation's kind.
        seed: The seed.
        base: The number of the base, 0 for the first.
        method: The method that made it; `tune` on the first base.
        route: `hop by hop` or `at once`; None where there is only one way: on the first two bases, and for scratch.
        score: The score on test, or on dev if there is no test split.
        start: The score on dev before the first step.
        majority: The score of guessing on the split of `score`.
        negative_flips: The share of examples that were right on the first base and are wrong here.
        steps: The number of training steps on this base alone.
        labels: The number of labelled examples seen on this base.
        outcome: The outcome folder, relative to the chain's folder.
        refused: Why there is no outcome, for instance because the method does not carry this kind; the figures are None
            then.
        metric: The task's metric. Regraft 0.1 recorded none; all of its metrics rise and are bounded by 1.
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


@dataclasses.dataclass(frozen=True)
class ChainRecord:
    """A chain and its results so far.

    Args:
        bases: The bases, in order.
        chain: The content of the chain file.
        rows: The results, one for each hop.
        schema: The version of this record's format.
    """

    bases: tuple[BaseRecord, ...]
    chain: dict[str, Any]
    rows: tuple[ChainRow, ...]
    schema: int = SCHEMA


def read_chain(out: str | Path) -> tuple[list[str], list[ChainRow]]:
    """Read the results of a chain so far.

    Args:
        out: The chain's folder.

    Returns:
        The names of the bases, and the result of each hop.

    Raises:
        OutcomeError: There is no chain, or its record is malformed.
    """
    file = Path(out) / RECORD
    remedy = "regraft chain run FILE --out DIR"
    try:
        content = read_json(file)
    except CheckpointError as error:
        raise OutcomeError(f"{file}: cannot be read ({error}). `{remedy}` writes it.") from error
    if (schema := content.get("schema")) != SCHEMA:
        raise OutcomeError(f"{file}: has schema {schema!r:.40}, this regraft reads {SCHEMA}. `{remedy}` writes it.")
    record = read_record(ChainRecord, content, str(file), remedy)
    for number, row in enumerate(record.rows):
        if row.base >= len(record.bases):
            raise OutcomeError(
                f"{file}: rows[{number}]: base: expected a number below {len(record.bases)}, found {row.base}. "
                f"Make it again with `{remedy}`."
            )
    return [base.name for base in record.bases], list(record.rows)
