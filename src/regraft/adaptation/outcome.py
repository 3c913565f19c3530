"""The outcome folder: an adaptation with its scores, cost and provenance; the only record there is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation.load import load_adaptation
from regraft.adaptation.outcome_record import OutcomeRecord, read_outcome_record
from regraft.checkpoint import check_output_path, publish, read_json, read_json_lines, to_json, write_atomic
from regraft.checkpoint.record import plain_text
from regraft.errors import CheckpointError, OutcomeError, RegraftError
from regraft.printable import printable
from regraft.task.types import task_types
from regraft.upgrade import renewed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from regraft.base import Base


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished outcome folder.

    Args:
        path: The folder.
        record: What its `outcome.json` holds.
    """

    path: Path
    record: OutcomeRecord

    @property
    def scores(self) -> dict[str, float | None]:
        """The record's scores by name: `dev`, `test`, `dev_at_start`, `test_majority`, …."""
        return dataclasses.asdict(self.record.scores)

    @property
    def curve(self) -> list[dict[str, float]]:
        """The learning curve: one entry an evaluation, from step 0 on."""
        return list(read_json_lines(self.path / "curve.jsonl"))

    def predictions(self, split: str) -> list[Any]:
        """Return the predictions on a split.

        Args:
            split: `dev` or `test`.

        Returns:
            As the type of task has them, in the order of the data; of classes the indices into the record's `labels`.
        """
        rows = read_json_lines(self.path / "predictions.jsonl")
        return [row["prediction"] for row in rows if row["split"] == split]

    def right(self, split: str) -> list[bool | None]:
        """Return which predictions of a split are right.

        Args:
            split: `dev` or `test`.

        Returns:
            One value an example, in the order of the data; None where there is no label.
        """
        rows = read_json_lines(self.path / "predictions.jsonl")
        return [is_right(row) for row in rows if row["split"] == split]


def is_right(row: Mapping[str, Any]) -> bool | None:
    """Return whether a prediction is right.

    Args:
        row: A line of `predictions.jsonl`.

    Returns:
        None where there is no label.

    Raises:
        ValueError: The line has something else there than true, false or null.
    """
    right = row.get("right", None if row["label"] is None else row["label"] == row["prediction"])
    if right is None or isinstance(right, bool):
        return right
    raise ValueError(f"right is {right!r:.80}, not true, false or null")


