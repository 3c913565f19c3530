"""Experiments: their tunings, cells, figures and pages, and the judgement of claims."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from typing import TYPE_CHECKING, Any, Literal

from regraft.adaptation.outcome import versions
from regraft.checkpoint import write_atomic
from regraft.errors import MismatchError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from pydantic import BaseModel
    from tables import Row

    from findings.store import Store, Tuning

Verdict = Literal["holds", "mixed", "does not hold", "not measured"]
NOT_STATED = " (ours)"
"""Appended to the part of a claim that belongs to the paper's subject but is not stated in the paper."""
MIN_CONFIRMED_SHARE = 0.9
"""A claim holds if at least this share of its cells confirms it, and does not hold if at most one minus this share
does. Arbitrary, but fixed before any cell was measured."""
MIN_BETTER_SHARE = 0.5
"""A method counts as better than another if the difference is significant in at least this share of the cells.
Arbitrary, but fixed before any cell was measured."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim and its verdict.

    Args:
        claim: The claim, in one sentence.
        verdict: Whether the claim holds.
        figure: The deciding figures, in words and numbers.
        part: The part of the paper that the claim belongs to: a finding or a method.
    """

    claim: str
    verdict: Verdict
    figure: str
    part: str


@dataclasses.dataclass(frozen=True)
class Page:
    """The content of an experiment's page.

    Args:
        text: Markdown, without a title.
        pictures: The content of SVG files, by file name.
        findings: The claims that the experiment tests.
    """

    text: str
    pictures: dict[str, bytes]
    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement, with a file for its record.

    Args:
        name: The name of the file, without its suffix.
        measure: Takes the store, a working folder and the arguments; returns the figures as JSON.
        arguments: JSON values; if they change, the cell is measured again.
    """

    name: str
    measure: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class CellRecord:
    """The content of a cell's file.

    Args:
        arguments: The cell's arguments.
        figures: The measured figures; None if the measurement was refused.
        refusal: The reason of a refusal; None if the cell was measured.
        seconds: The duration of the measurement.
        versions: The versions of packages, by name.
    """

    arguments: list[Any]
    figures: dict[str, Any] | None
    refusal: str | None
    seconds: float
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment on claims of the paper.

    Args:
        name: The name of the experiment's folder, with its number.
        title: The title of the page.
        question: The introduction of the page.
        config: The model of `config.yaml`.
        list_tunings: Takes the config, the seeds and the number of bases; returns the tunings that cells read.
        list_cells: Takes the store and the config; returns the cells.
        collect_results: Takes the store, the config and the records of measured cells; returns the results as JSON.
        build_page: Takes the results; returns the page.
    """

    name: str
    title: str
    question: str
    config: type[BaseModel]
    list_tunings: Callable[[Any, Sequence[int], int], Iterable[Tuning]]
    list_cells: Callable[[Store, Any], list[Cell]]
    collect_results: Callable[[Store, Any, list[CellRecord]], dict[str, Any]]
    build_page: Callable[[dict[str, Any]], Page]

    def cell_file(self, store: Store, cell: Cell) -> Path:
        """Return the file of a cell."""
        return store.out / self.name / f"{cell.name}.json"

    def missing_cells(self, store: Store, config: Any) -> list[Cell]:
        """Return the cells without a record, or whose record has different arguments."""
        cells = self.list_cells(store, config)
        return [cell for cell in cells if read_record(self.cell_file(store, cell), cell) is None]

    def read_records(self, store: Store, config: Any) -> list[CellRecord]:
        """Read the records of the cells that have been measured, in the order of the cells."""
        records = (read_record(self.cell_file(store, cell), cell) for cell in self.list_cells(store, config))
        return [record for record in records if record is not None and record.figures is not None]

    def read_refusals(self, store: Store, config: Any) -> dict[str, str]:
        """Read the reasons of refusals by the name of the cell."""
        refusals = {}
        for cell in self.list_cells(store, config):
            record = read_record(self.cell_file(store, cell), cell)
            if record is not None and record.refusal is not None:
                refusals[cell.name] = record.refusal
        return refusals


