"""How often the verdict of a diagnosis is right, on the cells of the experiment over all methods.

    python experiments/verdict.py [--workers 2] [--write-only]

The verdict sees dev alone. What each method really reaches, on test, is read from the outcomes of
`experiments/methods.py`, which must have been run. Figures and page go to `experiments/verdict/results.json` and
`README.md`; `--write-only` writes the page from the figures alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import methods as experiment
from grid import Cell, cell_folder, old_folder
from results_file import read_results, write_results
from runner import Job, run_jobs
from scipy.stats import spearmanr
from tables import distinct_keys, markdown_table, select

from regraft import Recipe, Upgrade, load_outcome
from regraft.checkpoint import write_atomic
from regraft.diagnosis import check_pair, load_pair, probe_gain, similarity, verdict
from regraft.diagnosis.choice import MIN_SHARE_AS_IS
from regraft.errors import OutcomeError
from regraft.task import chance_score, load_data, weakness

if TYPE_CHECKING:
    from grid import Grid
    from tables import Row

RESULTS = Path(__file__).parent / "verdict"
CHOICES = ("use as is", "training-free", "short tuning", "scratch")
"""What a verdict can say, from cheap to dear."""
METHOD_BY_CHOICE = {"use as is": "direct", "training-free": "ridge", "short tuning": "ridge+distill"}
"""The method that each choice is judged by; the third with a quarter of scratch's steps."""
MIN_SAFE_SHARE = 0.90
"""A verdict of "use as is" is false where less than this share of the old score above guessing is left."""
MIN_SURE = 0.8
"""The confidence from which the page counts a verdict as sure."""
DIAGNOSTICS = ("predicted", "survives", "agreement", "divergence", "cka", "relative", "gain")
"""The figures on dev whose ranking of the cells is published."""


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--write-only", action="store_true", help="write the page from results.json alone")
    arguments = parser.parse_args()
    try:
        results = read_results(RESULTS) if arguments.write_only else measure(arguments.workers)
    except OutcomeError as error:
        sys.exit(str(error))
    write_atomic(RESULTS / "README.md", write_page(results["runs"], results["summary"]))


def measure(workers: int) -> dict[str, Any]:
    """Judge every old adaptation that has not been judged, and write `results.json`.

    Args:
        workers: Processes of one thread each.

    Returns:
        The content of the file.

    Raises:
        OutcomeError: The file has the results of more runs.
    """
    grid = experiment.prepare_grid(workers)
    cells = [
        (task, upgrade, kind, seed)
        for seed, task, upgrade, kind in itertools.product(grid.seeds, grid.tasks, grid.upgrades, grid.old_recipes)
    ]
    jobs = [
        Job(" ".join(map(str, cell)), judge, (grid, *cell)) for cell in cells if not verdict_file(grid, *cell).is_file()
    ]
    if failures := run_jobs(jobs, workers, print):
        sys.exit("\n".join(failures))
    rows = [
        json.loads(verdict_file(grid, *cell).read_text(encoding="utf-8")) | measure_truth(grid, *cell) for cell in cells
    ]
    return write_results(RESULTS, {"runs": rows, "summary": summarise(rows)}, experiment.count_runs)


def verdict_file(grid: Grid, task: str, upgrade: str, kind: str, seed: int) -> Path:
    """Return the file of a verdict."""
    return grid.out / "verdicts" / f"{task}-{upgrade}-{kind}-seed{seed}.json"


def judge(grid: Grid, task: str, upgrade: str, kind: str, seed: int) -> str:
    """Write the verdict on one old adaptation and the figures behind it, from dev alone; return a line on it."""
    data = dataclasses.replace(load_data(grid.tasks[task], seed), test=None)
    bases = Upgrade(grid.old_base, grid.upgrades[upgrade])
    with load_pair(bases, old_folder(grid, task, kind, seed), data, recipe=Recipe(seed=seed)) as pair:
        checked = check_pair(pair)
        gain = probe_gain(pair)
        likeness = similarity(pair.old.model, pair.new.model, bases.old, pair.data, precision=pair.precision)
        judgement = verdict(
            pair.data.task.scoring,
            pair.split.labels,
            pair.old_predictions,
            pair.new_predictions,
            chance_score(pair.data, pair.split),
            gain=gain,
            weakness=weakness(pair.data, pair.split),
        )
    figures = {
        "task": task,
        "upgrade": upgrade,
        "kind": kind,
        "seed": seed,
        "choice": judgement.choice,
        "sure": judgement.sure,
        "predicted": 100 * judgement.predicted,
        "survives": None if checked.retained is None else 100 * checked.retained,
        "agreement": 100 * checked.agreement,
        "divergence": statistics.fmean(value for layer in likeness.divergence for value in layer),
        "cka": min(likeness.cka),
        "relative": checked.relative,
        "gain": gain.estimate,
    }
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in figures.items()}
    file = verdict_file(grid, task, upgrade, kind, seed)
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, json.dumps(rounded) + "\n")
    return f"{judgement.choice} ({judgement.sure:.0%})"


