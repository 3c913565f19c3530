"""Finds what there is to report: outcomes, comparisons and diagnoses, wherever they lie below the given folders."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import Outcome, is_right
from regraft.adaptation.outcome_record import OutcomeRecord, read_outcome
from regraft.checkpoint import read_json, read_json_lines
from regraft.diagnosis import Diagnosis, read_diagnosis
from regraft.errors import CheckpointError, OutcomeError
from regraft.methods import Comparison, read_comparison
from regraft.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OUTCOME_FILE, COMPARISON_FILE, DIAGNOSIS_FILE = "outcome.json", "comparison.json", "diagnosis.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run with all that is shown of it.

    Args:
        path: Its folder.
        record: What its `outcome.json` holds.
        curve: Its learning curve.
        right: By split and row: whether the prediction is right; None without a label.
    """

    path: Path
    record: OutcomeRecord
    curve: list[dict[str, float]]
    right: dict[tuple[str, int], bool | None]


@dataclasses.dataclass(frozen=True)
class Runs:
    """What there is to report.

    Args:
        outcomes: The outcome folders.
        comparisons: By folder what its `comparison.json` holds.
        diagnoses: By folder what its `diagnosis.json` holds.
    """

    outcomes: list[Run]
    comparisons: dict[Path, Comparison]
    diagnoses: dict[Path, Diagnosis]


def find_runs(folders: Sequence[str | Path]) -> Runs:
    """Search folders, and all below them, for what regraft has written.

    Args:
        folders: Where to look; hidden folders below them are work in progress and passed over.

    Returns:
        What is there, each once, in the order of the folders and then of their names.

    Raises:
        OutcomeError: A folder does not exist, a file in it is malformed, or there is nothing to report.
    """
    runs, visited = Runs([], {}, {}), set()
    for top in map(Path, folders):
        if not top.exists():
            raise OutcomeError(f"{top}: there is no such folder. Name outcome folders, or folders that hold some.")
        for folder, files in _walk(top if top.is_dir() else top.parent):
            if (resolved := folder.resolve()) in visited:
                continue
            visited.add(resolved)
            if OUTCOME_FILE in files:
                file = folder / OUTCOME_FILE
                runs.outcomes.append(_outcome(folder, read_outcome(_read(file), str(file))))
            if COMPARISON_FILE in files:
                file = folder / COMPARISON_FILE
                runs.comparisons[folder] = read_comparison(_read(file), str(file))
            if DIAGNOSIS_FILE in files:
                file = folder / DIAGNOSIS_FILE
                runs.diagnoses[folder] = read_diagnosis(_read(file), str(file))
    if not (runs.outcomes or runs.comparisons or runs.diagnoses):
        raise OutcomeError(
            f"{', '.join(map(str, folders))}: found no {OUTCOME_FILE}, {COMPARISON_FILE} or {DIAGNOSIS_FILE} there. "
            "`regraft recycle`, `regraft compare` and `regraft check --deep --out` write them."
        )
    return runs


def _walk(top: Path) -> Iterator[tuple[Path, set[str]]]:
    def unreadable(error: OSError) -> None:
        raise OutcomeError(f"{error.filename}: cannot be searched ({error.strerror}). Remove it or make it readable.")

    for folder, below, files in os.walk(top, onerror=unreadable):
        # an outcome is whole: what lies in it are its weights
        below[:] = [] if OUTCOME_FILE in files else sorted(name for name in below if not name.startswith("."))
        yield Path(folder), set(files)


def _outcome(folder: Path, record: OutcomeRecord) -> Run:
    outcome, right = Outcome(folder, record), {}
    try:
        curve = [{name: float(value) for name, value in point.items()} for point in outcome.curve]
        for row in read_json_lines(folder / "predictions.jsonl"):
            right[row["split"], row["row"]] = is_right(row)
        if not curve or any("step" not in point or "score" not in point for point in curve):
            raise ValueError("the learning curve has no step and score")
    except (CheckpointError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise OutcomeError(
            f"{folder}: is not whole: curve.jsonl or predictions.jsonl cannot be read ({error!r:.400}). "
            "Remove the folder and run its method again."
        ) from error
    return Run(folder, record, curve, right)


def _read(file: Path) -> dict[str, Any]:
    try:
        cleaned: dict[str, Any] = clean(read_json(file))
    except CheckpointError as error:
        raise OutcomeError(f"{error} Write it again or remove it.") from error
    except RecursionError:
        raise OutcomeError(f"{file}: is nested too deep. Write it again or remove it.") from None
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
