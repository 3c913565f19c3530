"""Finds what there is to report: outcomes, comparisons and diagnoses, wherever they lie below the given folders."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import Outcome, is_right, load_outcome
from regraft.checkpoint import read_json, read_json_lines
from regraft.errors import CheckpointError, OutcomeError
from regraft.printable import printable
from regraft.report.schema import COMPARISON, check_diagnosis, check_outcome, hold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OUTCOME_FILE, COMPARISON_FILE, DIAGNOSIS_FILE = "outcome.json", "comparison.json", "diagnosis.json"


@dataclasses.dataclass(frozen=True)
class Found:
    """One finished run with all that is shown of it.

    Args:
        path: Its folder.
        record: The content of its `outcome.json`.
        curve: Its learning curve.
        right: By split and row: whether the prediction is right; None without a label.
    """

    path: Path
    record: dict[str, Any]
    curve: list[dict[str, float]]
    right: dict[tuple[str, int], bool | None]


@dataclasses.dataclass(frozen=True)
class Runs:
    """What was found.

    Args:
        outcomes: The outcome folders.
        comparisons: By folder, the content of `comparison.json`.
        diagnoses: By folder, the content of `diagnosis.json`.
    """

    outcomes: list[Found]
    comparisons: dict[Path, dict[str, Any]]
    diagnoses: dict[Path, dict[str, Any]]


def find_runs(folders: Sequence[str | Path]) -> Runs:
    """Search folders, and all below them, for what regraft has written.

    Args:
        folders: Where to look; hidden folders below them are work in progress and passed over.

    Returns:
        What is there, each once, in the order of the folders and then of their names.

    Raises:
        OutcomeError: A folder does not exist, a file in it is malformed, or there is nothing to report.
    """
    found, seen = Runs([], {}, {}), set()
    for given in map(Path, folders):
        if not given.exists():
            raise OutcomeError(f"{given}: there is no such folder. Name outcome folders, or folders that hold some.")
        for folder, files in _walk(given if given.is_dir() else given.parent):
            if (place := folder.resolve()) in seen:
                continue
            seen.add(place)
            if OUTCOME_FILE in files:
                found.outcomes.append(_outcome(load_outcome(folder)))
            if COMPARISON_FILE in files:
                content = _read(folder / COMPARISON_FILE)
                hold(content, COMPARISON, str(folder / COMPARISON_FILE), "regraft compare")
                found.comparisons[folder] = content
            if DIAGNOSIS_FILE in files:
                content = _read(folder / DIAGNOSIS_FILE)
                check_diagnosis(content, str(folder / DIAGNOSIS_FILE))
                found.diagnoses[folder] = content
    if not (found.outcomes or found.comparisons or found.diagnoses):
        raise OutcomeError(
            f"{', '.join(map(str, folders))}: found no {OUTCOME_FILE}, {COMPARISON_FILE} or {DIAGNOSIS_FILE} there. "
            "`regraft recycle`, `regraft compare` and `regraft check --deep --out` write them."
        )
    return found


def _walk(top: Path) -> Iterator[tuple[Path, set[str]]]:
    def unreadable(error: OSError) -> None:
        raise OutcomeError(f"{error.filename}: cannot be searched ({error.strerror}). Remove it or make it readable.")

    for folder, below, files in os.walk(top, onerror=unreadable):
        # an outcome is whole: what lies in it are its weights
        below[:] = [] if OUTCOME_FILE in files else sorted(name for name in below if not name.startswith("."))
        yield Path(folder), set(files)


def _outcome(outcome: Outcome) -> Found:
    file = outcome.path / OUTCOME_FILE
    record = clean(outcome.record)
    check_outcome(record, str(file))
    try:
        curve = [{name: float(value) for name, value in point.items()} for point in outcome.curve]
        right = {}
        for row in read_json_lines(outcome.path / "predictions.jsonl"):
            right[row["split"], row["row"]] = is_right(row)
        if not curve or any("step" not in point or "score" not in point for point in curve):
            raise ValueError("the learning curve has no step and score")
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        raise OutcomeError(
            f"{outcome.path}: is not whole: curve.jsonl or predictions.jsonl cannot be read ({error!r:.400}). "
            "Remove the folder and run its method again."
        ) from error
    return Found(outcome.path, record, curve, right)


def _read(file: Path) -> dict[str, Any]:
    try:
        cleaned: dict[str, Any] = clean(read_json(file))
    except CheckpointError as error:
        raise OutcomeError(f"{error} Write it again or remove it.") from error
    return cleaned


def clean(value: Any) -> Any:
    """Replace what no page can show: control characters, halves of surrogate pairs, infinite numbers.

    Args:
        value: Any JSON.

    Returns:
        The same with U+FFFD for such characters, and NaN for such numbers.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else math.nan
    if isinstance(value, dict):
        return {clean(name): clean(entry) for name, entry in value.items()}
    return [clean(entry) for entry in value] if isinstance(value, list) else value
