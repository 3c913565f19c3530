"""Find the outcomes, comparisons and diagnoses that a report is made from."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import Outcome, is_right
from regraft.adaptation.outcome import PREDICTIONS_FILE
from regraft.adaptation.outcome_record import OutcomeRecord, read_outcome_record
from regraft.adaptation.record import OUTCOME_FILE
from regraft.checkpoint import read_json, read_json_lines
from regraft.diagnosis import Diagnosis, read_diagnosis
from regraft.diagnosis.record import DIAGNOSIS_FILE
from regraft.errors import CheckpointError, OutcomeError
from regraft.methods import Comparison, read_comparison
from regraft.methods.comparison import COMPARISON_FILE
from regraft.methods.references import OLD_DEPLOYMENT, reference_folder
from regraft.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as far as the report shows it.

    Args:
        path: The outcome folder.
        record: The content of the folder's `outcome.json`.
        curve: The learning curve: for each evaluation, at least the `step` and the dev `score`.
        right: Whether each prediction is right, by split and row number; None without a label.
        answers: The lines of `predictions.jsonl` that have a prompt and so an answer to show, by split.
    """

    path: Path
    record: OutcomeRecord
    curve: list[dict[str, float]]
    right: dict[tuple[str, int], bool | None]
    answers: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ReportInputs:
    """The records that a report is made from.

    Args:
        runs: The finished runs.
        comparisons: The content of each `comparison.json`, by folder.
        diagnoses: The content of each `diagnosis.json`, by folder.
    """

    runs: list[Run]
    comparisons: dict[Path, Comparison]
    diagnoses: dict[Path, Diagnosis]


def find_inputs(folders: Sequence[str | Path]) -> ReportInputs:
    """Search folders, and all folders below them, for outcomes, comparisons and diagnoses.

    Args:
        folders: The folders to search; in place of a file, its folder is searched. Hidden folders below them are
            skipped, because they hold unfinished runs, and outcome folders are not searched further.

    Returns:
        The records, without duplicates, in the order of `folders` and then of the names of the folders below.

    Raises:
        OutcomeError: A folder does not exist or cannot be searched, a file is malformed, or there are no records.
    """
    inputs = ReportInputs(runs=[], comparisons={}, diagnoses={})
    visited: set[Path] = set()
    for top in map(Path, folders):
        if not top.exists():
            raise OutcomeError(f"{top}: there is no such folder. Name outcome folders, or folders that hold some.")
        for folder, file_names in _walk(top if top.is_dir() else top.parent):
            resolved = folder.resolve()
            if resolved in visited:
                continue
            visited.add(resolved)
            if OUTCOME_FILE in file_names:
                file = folder / OUTCOME_FILE
                inputs.runs.append(_load_run(folder, read_outcome_record(_read_sanitised(file), str(file))))
            if COMPARISON_FILE in file_names:
                file = folder / COMPARISON_FILE
                inputs.comparisons[folder] = read_comparison(_read_sanitised(file), str(file))
            if DIAGNOSIS_FILE in file_names:
                file = folder / DIAGNOSIS_FILE
                inputs.diagnoses[folder] = read_diagnosis(_read_sanitised(file), str(file))
    if not (inputs.runs or inputs.comparisons or inputs.diagnoses):
        raise OutcomeError(
            f"{', '.join(map(str, folders))}: found no {OUTCOME_FILE}, {COMPARISON_FILE} or {DIAGNOSIS_FILE} there. "
            "`regraft recycle`, `regraft compare` and `regraft check --deep --out` write them."
        )
    return inputs


def _walk(top: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield each folder with the names of its files; outcome folders are not searched further."""

    def raise_unreadable(error: OSError) -> None:
        raise OutcomeError(f"{error.filename}: cannot be searched ({error.strerror}). Remove it or make it readable.")

    for folder, subfolders, file_names in os.walk(top, onerror=raise_unreadable):
        if OUTCOME_FILE in file_names:
            subfolders.clear()
        else:
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), set(file_names)


def _load_run(folder: Path, record: OutcomeRecord) -> Run:
    """Read the learning curve and the predictions of an outcome."""
    outcome = Outcome(folder, record)
    try:
        curve = [{name: float(value) for name, value in point.items()} for point in outcome.curve]
        right = {}
        answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in read_json_lines(folder / PREDICTIONS_FILE):
            right[row["split"], row["row"]] = is_right(row)
            if "prompt" in row:
                answers[row["split"]].append(sanitise(row))
        if (not curve and not record.has_empty_curve) or any(
            "step" not in point or "score" not in point for point in curve
        ):
            raise ValueError("the learning curve has no step and score")
    except (CheckpointError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise OutcomeError(
            f"{folder}: is incomplete: curve.jsonl or predictions.jsonl cannot be read ({error!r:.400}). "
            "Remove the folder and run its method again."
        ) from error
    return Run(folder, record, curve, right, dict(answers))


def old_answers(folder: Path, digest: str) -> list[dict[str, Any]]:
    """Read the old deployment's answers, which a comparison stores.

    Args:
        folder: The folder of the comparison.
        digest: The digest of the task's data.

    Returns:
        The lines of `predictions.jsonl` for the comparison's split; empty if there are none.

    Raises:
        OutcomeError: A line is malformed.
    """
    file = reference_folder(folder, OLD_DEPLOYMENT, digest) / PREDICTIONS_FILE
    try:
        return [sanitise(row) for row in read_json_lines(file) if "prompt" in row] if file.is_file() else []
    except CheckpointError as error:
        raise OutcomeError(f"{error} Remove its folder and run `regraft compare` again.") from error


def _read_sanitised(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = sanitise(read_json(file))
    except CheckpointError as error:
        raise OutcomeError(f"{error} Write it again or remove it.") from error
    except RecursionError:
        raise OutcomeError(f"{file}: is nested too deep. Write it again or remove it.") from None
    return content


def sanitise(value: Any) -> Any:
    """Replace infinity, and characters that `printable` replaces, such as control characters.

    Args:
        value: A parsed JSON value.

    Returns:
        The value with U+FFFD for such characters, and NaN for infinity.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else math.nan
    if isinstance(value, dict):
        return {sanitise(name): sanitise(entry) for name, entry in value.items()}
    return [sanitise(entry) for entry in value] if isinstance(value, list) else value
