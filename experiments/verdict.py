"""How often the verdict of a diagnosis is right, on the cells of the experiment over all methods.

    python experiments/verdict.py [--workers 2] [--write-only]

The verdict sees dev alone; what really came of each method is read from the outcomes of `experiments/methods.py`, which
must have been run, on test. Figures and page go to `experiments/verdict/results.json` and `README.md`; `--write-only`
writes the page from the figures alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import methods as experiment
from grid import Cell, cell_folder, old_folder
from runner import run_jobs
from scipy.stats import spearmanr
from tables import read_results, table, write_results

from regraft import Recipe, Upgrade, load_outcome
from regraft.checkpoint import write_atomic
from regraft.diagnosis import check_pair, load_pair, probe_gain, similarity, verdict
from regraft.diagnosis.choice import MIN_SHARE_AS_IS
from regraft.errors import OutcomeError
from regraft.task import chance_score, load_data, weakness

if TYPE_CHECKING:
    from grid import Grid

RESULTS = Path(__file__).parent / "verdict"
CHEAPEST = {"use as is": "direct", "training-free": "ridge", "short tuning": "ridge+distill"}
"""What each choice is held against; the third with a quarter of scratch's steps."""
CLEARLY = 0.90
"""A verdict that says safe is false where less than this share of the old score above guessing is left."""


def main() -> None:
    """Make what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--write-only", action="store_true", help="write the page of results.json")
    given = parser.parse_args()
    try:
        results = read_results(RESULTS) if given.write_only else measure(given.workers)
    except OutcomeError as error:
        sys.exit(str(error))
    write_atomic(RESULTS / "README.md", page(results["runs"], results["summary"]))


def measure(workers: int) -> dict[str, Any]:
    """Judge every old adaptation that has not been judged, and write `results.json`.

    Args:
        workers: Processes of one thread each.

    Returns:
        Its content.

    Raises:
        OutcomeError: It has the results of more runs.
    """
    grid = experiment.prepare(workers)
    places = [
        (task, upgrade, kind, seed)
        for seed in grid.seeds for task in grid.tasks for upgrade in grid.upgrades for kind in grid.tuning
    ]  # fmt: skip
    todo = [place for place in places if not file_of(grid, *place).is_file()]
    if failed := run_jobs([(" ".join(map(str, p)), judge, (grid, *p)) for p in todo], workers, print):
        sys.exit("\n".join(failed))
    rows = [json.loads(file_of(grid, *place).read_text(encoding="utf-8")) | real(grid, *place) for place in places]
    return write_results(RESULTS, {"runs": rows, "summary": summary(rows)}, lambda some: len(some["runs"]))


def file_of(grid: Grid, task: str, upgrade: str, kind: str, seed: int) -> Path:
    """Give the place of a verdict."""
    return grid.out / "verdicts" / f"{task}-{upgrade}-{kind}-seed{seed}.json"


def judge(grid: Grid, task: str, upgrade: str, kind: str, seed: int) -> str:
    """Give the verdict on one old adaptation, from dev, and the figures that might lead to one."""
    data = dataclasses.replace(load_data(grid.tasks[task], seed), test=None)
    bases = Upgrade(grid.old, grid.upgrades[upgrade])
    with load_pair(bases, old_folder(grid, task, kind, seed), data, recipe=Recipe(seed=seed)) as pair:
        checked, gain = check_pair(pair), probe_gain(pair)
        alike = similarity(pair.old.model, pair.new.model, bases.old, pair.data, precision=pair.precision)
        told = verdict(
            pair.data.task.scoring, pair.split.labels, pair.old_predictions, pair.new_predictions,
            chance_score(pair.data, pair.split), gain=gain, weakness=weakness(pair.data, pair.split),
        )  # fmt: skip
    found = {
        "task": task, "upgrade": upgrade, "kind": kind, "seed": seed, "choice": told.choice, "sure": told.sure,
        "predicted": 100 * told.predicted, "survives": None if checked.retained is None else 100 * checked.retained,
        "agreement": 100 * checked.agreement,
        "divergence": statistics.fmean(value for row in alike.divergence for value in row),
        "cka": min(alike.cka), "relative": checked.relative, "gain": gain.estimate,
    }  # fmt: skip
    file = file_of(grid, task, upgrade, kind, seed)
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, json.dumps({n: round(v, 5) if isinstance(v, float) else v for n, v in found.items()}) + "\n")
    return f"{told.choice} ({told.sure:.0%})"


def real(grid: Grid, task: str, upgrade: str, kind: str, seed: int) -> dict[str, Any]:
    """Give what really came of it, on test: shares of the old score above guessing, recoveries, the right choice."""
    whole, quarter = (regime.name for regime in grid.regimes[:2])

    def test(regime: str, entry: str) -> float:
        cell = Cell(task, upgrade, kind, regime, entry, seed)
        return float(load_outcome(cell_folder(grid, cell)).record.scores.test)

    old = load_outcome(old_folder(grid, task, kind, seed)).record.scores
    floor, scratch = old.test_majority, test(whole, "scratch")
    left = {
        choice: (test(quarter if choice == "short tuning" else whole, entry) - floor) / (old.test - floor)
        for choice, entry in CHEAPEST.items()
    }
    right = next((choice for choice, share in left.items() if share >= MIN_SHARE_AS_IS), "scratch")
    recovery = 100 * (test(whole, "direct") - floor) / (scratch - floor)
    return {
        "real_survives": round(100 * left["use as is"], 2), "real_recovery": round(recovery, 2), "right_choice": right,
        "left": {choice: round(100 * share, 2) for choice, share in left.items()},
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute the rates: of hits, of false safe verdicts, and how well each figure ranks the cells."""
    safe = [row for row in rows if row["choice"] == "use as is"]
    order = ["use as is", "training-free", "short tuning", "scratch"]
    apart = [order.index(row["choice"]) - order.index(row["right_choice"]) for row in rows]
    ranks = {
        name: {
            real: round(float(spearmanr([row[name] for row in rows], [row[real] for row in rows]).statistic), 3)
            for real in ("real_recovery", "real_survives")
        }
        for name in ("predicted", "survives", "agreement", "divergence", "cka", "relative", "gain")
    }
    sure = [row for row in rows if row["sure"] >= 0.8]
    return {
        "cells": len(rows),
        "hits": sum(not gap for gap in apart),
        "too_cheap": sum(gap < 0 for gap in apart),
        "too_dear": sum(gap > 0 for gap in apart),
        "safe": len(safe),
        "false_safe": sum(row["real_survives"] < 100 * CLEARLY for row in safe),
        "safe_below_threshold": sum(row["real_survives"] < 100 * MIN_SHARE_AS_IS for row in safe),
        "sure": len(sure),
        "hits_when_sure": sum(row["choice"] == row["right_choice"] for row in sure),
        "spearman": ranks,
    }