def find_outcome(out: Path, inputs: dict[str, Any], bases: Iterable[Base] = ()) -> Outcome | None:
    """Look whether the work was done before.

    Args:
        out: Where the outcome would be.
        inputs: What it is made from.
        bases: The bases among them: regraft 0.1 recorded fingerprints of their stored names.

    Returns:
        The outcome that is there, or None if nothing is.

    Raises:
        OutcomeError: Something else is in that place, or what is there has lost its weights or predictions.
    """
    check_output_path(out)
    if not out.exists():
        return None
    outcome = load_outcome(out)
    expected, recorded = json.loads(plain_text(inputs)), outcome.record.inputs
    learned_from = outcome.record.notes.get("learned_from")
    if learned_from:  # where regraft 0.1 recorded the content of pairs
        recorded = {"pairs": learned_from, **recorded}
    if recorded != expected:
        recorded = renewed(recorded, bases)
    if recorded != expected:
        differing = sorted(key for key in {*expected, *recorded} if recorded.get(key) != expected.get(key))
        raise OutcomeError(
            f"{out}: holds the outcome of another run (it differs in {', '.join(differing)}). Choose another --out or "
            "remove it."
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
        OutcomeError: It is none.
    """
    file = Path(path) / "outcome.json"
    try:
        content = read_json(file)
    except CheckpointError as error:
        raise OutcomeError(f"{path}: is no outcome folder ({error}). Choose another, or remove it.") from error
    return Outcome(Path(path), read_outcome_record(content, str(file)))


def write_outcome(
    staging: Path,
    out: Path,
    record: OutcomeRecord,
    curve: list[dict[str, float]],
    predictions: list[dict[str, Any]],
) -> Outcome:
    """Complete an outcome folder around the adaptation in it and move it into its place.

    Args:
        staging: A folder that holds `adaptation/`, on the same disk as `out`.
        out: Where the outcome is written.
        record: What is written as `outcome.json`.
        curve: The learning curve.
        predictions: Row, label, prediction, whether it is right, and its confidence, of each example of dev and test.

    Returns:
        The outcome in its place.

    Raises:
        OutcomeError: A figure is infinite or not a number, or something is at `out`.
    """
    content = to_json(dataclasses.asdict(record), "outcome.json", indent=2) + "\n"
    write_atomic(staging / "outcome.json", content)
    for name, rows in (("curve.jsonl", curve), ("predictions.jsonl", predictions)):
        write_atomic(staging / name, "".join(to_json(row, name) + "\n" for row in rows))
    write_atomic(staging / "README.md", _card(record))
    publish(staging, out)
    return Outcome(out, read_outcome_record(json.loads(content), "outcome.json"))


def versions() -> dict[str, str]:
    """Return the versions that a result was made with.

    Returns:
        By package, Python's among them.
    """
    packages = ("regraft", "torch", "transformers", "peft", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _check_complete(outcome: Outcome) -> None:
    """Refuse an outcome of which files were deleted or emptied after it was written."""
    try:
        load_adaptation(outcome.path)
        scored = [split for split in ("dev", "test") if outcome.scores.get(split) is not None]
        if not outcome.curve or not all(
            outcome.predictions(split) and outcome.right(split) for split in scored or ["dev"]
        ):
            raise ValueError("curve.jsonl or predictions.jsonl is cut short")
    except (RegraftError, OSError, ValueError, KeyError, TypeError) as error:
        raise OutcomeError(
            f"{outcome.path}: is an outcome that is no longer complete ({error}). Remove it, and the same command "
            "makes it again."
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _card(record: OutcomeRecord) -> str:
    task, scores, cost, source = record.task, record.scores, record.cost, record.recycled_from
    library = {"full": "transformers", "bottleneck": "regraft"}.get(record.kind, "peft")
    labels = f" ({', '.join(map(_plain, record.labels))})" if record.labels else ""
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {task_types()[task.type].pipeline_tag}",
        "tags: [regraft]",
        "---",
        f"# {_plain(task.name)} on {_plain(Path(record.base.name).name)}",
        "",
        f"A {record.kind} adaptation for {_code(task.name)}{labels}, made by regraft with method `{record.method}`.",
        "",
        f"- base model: {_code(record.base.name)} ({record.base.fingerprint})",
    ]
    if source:
        names = f"{_code(source.adaptation)} on {_code(source.old_base)}"
        lines.append(f"- recycled from: {names} ({source.fingerprint})")
    lines += [
        f"- {task.metric}: dev {_figure(scores.dev)}, test {_figure(scores.test)}"
        f" (before the first step: dev {_figure(scores.dev_at_start)})",
        f"- cost: {cost.steps} steps, {cost.seconds:.0f} s, {cost.labels} labelled examples",
        f"- made with: {_made_with(record)}",
        "",
        "The weights are in `adaptation/`; `outcome.json` has the whole record, `curve.jsonl` the learning curve.",
        "",
    ]
    return "\n".join(lines)


def _made_with(record: OutcomeRecord) -> str:
    recipe, options = record.recipe, record.inputs.get("options") or {}
    parts = [_plain(f"{name} {value}") for name, value in options.items() if value not in (None, "", [], ())]
    if record.cost.steps:
        parts.append(f"batches of {recipe['batch_size']}, peak learning rate {recipe['learning_rate']:g}")
    return ", ".join([*parts, f"seed {record.seed}"])


def _code(text: str) -> str:
    """Show text from files as it is: in a code span, Markdown has no markup, links or HTML."""
    return f"`{' '.join(printable(text).replace('`', chr(39)).split())}`"


def _plain(text: str) -> str:
    """Show text from files without a code span where it has no character that Markdown gives a meaning to."""
    return text if re.fullmatch(r"(?!.*www\.)\w[\w .,+-]*", text) else _code(text)


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