def measure_truth(grid: Grid, task: str, upgrade: str, kind: str, seed: int) -> Row:
    """Compute what the methods really reach on test.

    Args:
        grid: The experiment over all methods.
        task: The task.
        upgrade: The upgrade.
        kind: The kind of adaptation.
        seed: The seed.

    Returns:
        `left`: the share, in %, of the old score above guessing that each choice keeps; `real_survives`: that of the
        old weights as they are; `real_recovery`: their recovery; `right_choice`: the cheapest that keeps enough.
    """
    full_budget, quarter_budget = (regime.name for regime in grid.regimes[:2])

    def test_score(regime: str, entry: str) -> float:
        cell = Cell(task, upgrade, kind, regime, entry, seed)
        return float(load_outcome(cell_folder(grid, cell)).record.scores.test)

    old = load_outcome(old_folder(grid, task, kind, seed)).record.scores
    floor = old.test_majority
    scratch, direct = test_score(full_budget, "scratch"), test_score(full_budget, "direct")
    recovered_shares = {}
    for choice, method in METHOD_BY_CHOICE.items():
        regime = quarter_budget if choice == "short tuning" else full_budget
        recovered_shares[choice] = (test_score(regime, method) - floor) / (old.test - floor)
    sufficient = (choice for choice, share in recovered_shares.items() if share >= MIN_SHARE_AS_IS)
    return {
        "real_survives": round(100 * recovered_shares["use as is"], 2),
        "real_recovery": round(100 * (direct - floor) / (scratch - floor), 2),
        "right_choice": next(sufficient, "scratch"),
        "left": {choice: round(100 * share, 2) for choice, share in recovered_shares.items()},
    }


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Count right verdicts, false safe ones and errors in each direction, and correlate figures with the truth."""
    safe = [row for row in rows if row["choice"] == "use as is"]
    sure = [row for row in rows if row["sure"] >= MIN_SURE]
    errors = [CHOICES.index(row["choice"]) - CHOICES.index(row["right_choice"]) for row in rows]
    return {
        "cells": len(rows),
        "hits": sum(error == 0 for error in errors),
        "too_cheap": sum(error < 0 for error in errors),
        "too_dear": sum(error > 0 for error in errors),
        "safe": len(safe),
        "false_safe": sum(row["real_survives"] < 100 * MIN_SAFE_SHARE for row in safe),
        "safe_below_threshold": sum(row["real_survives"] < 100 * MIN_SHARE_AS_IS for row in safe),
        "sure": len(sure),
        "hits_when_sure": sum(row["choice"] == row["right_choice"] for row in sure),
        "spearman": {
            name: {truth: _rank_correlation(rows, name, truth) for truth in ("real_recovery", "real_survives")}
            for name in DIAGNOSTICS
        },
    }


def _rank_correlation(rows: list[Row], first: str, second: str) -> float:
    return round(float(spearmanr([row[first] for row in rows], [row[second] for row in rows]).statistic), 3)


def write_page(rows: list[Row], summary: dict[str, Any]) -> str:
    """Write the page.

    Args:
        rows: The verdicts, each with the truth.
        summary: From `summarise`.

    Returns:
        Markdown.
    """
    counts = [
        [choice, *(str(len(select(rows, choice=choice, right_choice=right))) for right in CHOICES)]
        for choice in CHOICES
    ]
    correlations = [
        [name, *(f"{value:+.2f}" for value in by_truth.values())] for name, by_truth in summary["spearman"].items()
    ]
    sections = [
        "# The verdict, measured",
        "Made by `python experiments/verdict.py`, which reproduces it from the outcomes of `experiments/methods.py`; "
        "the figures are in `results.json`. The verdict sees dev, what is real is of test. The right choice is the "
        f"cheapest that leaves at least {MIN_SHARE_AS_IS:.0%} of the old score above guessing: the old weights as "
        "they are, `ridge`, `ridge+distill` with a quarter of scratch's steps, or scratch. The thresholds of the "
        "verdict were not fitted to these cells.",
        f"Of {summary['cells']} verdicts {summary['hits']} are right, {summary['too_cheap']} too cheap and "
        f"{summary['too_dear']} too dear; of the {summary['sure']} that are at least 80 % sure, "
        f"{summary['hits_when_sure']} are right. {summary['safe']} say that the old weights are safe as they are; in "
        f"{summary['false_safe']} of these less than {MIN_SAFE_SHARE:.0%} of the old score above guessing is left, in "
        f"{summary['safe_below_threshold']} less than {MIN_SHARE_AS_IS:.0%}.",
        "## Verdict (rows) and right choice (columns)",
        markdown_table(["", *CHOICES], counts),
        "## How figures rank the cells (Spearman)",
        "With the recovery against scratch, and with what survives of the old deployment's score, both on test.",
        markdown_table(["figure on dev", "recovery", "survives"], correlations),
        "## The cells (means over seeds, %)",
        markdown_table(
            ["task", "upgrade", "kind", "predicted", "survives", "recovery", "verdict", "right choice"],
            [_cell_row(rows, *cell) for cell in distinct_keys(rows, "task", "upgrade", "kind")],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _cell_row(rows: list[Row], task: str, upgrade: str, kind: str) -> list[str]:
    cell_rows = select(rows, task=task, upgrade=upgrade, kind=kind)
    figures = ("predicted", "real_survives", "real_recovery")
    means = [f"{statistics.fmean(row[name] for row in cell_rows):.0f}" for name in figures]
    choices = [", ".join(row[name] for row in cell_rows) for name in ("choice", "right_choice")]
    return [task, upgrade, kind, *means, *choices]


if __name__ == "__main__":
    main()