def read_record(file: Path, cell: Cell) -> CellRecord | None:
    """Read the record of a cell; return None if the cell has not been measured with these arguments."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["arguments"] != json.loads(json.dumps(cell.arguments)):
        return None
    return CellRecord(
        content["arguments"], content["found"], content["refused"], content["seconds"], content["versions"]
    )


def measure_cell(store: Store, cell: Cell, file: Path) -> str:
    """Measure a cell, write its record and remove its working folder.

    A refusal, such as of an adapter that tuning left unchanged, is recorded with its reason, since the same inputs
    would be refused again. Remove the file to measure the cell again.

    Args:
        store: The store, with the tunings that the cell reads.
        cell: The cell to measure.
        file: The file for the record; the working folder is next to it.

    Returns:
        A line on the result.
    """
    started = time.perf_counter()
    work_folder = file.with_suffix("")
    work_folder.parent.mkdir(parents=True, exist_ok=True)
    figures = None
    refusal = None
    try:
        figures = cell.measure(store, work_folder, *cell.arguments)
    except (MismatchError, RecipeError) as error:
        refusal = str(error)
    record = {
        "arguments": cell.arguments,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
        "found": figures,
        "refused": refusal,
    }
    write_atomic(file, json.dumps(record) + "\n")
    shutil.rmtree(work_folder, ignore_errors=True)
    return "made" if refusal is None else f"refused: {refusal}"


def judge_claim(claim: str, part: str, confirmations: Sequence[bool], figure: str) -> Finding:
    """Judge a claim by the share of cells that confirm it.

    Args:
        claim: The claim, in one sentence.
        part: The part of the paper that the claim belongs to.
        confirmations: Whether each cell confirms the claim.
        figure: The deciding figures, in addition to the number of cells.

    Returns:
        The claim with its verdict, "not measured" without cells.
    """
    if not confirmations:
        return Finding(claim, "not measured", "nothing has been run", part)
    num_cells = len(confirmations)
    num_confirmed = sum(confirmations)
    share = num_confirmed / num_cells
    verdict: Verdict = "mixed"
    if share >= MIN_CONFIRMED_SHARE:
        verdict = "holds"
    elif share <= 1 - MIN_CONFIRMED_SHARE + 1e-9:  # 1 − 0.9 is slightly below 0.1 in binary
        verdict = "does not hold"
    return Finding(claim, verdict, f"in {num_confirmed} of {num_cells} cells; {figure}", part)


def judge_difference(claim: str, part: str, differences: Sequence[Row]) -> Finding:
    """Judge the claim that one method is better than another, by the intervals of the differences.

    The claim holds if the interval is wholly above 0 in at least half of the cells and wholly below 0 in none. It does
    not hold if the interval is wholly above 0 in none.

    Args:
        claim: The claim, in one sentence.
        part: The part of the paper that the claim belongs to.
        differences: The difference in each cell, with `estimate`, `low` and `high`.

    Returns:
        The claim with its verdict, "not measured" without cells.
    """
    if not differences:
        return Finding(claim, "not measured", "nothing has been run", part)
    num_cells = len(differences)
    num_better = sum(difference["low"] > 0 for difference in differences)
    num_worse = sum(difference["high"] < 0 for difference in differences)
    verdict: Verdict = "does not hold"
    if num_better >= MIN_BETTER_SHARE * num_cells and not num_worse:
        verdict = "holds"
    elif num_better:
        verdict = "mixed"
    mean = 100 * sum(difference["estimate"] for difference in differences) / num_cells
    figure = f"{mean:+.1f} points on average; better in {num_better} and worse in {num_worse} of {num_cells} cells"
    return Finding(claim, verdict, figure, part)
