"""From outcome folders to the figures of an experiment, as plain JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
from grid import cell_folder, cells, old_folder
from runner import refusal

from regraft import Upgrade, load_outcome
from regraft.methods import methods
from regraft.task import flips, recovery
from regraft.task.bootstrap import resampled_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grid import Cell, Grid

    from regraft import Outcome


def collect(grid: Grid) -> dict[str, Any]:
    """Compute all figures of what has been run so far.

    Args:
        grid: The experiment.

    Returns:
        `made`: versions, seeds, recipes and sizes; `upgrades`: distances; `methods`: what each needs; `runs`: one a
        method, cell and seed; `differences`: of methods to their reference over all seeds; `noise`: negative flips
        between seeds of scratch; `refused`: what methods do not take.
    """
    found = {cell: load_outcome(cell_folder(grid, cell)) for cell in cells(grid) if _is_there(grid, cell)}
    old = {
        (task, kind, seed): load_outcome(old_folder(grid, task, kind, seed))
        for task, kind, seed in {(cell.task, cell.kind, cell.seed) for cell in found}
    }
    runs = []
    for cell, outcome in found.items():
        scratch = found.get(baseline(grid, cell))
        reference = found.get(dataclasses.replace(cell, entry="scratch", regime=grid.regimes[0].name))
        if scratch and reference:
            before = old[cell.task, cell.kind, cell.seed]
            runs.append({**dataclasses.asdict(cell), **run_figures(outcome, scratch, reference, before)})
    return {
        "made": _made(grid, list(found.values())),
        "upgrades": {name: _moved(grid, name) for name in grid.upgrades},
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
        "runs": runs,
        "differences": _differences(grid, found),
        "noise": _noise(found),
        "refused": [
            {**dataclasses.asdict(cell), "why": refusal(grid, cell).read_text(encoding="utf-8").strip()}
            for cell in cells(grid)
            if refusal(grid, cell).is_file()
        ],
    }


def baseline(grid: Grid, cell: Cell) -> Cell:
    """Give the scratch that a cell is held against: its regime's own, or where that has none the reference.

    Args:
        grid: The experiment.
        cell: Any of its cells.

    Returns:
        The cell of scratch with the same task, upgrade, kind and seed.
    """
    regime = next(regime for regime in grid.regimes if regime.name == cell.regime)
    own = any(entry.name == "scratch" for entry in grid.entries(regime))
    return dataclasses.replace(cell, entry="scratch", regime=regime.name if own else grid.regimes[0].name)


def run_figures(outcome: Outcome, scratch: Outcome, reference: Outcome, old: Outcome) -> dict[str, Any]:
    """Give the figures of one run.

    Args:
        outcome: What came of the method.
        scratch: Of the scratch it is held against, of the same seed and cell.
        reference: Of scratch with all labels and the whole budget.
        old: The old deployment, of the same seed.

    Returns:
        `test`, `dev` (the best), `start` (dev before the first step); `recovery` in % of the reference's gain over a
        majority guess, not clipped, None where that gain is below 3 points; `share`: steps until dev reached scratch's
        last score in % of scratch's steps, None if it never did; `negative_flips` against the old deployment; `steps`,
        `seconds` and `labels`, and in % of scratch's.
    """
    scores, cost, most = outcome.record.scores, outcome.record.cost, scratch.record.cost
    floor, best = reference.record.scores.test_majority, reference.record.scores.test
    share = recovery(scores.test, floor, best)
    target = scratch.curve[-1]["score"]
    reached = next((point["step"] for point in outcome.curve if point["score"] >= target), None)
    labels = test_labels(outcome)
    figures = {
        "test": scores.test,
        "dev": max(point["score"] for point in outcome.curve),
        "start": scores.dev_at_start,
        "old": old.record.scores.test,
        "majority": floor,
        "headroom": best - floor,
        "recovery": None if share is None else 100 * share,
        "share": None if reached is None else 100 * reached / most.steps,
        "negative_flips": flips(labels, old.predictions("test"), outcome.predictions("test")).negative_rate,
    }
    for name in ("steps", "seconds", "labels"):
        took, most_took = getattr(cost, name), getattr(most, name)
        figures |= {name: took, f"{name}_share": 100 * took / most_took if most_took else None}
    notes = outcome.record.notes
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in figures.items()}
    return rounded | {name: notes[name] for name in ("chosen", "why") if name in notes}


def test_labels(outcome: Outcome) -> list[int]:
    """Give the true classes of test, in the order of the predictions."""
    lines = (outcome.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["label"] for row in map(json.loads, lines) if row["split"] == "test"]


def difference(
    metric: str, labels: Sequence[int], ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], seed: int = 0
) -> dict[str, float]:
    """Give a difference of two methods' mean scores over seeds with a 95 % interval by the paired bootstrap.

    The examples of test are drawn, all runs being scored on the same draw (Koehn, 2004): the interval is about other
    examples, and the standard deviation over seeds about other runs.

    Args:
        metric: The task's.
        labels: The true class of each example.
        ours: What one method predicts, a row a seed.
        theirs: What the other does, likewise.
        seed: What the resamples are drawn from.

    Returns:
        `estimate`, `low` and `high`.
    """
    scores = resampled_scores(metric, labels, [*ours, *theirs], seed=seed)
    estimate, *differences = np.mean(scores[: len(ours)] - scores[len(ours) :], axis=0)
    low, high = np.quantile(differences, [0.025, 0.975])
    return {"estimate": round(float(estimate), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def _differences(grid: Grid, found: dict[Cell, Outcome]) -> list[dict[str, Any]]:
    """Hold methods without training against direct, the others against scratch, over the seeds that both have."""
    rows = []
    for cell in dict.fromkeys(dataclasses.replace(cell, seed=0) for cell in found):
        entry = next(e for r in grid.regimes if r.name == cell.regime for e in grid.entries(r) if e.name == cell.entry)
        against = "scratch" if "training" in methods()[entry.method].needs() else "direct"
        pairs = [
            (found[mine], found[other])
            for mine in (dataclasses.replace(cell, seed=seed) for seed in grid.seeds)
            if mine in found and (other := _against(grid, mine, against)) in found
        ]
        if cell.entry != against and pairs:
            ours, theirs = ([pair[side].predictions("test") for pair in pairs] for side in (0, 1))
            metric = pairs[0][0].record.task.metric
            row = dataclasses.asdict(cell) | {"against": against, "seeds": len(pairs)}
            del row["seed"]
            rows.append(row | difference(metric, test_labels(pairs[0][0]), ours, theirs))
    return rows


def _against(grid: Grid, cell: Cell, entry: str) -> Cell:
    return baseline(grid, cell) if entry == "scratch" else dataclasses.replace(cell, entry=entry)


def _noise(found: dict[Cell, Outcome]) -> list[dict[str, Any]]:
    """Count negative flips between each two seeds of scratch, both ways."""
    rows = []
    scratch = {cell: outcome for cell, outcome in found.items() if cell.entry == "scratch"}
    for cell in dict.fromkeys(dataclasses.replace(cell, seed=0) for cell in scratch):
        same = [outcome for other, outcome in scratch.items() if dataclasses.replace(other, seed=0) == cell]
        pairs = list(itertools.permutations(same, 2))
        if pairs:
            rates = [
                flips(test_labels(one), one.predictions("test"), other.predictions("test")).negative_rate
                for one, other in pairs
            ]
            row = dataclasses.asdict(cell) | {"negative_flips": round(statistics.fmean(rates), 5)}
            rows.append({name: value for name, value in row.items() if name not in ("seed", "entry")})
    return rows


def _made(grid: Grid, outcomes: list[Outcome]) -> dict[str, Any]:
    versions = sorted({json.dumps(outcome.record.versions, sort_keys=True) for outcome in outcomes})
    return {
        "versions": [json.loads(text) for text in versions],
        "seeds": list(grid.seeds),
        "old_tuning": {kind: dataclasses.asdict(recipe) for kind, recipe in grid.tuning.items()},
        "regimes": [
            {
                "name": regime.name,
                "shots": regime.shots,
                "recipes": {kind: dataclasses.asdict(recipe) for kind, recipe in regime.recipes.items()},
            }
            for regime in grid.regimes
        ],
        "tasks": {
            name: {"metric": task.metric, "max_length": task.max_length, "labels": len(task.labels or ())}
            for name, task in grid.tasks.items()
        },
    }


def _moved(grid: Grid, name: str) -> dict[str, float]:
    moved = Upgrade(grid.old, grid.upgrades[name]).distance()
    return {"l2": round(moved.l2, 3), "relative": round(moved.relative, 4), "cosine": round(moved.cosine, 5)}


def _is_there(grid: Grid, cell: Cell) -> bool:
    return (cell_folder(grid, cell) / "outcome.json").is_file()
