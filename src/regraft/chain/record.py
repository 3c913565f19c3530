"""What `chain.json` holds: a chain of bases, and what came of each hop along it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from regraft.adaptation.outcome_record import BaseRecord  # noqa: TC001 (pydantic reads annotations)
from regraft.chain.file import Route  # noqa: TC001
from regraft.checkpoint import read_json
from regraft.checkpoint.record import Count, read_record
from regraft.errors import CheckpointError, OutcomeError

RECORD = "chain.json"
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class ChainRow:
    """One adaptation on one base of a chain.

    Args:
        task: The task's name.
        kind: The adaptation's kind.
        seed: The seed.
        base: The number of the base, 0 for the first.
        method: How it came to be; `tune` on the first base.
        route: `hop by hop` or `at once`; None where they are the same: on the first two bases, and for scratch.
        score: On test, or on dev where there is none.
        start: The score on dev before the first step.
        majority: The score of guessing there.
        negative_flips: The share of examples that were right on the first base and are wrong here.
        steps: The steps of training on this base alone.
        labels: The labelled examples that were seen on it.
        outcome: The outcome folder, relative to the chain's.
        refused: Why nothing came of it, if so, as where the method does not carry this kind; the figures are None then.
        metric: The task's; regraft 0.1 recorded none, and all of its metrics rise and are bounded by 1.
    """

    task: str
    kind: str
    seed: int
    base: Count
    method: str
    route: Route | None
    score: float | None
    start: float | None
    majority: float | None
    negative_flips: float | None
    steps: Count
    labels: Count
    outcome: str
    refused: str | None = None
    metric: str = "accuracy"


@dataclasses.dataclass(frozen=True)
class ChainRecord:
    """A chain and what it has come to so far.

    Args:
        bases: The bases, in order.
        chain: The chain file as it was read.
        rows: Every hop.
        schema: Of this record.
    """

    bases: tuple[BaseRecord, ...]
    chain: dict[str, Any]
    rows: tuple[ChainRow, ...]
    schema: int = SCHEMA


def read_chain(out: str | Path) -> tuple[list[str], list[ChainRow]]:
    """Read what a chain has come to so far.

    Args:
        out: Its folder.

    Returns:
        The names of the bases, and every hop.

    Raises:
        OutcomeError: There is no chain, or its record is malformed.
    """
    file, remedy = Path(out) / RECORD, "regraft chain run FILE --out DIR"
    try:
        content = read_json(file)
    except CheckpointError as error:
        raise OutcomeError(f"{file}: cannot be read ({error}). `{remedy}` writes it.") from error
    if content.get("schema") != SCHEMA:
        schema = content.get("schema")
        raise OutcomeError(f"{file}: has schema {schema!r:.40}, this regraft reads {SCHEMA}. `{remedy}` writes it.")
    record = read_record(ChainRecord, content, str(file), remedy)
    for place, row in enumerate(record.rows):
        if row.base >= len(record.bases):
            raise OutcomeError(
                f"{file}: rows[{place}]: base: expected a number below {len(record.bases)}, found {row.base}. "
                f"Make it again with `{remedy}`."
            )
    return [base.name for base in record.bases], list(record.rows)
