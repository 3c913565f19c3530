"""Run an experiment over methods, and write its figures and its page."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from figures import collect_results
from grid import iterate_cells
from results_file import read_results, write_results
from runner import run_missing

from regraft.checkpoint import write_atomic
from regraft.errors import OutcomeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from grid import Grid

    WritePage = Callable[[dict[str, Any], str], str]
    """Writes the page of results, with a remark on the number of runs that is to follow the introduction."""


def run_experiment(description: str, folder: Path, prepare_grid: Callable[[int], Grid], write: WritePage) -> None:
    """Make missing outcomes and write the results, as the command line asks.

    Args:
        description: The description of the experiment in the command's help.
        folder: The folder for `results.json` and `README.md`.
        prepare_grid: Makes the bases and tasks with so many processes, and returns the experiment.
        write: Writes the page.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--write-only", action="store_true", help="write the tables from results.json alone")
    arguments = parser.parse_args()
    try:
        if arguments.write_only:
            write_readme(read_results(folder), folder, write)
            return
        grid = prepare_grid(arguments.workers)
        failures = run_missing(grid, arguments.workers)
        write_measured(grid, folder, write)
    except OutcomeError as error:
        sys.exit(str(error))
    if failures:
        sys.exit(f"{len(failures)} failed; run again to try them again:\n" + "\n".join(failures))


def write_measured(grid: Grid, folder: Path, write: WritePage) -> None:
    """Write the figures and the page of the runs so far.

    Args:
        grid: The experiment.
        folder: The folder for `results.json` and `README.md`.
        write: Writes the page.

    Raises:
        OutcomeError: The folder has the results of more runs.
    """
    results = collect_results(grid)
    num_cells = len(list(iterate_cells(grid)))
    if len(results["runs"]) < num_cells:
        results["made"]["of"] = num_cells
    write_readme(write_results(folder, results, count_runs), folder, write)


def count_runs(results: dict[str, Any]) -> int:
    """Return the number of runs in results."""
    return len(results["runs"])


def write_readme(results: dict[str, Any], folder: Path, write: WritePage) -> None:
    """Write the page of published results.

    Args:
        results: The content of `results.json`.
        folder: The folder for `README.md`.
        write: Writes the page.
    """
    remark = ""
    num_runs = count_runs(results)
    num_cells = results["made"].get("of")  # absent once all cells have been run
    if num_cells:
        remark = f"\n\n**Not complete: {num_runs} of {num_cells} runs so far; the same command makes the others.**"
    write_atomic(folder / "README.md", write(results, remark))
