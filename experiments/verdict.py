"""Measure how often the verdict of a diagnosis is right, on the cells of the experiment over all methods.

    python experiments/verdict.py [--workers 2] [--write-only]

The verdict does not see test. The test scores of the methods are read from the outcomes of `experiments/methods.py`,
which must have been run. Figures and page are written to `experiments/verdict/results.json` and `README.md`;
`--write-only` writes the page from the figures alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import methods as experiment
from grid import Cell, cell_folder, old_folder
from publish import count_runs
from results_file import read_results, write_results
from runner import Job, run_jobs
from scipy.stats import spearmanr
from tables import DIGITS, PERCENT_DIGITS, distinct_keys, markdown_table, select

from regraft import Recipe, Upgrade, load_outcome
from regraft.checkpoint import write_atomic
from regraft.diagnosis import check_pair, load_pair, probe_gain, similarity, verdict
from regraft.diagnosis.choice import MIN_SHARE_AS_IS, Choice
from regraft.errors import OutcomeError
from regraft.task import chance_score, load_data, weakness

if TYPE_CHECKING:
    from grid import Grid
    from tables import Row

RESULTS = Path(__file__).parent / "verdict"
CHOICES = get_args(Choice)
"""The choices of a verdict, from cheap to expensive."""
METHOD_BY_CHOICE = {"use as is": "direct", "training-free": "ridge", "short tuning": "ridge+distill"}
"""The method that each choice is judged by; a short tuning has a quarter of scratch's steps."""
MIN_SAFE_SHARE = 0.90
"""The share of the old score above chance below which a verdict of "use as is" counts as false; arbitrary, but lower
than the verdict's own threshold."""
MIN_SURE = 0.8
"""The confidence from which the page counts a verdict as sure; arbitrary."""
CORRELATION_DIGITS = 3
"""Decimal places of a published rank correlation; the page prints two."""
DIAGNOSTICS = ("predicted", "survives", "agreement", "divergence", "cka", "relative", "gain")
"""The figures whose rank correlation with the truth is published."""


def main() -> None:
    """Make missing verdicts and write the results."""
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
    """Judge every old adaptation without a verdict, and write `results.json`.

    Args:
        workers: The number of processes of one thread each.

    Returns:
        The content of the file.

    Raises:
        OutcomeError: The file has the results of more runs.
        SystemExit: A verdict could not be made.
    """
    grid = experiment.prepare_grid(workers)
    cells = [
        (task, upgrade, kind, seed)
        for seed, task, upgrade, kind in itertools.product(grid.seeds, grid.tasks, grid.upgrades, grid.old_recipes)
    ]
    missing_cells = [cell for cell in cells if not verdict_file(grid, *cell).is_file()]
    jobs = [Job(" ".join(map(str, cell)), judge, (grid, *cell)) for cell in missing_cells]
    failures = run_jobs(jobs, workers, print)
    if failures:
        sys.exit("\n".join(failures))
    rows = []
    for cell in cells:
        figures = json.loads(verdict_file(grid, *cell).read_text(encoding="utf-8"))
        rows.append(figures | measure_truth(grid, *cell))
    return write_results(RESULTS, {"runs": rows, "summary": summarise(rows)}, count_runs)


def verdict_file(grid: Grid, task: str, upgrade: str, kind: str, seed: int) -> Path:
    """Return the file of a verdict."""
    return grid.out / "verdicts" / f"{task}-{upgrade}-{kind}-seed{seed}.json"


def judge(grid: Grid, task: str, upgrade: str, kind: str, seed: int) -> str:
    """Write the verdict on an old adaptation and its figures, without the test split.

    Args:
        grid: The experiment over all methods.
        task: The name of the task.
        upgrade: The name of the upgrade.
        kind: The kind of adaptation.
        seed: The seed of the run.

    Returns:
        A line on the verdict.
    """
    data = dataclasses.replace(load_data(grid.tasks[task], seed), test=None)
    bases = Upgrade(grid.old_base, grid.upgrades[upgrade])
    with load_pair(bases, old_folder(grid, task, kind, seed), data, recipe=Recipe(seed=seed)) as pair:
        check_result = check_pair(pair)
        gain = probe_gain(pair)
        head_similarity = similarity(pair.old.model, pair.new.model, bases.old, pair.data, precision=pair.precision)
        judgement = verdict(
            pair.data.scoring,
            pair.split.targets,
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
        "survives": None if check_result.retained is None else 100 * check_result.retained,
        "agreement": 100 * check_result.agreement,
        "divergence": statistics.fmean(value for layer in head_similarity.divergence for value in layer),
        "cka": min(head_similarity.cka),
        "relative": check_result.relative,
        "gain": gain.estimate,
    }
    rounded = {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in figures.items()}
    file = verdict_file(grid, task, upgrade, kind, seed)
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, json.dumps(rounded) + "\n")
    return f"{judgement.choice} ({judgement.sure:.0%})"


