"""The outcome folder: an adaptation with its scores, cost and provenance."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation.card import model_card
from regraft.adaptation.load import load_adaptation
from regraft.adaptation.outcome_record import OutcomeRecord, read_outcome_record
from regraft.adaptation.record import OUTCOME_FILE
from regraft.checkpoint import check_output_path, publish, read_json, read_json_lines, to_json, write_atomic
from regraft.checkpoint.record import plain_text
from regraft.errors import CheckpointError, OutcomeError, RegraftError
from regraft.upgrade import with_current_fingerprints

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from regraft.base import Base

CURVE_FILE = "curve.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An outcome folder and its record.

    Args:
        path: The folder.
        record: The content of `outcome.json`.
    """

    path: Path
    record: OutcomeRecord

    @property
    def scores(self) -> dict[str, float | None]:
        """The scores by name: `dev`, `test`, `dev_at_start`, `test_majority`, …."""
        return dataclasses.asdict(self.record.scores)

    @property
    def curve(self) -> list[dict[str, float]]:
        """The learning curve: an entry for each evaluation, from step 0 on; empty without training and labels."""
        return list(read_json_lines(self.path / CURVE_FILE))

    def predictions(self, split: str) -> list[Any]:
        """Return the predictions on a split.

        Args:
            split: `dev` or `test`.

        Returns:
            The predictions in the order of the data; for classification, indices into the record's `labels`.
        """
        rows = read_json_lines(self.path / PREDICTIONS_FILE)
        return [row["prediction"] for row in rows if row["split"] == split]

    def right(self, split: str) -> list[bool | None]:
        """Return for each example of a split whether its prediction is right.

        Args:
            split: `dev` or `test`.

        Returns:
            A value for each example, in the order of the data; None for an example without a target.
        """
        rows = read_json_lines(self.path / PREDICTIONS_FILE)
        return [is_right(row) for row in rows if row["split"] == split]


def is_right(row: Mapping[str, Any]) -> bool | None:
    """Return whether a prediction is right; None without a target.

    Args:
        row: A line of `predictions.jsonl`.

    Raises:
        ValueError: `right` is not true, false or null.
    """
    # schema 1 did not record `right`, but it follows from the label and the prediction
    right = row.get("right", None if row["label"] is None else row["label"] == row["prediction"])
    if right is None or isinstance(right, bool):
        return right
    raise ValueError(f"right is {right!r:.80}, not true, false or null")


def find_outcome(out: Path, inputs: dict[str, Any], bases: Iterable[Base] = ()) -> Outcome | None:
    """Return the outcome of an earlier run with the same inputs, if there is one.

    Args:
        out: The outcome folder.
        inputs: The inputs.
        bases: The bases among the inputs, of which regraft 0.1 recorded other fingerprints.

    Raises:
        OutcomeError: The folder is something else, has other inputs, or has lost its weights, curve or predictions.
    """
    check_output_path(out)
    if not out.exists():
        return None
    outcome = load_outcome(out)
    expected = json.loads(plain_text(inputs))
    recorded = outcome.record.inputs
    learned_from = outcome.record.notes.get("learned_from")
    if learned_from:  # regraft 0.1 recorded the content of pairs in the notes
        recorded = {"pairs": learned_from, **recorded}
    if recorded != expected:
        recorded = with_current_fingerprints(recorded, bases)
    if recorded != expected:
        differing = sorted(key for key in {*expected, *recorded} if recorded.get(key) != expected.get(key))
        raise OutcomeError(
            f"{out}: is the outcome of another run (its inputs differ in {', '.join(differing)}). Choose another --out "
            "or remove it."
        )
    _check_complete(outcome)
    return outcome


def load_outcome(path: str | Path) -> Outcome:
    """Read an outcome folder.

    Args:
        path: The folder.

    Returns:
        The outcome.

    Raises:
        OutcomeError: The folder is not an outcome folder, or its record is malformed.
    """
    file = Path(path) / OUTCOME_FILE
    try:
        content = read_json(file)
    except CheckpointError as error:
        raise OutcomeError(f"{path}: is not an outcome folder ({error}). Choose another, or remove it.") from error
    return Outcome(Path(path), read_outcome_record(content, str(file)))


def write_outcome(
    staging: Path,
    out: Path,
    record: OutcomeRecord,
    curve: list[dict[str, float]],
    predictions: list[dict[str, Any]],
) -> Outcome:
    """Write the files of an outcome next to its adaptation, and publish the folder.

    Args:
        staging: A folder that contains `adaptation/`, on the same disk as `out`.
        out: The outcome folder, which must not exist.
        record: The content of `outcome.json`.
        curve: The learning curve.
        predictions: The lines of `predictions.jsonl`: one for each dev and test example.

    Returns:
        The published outcome.

    Raises:
        OutcomeError: A figure is infinite or NaN, or `out` exists.
    """
    fields = dataclasses.asdict(record)
    if record.task.selection is None:
        del fields["task"]["selection"]  # so that records without a metric of their own for selection stay as they were
    content = to_json(fields, OUTCOME_FILE, indent=2) + "\n"
    write_atomic(staging / OUTCOME_FILE, content)
    for name, rows in ((CURVE_FILE, curve), (PREDICTIONS_FILE, predictions)):
        write_atomic(staging / name, "".join(to_json(row, name) + "\n" for row in rows))
    write_atomic(staging / "README.md", model_card(record, staging / "adaptation", predictions))
    publish(staging, out)
    return Outcome(out, read_outcome_record(json.loads(content), OUTCOME_FILE))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    packages = ("regraft", "torch", "transformers", "peft", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _check_complete(outcome: Outcome) -> None:
    """Check that an outcome's weights load, and that its curve and the predictions of each scored split are not empty.

    Raises:
        OutcomeError: A file is missing, truncated or malformed.
    """
    try:
        load_adaptation(outcome.path)
        if not outcome.curve and not outcome.record.has_empty_curve:
            raise ValueError(f"{CURVE_FILE} is truncated")
        scored_splits = [split for split in ("dev", "test") if outcome.scores[split] is not None]
        for split in scored_splits or ["dev"]:
            if not outcome.predictions(split) or not outcome.right(split):
                raise ValueError(f"{PREDICTIONS_FILE} is truncated")
    except (RegraftError, OSError, ValueError, KeyError, TypeError) as error:
        raise OutcomeError(
            f"{outcome.path}: is no longer a complete outcome ({error}). Remove it, and run the same command again."
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree without installation
        return "unknown"
