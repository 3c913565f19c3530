"""Compute the figures of the experiment over all methods from outcome folders, as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
from grid import cell_entry, cell_folder, iterate_cells, old_folder
from runner import has_outcome, refusal_file
from tables import DIGITS

from regraft import Upgrade, load_outcome
from regraft.methods import methods
from regraft.task import count_flips, recovery
from regraft.task.bootstrap import resampled_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grid import Cell, Grid
    from tables import Row

    from regraft import Outcome
    from regraft.task import Metric

INTERVAL = (0.025, 0.975)
"""The quantiles at the ends of a 95 % interval."""
L2_DIGITS, RELATIVE_DIGITS = 3, 4
"""Decimal places of the distance of two bases; the page prints it without any, and in whole %."""


def collect_results(grid: Grid) -> dict[str, Any]:
    """Compute the figures of all runs so far.

    Args:
        grid: The experiment.

    Returns:
        `made`: versions, seeds, recipes and tasks; `upgrades`: distances of the bases; `methods`: method, options,
        averaging and needs of each entry; `runs`: one row per method, cell and seed; `differences`: the difference of
        each method from its reference, over the seeds that both have; `noise`: shares of negative flips between seeds
        of scratch; `refused`: the cells that methods refused.
    """
    cells = list(iterate_cells(grid))
    outcomes = {cell: load_outcome(cell_folder(grid, cell)) for cell in cells if has_outcome(cell_folder(grid, cell))}
    refusal_files = {cell: refusal_file(grid, cell) for cell in cells if refusal_file(grid, cell).is_file()}
    return {
        "made": _collect_provenance(grid, list(outcomes.values())),
        "upgrades": {name: _collect_distance(grid, name) for name in grid.upgrades},
        "methods": {
            entry.name: {
                "method": entry.method,
                "options": list(entry.options),
                "average": entry.average,
                "needs": methods()[entry.method].needs(),
            }
            for regime in grid.regimes
            for entry in grid.entries(regime)
        },
        "runs": _collect_runs(grid, outcomes),
        "differences": _collect_differences(grid, outcomes),
        "noise": _collect_noise(outcomes),
        "refused": [
            {**dataclasses.asdict(cell), "why": file.read_text(encoding="utf-8").strip()}
            for cell, file in refusal_files.items()
        ],
    }


def _collect_runs(grid: Grid, outcomes: dict[Cell, Outcome]) -> list[Row]:
    """Return the figures of every cell whose scratch and reference have been run."""
    old_outcomes = {
        (task, kind, seed): load_outcome(old_folder(grid, task, kind, seed))
        for task, kind, seed in {(cell.task, cell.kind, cell.seed) for cell in outcomes}
    }
    rows = []
    for cell, outcome in outcomes.items():
        scratch = outcomes.get(scratch_cell(grid, cell))
        reference = outcomes.get(dataclasses.replace(cell, entry="scratch", regime=grid.regimes[0].name))
        if scratch and reference:
            old = old_outcomes[cell.task, cell.kind, cell.seed]
            rows.append({**dataclasses.asdict(cell), **run_figures(outcome, scratch, reference, old)})
    return rows


def scratch_cell(grid: Grid, cell: Cell) -> Cell:
    """Return the run of scratch that a cell is compared with.

    Args:
        grid: The experiment.
        cell: A cell of the experiment.

    Returns:
        The cell of scratch with the same task, upgrade, kind and seed, in the cell's regime if scratch is run in it,
        else in the reference regime.
    """
    regime = grid.regime(cell.regime)
    if not any(entry.name == "scratch" for entry in grid.entries(regime)):
        regime = grid.regimes[0]
    return dataclasses.replace(cell, entry="scratch", regime=regime.name)


def run_figures(outcome: Outcome, scratch: Outcome, reference: Outcome, old: Outcome) -> dict[str, Any]:
    """Compute the figures of one run.

    Args:
        outcome: The outcome of the method.
        scratch: The outcome of scratch, of the same task, upgrade, kind and seed, that the method's cost and learning
            curve are compared with.
        reference: The outcome of scratch with all labels and all steps.
        old: The outcome of the old tuning with the same seed.

    Returns:
        `test`, `dev` (the best), `start` (dev before the first step), `old` (the old model on test) and `majority`
        (chance); `headroom`, the reference's gain over chance; `recovery` in % of that gain, not clipped, None where
        the gain is less than `MIN_HEADROOM`; `share`, the steps until dev reached scratch's last score in % of
        scratch's steps, None if dev never reached it; `negative_flips`, a share, against the old deployment; `steps`,
        `seconds` and `labels`, and each in % of scratch's; `chosen` and `why` from the notes of `auto`.
    """
    scores = outcome.record.scores
    cost, scratch_cost = outcome.record.cost, scratch.record.cost
    chance = reference.record.scores.test_majority
    reference_score = reference.record.scores.test
    recovery_share = recovery(scores.test, chance, reference_score)
    target_score = scratch.curve[-1]["score"]
    reached_step = next((point["step"] for point in outcome.curve if point["score"] >= target_score), None)
    figures = {
        "test": scores.test,
        "dev": max(point["score"] for point in outcome.curve),
        "start": scores.dev_at_start,
        "old": old.record.scores.test,
        "majority": chance,
        "headroom": reference_score - chance,
        "recovery": None if recovery_share is None else 100 * recovery_share,
        "share": None if reached_step is None else 100 * reached_step / scratch_cost.steps,
        "negative_flips": count_flips(old.right("test"), outcome.right("test")).negative_rate,
    }
    for name in ("steps", "seconds", "labels"):
        amount, scratch_amount = getattr(cost, name), getattr(scratch_cost, name)
        figures[name] = amount
        figures[f"{name}_share"] = 100 * amount / scratch_amount if scratch_amount else None
    rounded = {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in figures.items()}
    notes = outcome.record.notes
    return rounded | {name: notes[name] for name in ("chosen", "why") if name in notes}


def read_test_labels(outcome: Outcome) -> list[Any]:
    """Read the label of each test example, in the order of the predictions."""
    lines = (outcome.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["label"] for row in map(json.loads, lines) if row["split"] == "test"]


def bootstrap_difference(
    metric: Metric | str,
    labels: Sequence[Any],
    predictions: Sequence[Sequence[Any]],
    reference_predictions: Sequence[Sequence[Any]],
    seed: int = 0,
) -> dict[str, float]:
    """Compute the difference of two methods' mean scores over seeds, with a 95 % interval by the paired bootstrap.

    The test examples are resampled, and all runs are scored on the same draw. The interval measures how much the
    difference depends on the examples; the standard deviation over seeds measures how much it depends on the runs.

    Args:
        metric: The task's metric, or its name.
        labels: The target of each example.
        predictions: The prediction for each example by a method, one row per seed.
        reference_predictions: The same by the reference method.
        seed: The seed of the resampling.

    Returns:
        `estimate`, `low` and `high`, as differences of scores; positive if the method is better than the reference.

    Source: Koehn, 2004, Statistical Significance Tests for Machine Translation Evaluation.
    """
    scores = resampled_scores(metric, labels, [*predictions, *reference_predictions], seed=seed)
    num_runs = len(predictions)
    estimate, *resampled = np.mean(scores[:num_runs] - scores[num_runs:], axis=0)
    low, high = np.quantile(resampled, INTERVAL)
    return {
        "estimate": round(float(estimate), DIGITS),
        "low": round(float(low), DIGITS),
        "high": round(float(high), DIGITS),
    }


def _without_seed(cell: Cell) -> Cell:
    return dataclasses.replace(cell, seed=0)


def _collect_differences(grid: Grid, outcomes: dict[Cell, Outcome]) -> list[Row]:
    """Compare methods that train with scratch, and the others with direct, over the seeds that both have."""
    rows = []
    for cell in dict.fromkeys(map(_without_seed, outcomes)):
        trains = "training" in methods()[cell_entry(grid, cell).method].needs()
        reference = "scratch" if trains else "direct"
        if cell.entry == reference:
            continue
        method_outcomes, reference_outcomes = [], []
        for seed in grid.seeds:
            seed_cell = dataclasses.replace(cell, seed=seed)
            reference_cell = scratch_cell(grid, seed_cell) if trains else dataclasses.replace(seed_cell, entry="direct")
            if seed_cell in outcomes and reference_cell in outcomes:
                method_outcomes.append(outcomes[seed_cell])
                reference_outcomes.append(outcomes[reference_cell])
        if method_outcomes:
            row = dataclasses.asdict(cell) | {"against": reference, "seeds": len(method_outcomes)}
            del row["seed"]
            task = grid.tasks[cell.task]
            difference = bootstrap_difference(
                task.bind_metric(task.scoring, method_outcomes[0].record.labels),
                task.as_targets(read_test_labels(method_outcomes[0])),
                [task.as_targets(outcome.predictions("test")) for outcome in method_outcomes],
                [task.as_targets(outcome.predictions("test")) for outcome in reference_outcomes],
            )
            rows.append(row | difference)
    return rows


def _collect_noise(outcomes: dict[Cell, Outcome]) -> list[Row]:
    """Compute the noise floor of each cell: mean share of negative flips over all ordered pairs of scratch's seeds."""
    rows = []
    scratch = {cell: outcome for cell, outcome in outcomes.items() if cell.entry == "scratch"}
    for cell in dict.fromkeys(map(_without_seed, scratch)):
        repetitions = [outcome for seed_cell, outcome in scratch.items() if _without_seed(seed_cell) == cell]
        rates = [
            count_flips(first.right("test"), second.right("test")).negative_rate
            for first, second in itertools.permutations(repetitions, 2)
        ]
        if rates:
            row = dataclasses.asdict(cell) | {"negative_flips": round(statistics.fmean(rates), DIGITS)}
            rows.append({name: value for name, value in row.items() if name not in ("seed", "entry")})
    return rows


def _collect_provenance(grid: Grid, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the versions, seeds, recipes and tasks that the figures depend on."""
    versions = sorted({json.dumps(outcome.record.versions, sort_keys=True) for outcome in outcomes})
    return {
        "versions": [json.loads(text) for text in versions],
        "seeds": list(grid.seeds),
        "old_tuning": {kind: recipe.record() for kind, recipe in grid.old_recipes.items()},
        "regimes": [
            {
                "name": regime.name,
                "shots": regime.shots,
                "recipes": {kind: recipe.record() for kind, recipe in regime.recipes.items()},
            }
            for regime in grid.regimes
        ],
        "tasks": {
            name: {
                "metric": task.metric,
                "max_length": task.max_length,
                "labels": len(getattr(task, "labels", None) or ()),
            }
            for name, task in grid.tasks.items()
        },
    }


def _collect_distance(grid: Grid, upgrade: str) -> dict[str, float]:
    distance = Upgrade(grid.old_base, grid.upgrades[upgrade]).distance()
    return {
        "l2": round(distance.l2, L2_DIGITS),
        "relative": round(distance.relative, RELATIVE_DIGITS),
        "cosine": round(distance.cosine, DIGITS),
    }
