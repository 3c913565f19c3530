"""What an experiment is: the tunings it needs, its cells, its figures and its page."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any, Literal

from findings.store import clear
from regraft.adaptation.outcome import versions
from regraft.checkpoint import write_atomic
from regraft.errors import MismatchError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from pydantic import BaseModel

    from findings.store import Store, Tuning

Told = Literal["holds", "mixed", "does not hold", "not measured"]
OURS = " (ours)"
"""Said of a claim that goes with the paper's and that it does not state."""
MOST = 0.9
"""Of the cells that a finding is looked for in: if it is found in at least this share it holds, if it is found in at
most one less this share it does not."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One claim of the paper, and what came of it.

    Args:
        claim: In a sentence.
        verdict: Whether it holds.
        figure: What decides that, in words and numbers.
        part: Which part of the paper it is of: a finding or a method.
    """

    claim: str
    verdict: Told
    figure: str
    part: str


@dataclasses.dataclass(frozen=True)
class Page:
    """What is shown.

    Args:
        text: Markdown, without a title.
        pictures: SVG files by name.
        findings: What the text leads to.
    """

    text: str
    pictures: dict[str, bytes]
    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement, kept in a file of its own.

    Args:
        name: Of the file.
        run: Makes it, given the store, a folder for what it needs on the way, and the arguments; gives JSON.
        arguments: JSON; if they change the cell is made anew.
    """

    name: str
    run: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment.

    Args:
        name: Its folder's, number and all.
        title: Of its page.
        question: What it asks, in a sentence or two.
        config: What its `config.yaml` says.
        tunings: The tunings it needs, given the config, the seeds and the number of bases.
        cells: Its measurements, given the store and the config.
        collect: From the cells that there are, each with its arguments and figures, to the results, as JSON.
        page: From the results to its page.
    """

    name: str
    title: str
    question: str
    config: type[BaseModel]
    tunings: Callable[[Any, Sequence[int], int], Iterable[Tuning]]
    cells: Callable[[Store, Any], list[Cell]]
    collect: Callable[[Store, Any, list[dict[str, Any]]], dict[str, Any]]
    page: Callable[[dict[str, Any]], Page]

    def file(self, store: Store, cell: Cell) -> Path:
        """Give the file of a cell."""
        return store.out / self.name / f"{cell.name}.json"

    def missing(self, store: Store, config: Any) -> list[Cell]:
        """Give the cells that have not been made, or with other arguments."""
        return [cell for cell in self.cells(store, config) if read_cell(self.file(store, cell), cell) is None]

    def found(self, store: Store, config: Any) -> list[dict[str, Any]]:
        """Read the cells that have been made: `arguments`, `found`, `versions` and `seconds` of each."""
        read = (read_cell(self.file(store, cell), cell) for cell in self.cells(store, config))
        return [cell for cell in read if cell is not None and cell["found"] is not None]

    def refused(self, store: Store, config: Any) -> dict[str, str]:
        """Give the reasons of cells that could not be made, by their names."""
        read = {cell.name: read_cell(self.file(store, cell), cell) for cell in self.cells(store, config)}
        return {name: cell["refused"] for name, cell in read.items() if cell is not None and cell["found"] is None}


def read_cell(file: Path, cell: Cell) -> dict[str, Any] | None:
    """Read a cell, if it has been made with these arguments."""
    if not file.is_file():
        return None
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read if read["arguments"] == json.loads(json.dumps(cell.arguments)) else None


def make_cell(store: Store, cell: Cell, file: Path) -> str:
    """Make a cell and write it whole; what it left on the way is cleared away once it is there.

    What a method refuses, as an adapter that tuning left as it was, is written down with the reason: it would be
    refused again. To try it again, remove its file.
    """
    started, work = time.perf_counter(), file.with_suffix("")
    work.parent.mkdir(parents=True, exist_ok=True)
    found, why = None, None
    try:
        found = cell.run(store, work, *cell.arguments)
    except (MismatchError, RecipeError) as error:
        why = str(error)
    record = {
        "arguments": cell.arguments,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
        "found": found,
        "refused": why,
    }
    write_atomic(file, json.dumps(record) + "\n")
    clear(work)
    return "made" if why is None else f"refused: {why}"


def tell(claim: str, part: str, held: Sequence[bool], figure: str) -> Finding:
    """Judge a claim by the cells in which it is found.

    Args:
        claim: The claim.
        part: Of the paper.
        held: For each cell, whether it is found there.
        figure: What decides, beside the number of cells.

    Returns:
        The finding.
    """
    if not held:
        return Finding(claim, "not measured", "nothing has been run", part)
    share = sum(held) / len(held)
    verdict: Told = "holds" if share >= MOST else "does not hold" if share <= 1 - MOST + 1e-9 else "mixed"
    return Finding(claim, verdict, f"in {sum(held)} of {len(held)} cells; {figure}", part)


def tell_difference(claim: str, part: str, rows: Sequence[dict[str, Any]]) -> Finding:
    """Judge the claim that one thing is better than another by differences with their intervals.

    It holds if the interval is wholly above 0 in at least half of the cells and wholly below 0 in none, and does not
    if it is wholly above 0 in none.

    Args:
        claim: The claim.
        part: Of the paper.
        rows: From `difference`, one a cell.

    Returns:
        The finding.
    """
    if not rows:
        return Finding(claim, "not measured", "nothing has been run", part)
    better, worse = sum(row["low"] > 0 for row in rows), sum(row["high"] < 0 for row in rows)
    verdict: Told = "holds" if 2 * better >= len(rows) and not worse else "mixed" if better else "does not hold"
    mean = 100 * sum(row["estimate"] for row in rows) / len(rows)
    figure = f"{mean:+.1f} points on average; better in {better} and worse in {worse} of {len(rows)} cells"
    return Finding(claim, verdict, figure, part)