def measure_truth(grid: Grid, task: str, upgrade: str, kind: str, seed: int) -> Row:
    """Compute the figures of the methods on test, in %.

    Args:
        grid: The experiment over all methods.
        task: The name of the task.
        upgrade: The name of the upgrade.
        kind: The kind of adaptation.
        seed: The seed of the run.

    Returns:
        `left`: the share of the old score above chance that each choice but `scratch` preserves; `real_survives`: this
        share for the unchanged old weights; `real_recovery`: their recovery; `right_choice`: the cheapest choice that
        preserves at least `MIN_SHARE_AS_IS`, or `scratch` if none does.
    """
    full_budget, quarter_budget = (regime.name for regime in grid.regimes[:2])

    def test_score(regime: str, entry: str) -> float:
        cell = Cell(task, upgrade, kind, regime, entry, seed)
        return float(load_outcome(cell_folder(grid, cell)).record.scores.test)

    old = load_outcome(old_folder(grid, task, kind, seed)).record.scores
    chance = old.test_majority
    scratch, direct = test_score(full_budget, "scratch"), test_score(full_budget, "direct")
    retained_shares = {}
    for choice, method in METHOD_BY_CHOICE.items():
        regime = quarter_budget if choice == "short tuning" else full_budget
        retained_shares[choice] = (test_score(regime, method) - chance) / (old.test - chance)
    sufficient_choices = (choice for choice, share in retained_shares.items() if share >= MIN_SHARE_AS_IS)
    return {
        "real_survives": round(100 * retained_shares["use as is"], PERCENT_DIGITS),
        "real_recovery": round(100 * (direct - chance) / (scratch - chance), PERCENT_DIGITS),
        "right_choice": next(sufficient_choices, "scratch"),
        "left": {choice: round(100 * share, PERCENT_DIGITS) for choice, share in retained_shares.items()},
    }


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Count right, too cheap and too expensive verdicts, and correlate figures on dev with figures on test.

    Args:
        rows: The verdicts, each with the figures of `measure_truth`.

    Returns:
        Counts by name, and `spearman`: the rank correlation of each figure of `DIAGNOSTICS` with `real_recovery` and
        `real_survives`.
    """
    safe_rows = [row for row in rows if row["choice"] == "use as is"]
    sure_rows = [row for row in rows if row["sure"] >= MIN_SURE]
    errors = [CHOICES.index(row["choice"]) - CHOICES.index(row["right_choice"]) for row in rows]
    return {
        "cells": len(rows),
        "hits": sum(error == 0 for error in errors),
        "too_cheap": sum(error < 0 for error in errors),
        "too_dear": sum(error > 0 for error in errors),
        "safe": len(safe_rows),
        "false_safe": sum(row["real_survives"] < 100 * MIN_SAFE_SHARE for row in safe_rows),
        "safe_below_threshold": sum(row["real_survives"] < 100 * MIN_SHARE_AS_IS for row in safe_rows),
        "sure": len(sure_rows),
        "hits_when_sure": sum(row["choice"] == row["right_choice"] for row in sure_rows),
        "spearman": {
            name: {truth: _rank_correlation(rows, name, truth) for truth in ("real_recovery", "real_survives")}
            for name in DIAGNOSTICS
        },
    }


def _rank_correlation(rows: list[Row], figure: str, truth: str) -> float:
    correlation = spearmanr([row[figure] for row in rows], [row[truth] for row in rows]).statistic
    return round(float(correlation), CORRELATION_DIGITS)


def write_page(rows: list[Row], summary: dict[str, Any]) -> str:
    """Write the page.

    Args:
        rows: The verdicts, each with the figures of `measure_truth`.
        summary: The counts and correlations, as `summarise` returns them.

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
        f"{summary['too_dear']} too dear; of the {summary['sure']} that are at least {100 * MIN_SURE:.0f} % sure, "
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