def page(rows: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """Write the page."""
    order = ["use as is", "training-free", "short tuning", "scratch"]
    counts = [
        [choice, *(str(sum((r["choice"], r["right_choice"]) == (choice, right) for r in rows)) for right in order)]
        for choice in order
    ]
    ranks = [[name, *(f"{value:+.2f}" for value in several.values())] for name, several in found["spearman"].items()]
    cells = []
    for task, upgrade, kind in dict.fromkeys((r["task"], r["upgrade"], r["kind"]) for r in rows):
        mine = [r for r in rows if (r["task"], r["upgrade"], r["kind"]) == (task, upgrade, kind)]
        means = [statistics.fmean(r[name] for r in mine) for name in ("predicted", "real_survives", "real_recovery")]
        choices = [", ".join(r[name] for r in mine) for name in ("choice", "right_choice")]
        cells.append([task, upgrade, kind, *(f"{mean:.0f}" for mean in means), *choices])
    return "\n\n".join([
        "# The verdict, measured",
        "Made by `python experiments/verdict.py`, which reproduces it from the outcomes of `experiments/methods.py`; "
        "the figures are in `results.json`. The verdict sees dev, what is real is of test. The right choice is the "
        f"cheapest that leaves at least {MIN_SHARE_AS_IS:.0%} of the old score above guessing: the old weights as they are, "
        "`ridge`, `ridge+distill` with a quarter of scratch's steps, or scratch. The thresholds of the verdict were "
        "not fitted to these cells.",
        f"Of {found['cells']} verdicts {found['hits']} are right, {found['too_cheap']} too cheap and "
        f"{found['too_dear']} too dear; of the {found['sure']} that are at least 80 % sure, {found['hits_when_sure']} "
        f"are right. {found['safe']} say that the old weights are safe as they are; in {found['false_safe']} of these "
        f"less than {CLEARLY:.0%} of the old score above guessing is left, in {found['safe_below_threshold']} less "
        f"than {MIN_SHARE_AS_IS:.0%}.",
        "## Verdict (rows) and right choice (columns)",
        table(["", *order], counts),
        "## How figures rank the cells (Spearman)",
        "With the recovery against scratch, and with what survives of the old deployment's score, both on test.",
        table(["figure on dev", "recovery", "survives"], ranks),
        "## The cells (means over seeds, %)",
        table(["task", "upgrade", "kind", "predicted", "survives", "recovery", "verdict", "right choice"], cells),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
