"""Read and write the published `results.json` of an experiment, from which its page is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import write_atomic
from regraft.errors import OutcomeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def read_results(folder: Path) -> dict[str, Any]:
    """Read an experiment's `results.json`.

    Args:
        folder: The published folder of the experiment.

    Returns:
        The content of the file.

    Raises:
        OutcomeError: The file does not exist.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise OutcomeError(f"{file}: does not exist. Run the experiment without --write-only.")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def write_results(folder: Path, results: dict[str, Any], count_runs: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
    """Write `results.json`, but never over the results of more runs.

    Args:
        folder: The published folder of the experiment.
        results: The results as JSON.
        count_runs: Returns the number of runs in results.

    Returns:
        The results as read back from the file.

    Raises:
        OutcomeError: The folder has the results of more runs.
    """
    file = folder / "results.json"
    num_runs = count_runs(results)
    num_published = count_runs(read_results(folder)) if file.is_file() else 0
    if num_published > num_runs:
        raise OutcomeError(
            f"{file}: has the results of {num_published:,} runs, but only {num_runs:,} have been made here. Run the "
            "same command until it has made as many, or write the page from that file (--write-only)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, format_results(results))
    return read_results(folder)


def format_results(results: dict[str, object]) -> str:
    """Write results as JSON with one line per row, so that a new method adds only a few lines to the diff.

    Args:
        results: JSON values by name; lists become one line per element.

    Returns:
        The text of the file.
    """
    members = []
    for name, value in results.items():
        if value == []:
            text = "[]"
        elif isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        members.append(f' "{name}": {text}')
    return "{\n" + ",\n".join(members) + "\n}\n"
