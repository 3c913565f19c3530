"""Experiment 4: tuning that starts from outdated weights of the same, a similar or an unrelated task."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import (
    DIGITS,
    PERCENT_DIGITS,
    distinct_keys,
    format_difference,
    format_mean,
    format_steps_share,
    markdown_table,
    median_steps_share,
    select,
)

from findings.charts import draw_lines
from findings.experiment import Cell, CellRecord, Experiment, Finding, Page, judge_claim, judge_difference
from findings.runs import (
    TaskUpgrade,
    accuracy_difference,
    average_curves,
    drop_predictions,
    mean_dev_score,
    read_tuning_test_labels,
    run_method,
    steps_to_score,
)
from findings.settings import NonNegativeInt, StrictModel
from findings.store import Tuning, outcome_figures

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tables import Row

    from findings.store import Store

ROLES = ("same", "similar", "unrelated")
"""The relations of the outdated weights' task to the tuned task."""
MAX_STEPS_SHARE = 50.0
"""The % of scratch's steps up to which reaching scratch's last score counts as faster; arbitrary, but fixed before any
cell was measured."""
PART = "method `init`"
"""The part of the paper that the claims belong to."""


class Target(StrictModel):
    """A task to tune on the new base, and the tasks of the outdated weights to start from.

    Args:
        task: The name of the task.
        similar: The name of a similar task.
        unrelated: The name of an unrelated task.
        kinds: Kinds of adaptation.
    """

    task: str = Field(description="the name of a task")
    similar: str = Field(description="the name of a similar task")
    unrelated: str = Field(description="the name of an unrelated task")
    kinds: tuple[str, ...] = Field(min_length=1, description="a list of kinds")

    def source_task(self, role: str) -> str:
        """Return the task of the outdated weights by its relation to the tuned task, one of `ROLES`."""
        return {"same": self.task, "similar": self.similar, "unrelated": self.unrelated}[role]


class Config(StrictModel):
    """The bases and tasks to run.

    Args:
        old: The index of the base of the outdated weights.
        new: The index of the base to tune.
        targets: The tasks to tune.
    """

    old: NonNegativeInt = Field(description="the index of a base, 0 or more")
    new: NonNegativeInt = Field(description="the index of a base, 0 or more")
    targets: tuple[Target, ...] = Field(min_length=1, description="a list with task, similar, unrelated, kinds")


def list_starts(config: Config) -> list[tuple[str, str, str, str]]:
    """Return one start per task, kind and role, as (task, kind, role, task of the outdated weights)."""
    return [
        (target.task, kind, role, target.source_task(role))
        for target in config.targets
        for kind in target.kinds
        for role in ROLES
    ]


def list_tunings(config: Config, seeds: Sequence[int], num_bases: int) -> Iterable[Tuning]:
    """Yield the tunings of the outdated weights, and scratch."""
    for task, kind, _, source_task in list_starts(config):
        for seed in seeds:
            yield Tuning(source_task, kind, config.old, seed)
            yield Tuning(task, kind, config.new, seed)


def list_cells(store: Store, config: Config) -> list[Cell]:
    """Return one cell per start and seed."""
    cells = []
    for seed in store.size.seeds:
        for task, kind, role, source_task in list_starts(config):
            arguments = (task, kind, role, source_task, config.old, config.new, seed)
            cells.append(Cell(f"{task}-{kind}-from-{role}-seed{seed}", measure, arguments))
    return cells


def measure(
    store: Store, work_folder: Path, task: str, kind: str, role: str, source_task: str, old: int, new: int, seed: int
) -> dict[str, Any]:
    """Tune the new base from outdated weights; copy the head of a related task with the same labels.

    Args:
        store: The store, with the bases, the tasks and the outdated weights.
        work_folder: The folder for the outcome.
        task: The name of the task to tune.
        kind: The kind of adaptation.
        role: The relation of the outdated weights' task to the tuned task, one of `ROLES`.
        source_task: The name of the outdated weights' task.
        old: The index of the outdated weights' base.
        new: The index of the base to tune.
        seed: The seed of the outdated weights and of the run.

    Returns:
        The figures of `outcome_figures`.
    """
    fresh_head = role == "unrelated" or store.load_data(source_task).labels != store.load_data(task).labels
    source = store.tuning_folder(source_task, kind, old, seed)
    return run_method(
        store, work_folder, TaskUpgrade(task, kind, old, new), source, seed, "init", fresh_head=fresh_head
    )


def collect_results(store: Store, config: Config, records: list[CellRecord]) -> dict[str, Any]:
    """Return the runs, with their steps relative to scratch's, and the difference of every start from scratch."""
    runs = {}
    for record in records:
        task, kind, role, _, _, _, seed = record.arguments
        runs[task, kind, role, seed] = record.figures
    for target in config.targets:
        for kind in target.kinds:
            for seed in store.size.seeds:
                if store.has_tuning(target.task, kind, config.new, seed):
                    scratch = store.load_tuning(target.task, kind, config.new, seed)
                    runs[target.task, kind, "scratch", seed] = outcome_figures(scratch)
    rows = []
    for (task, kind, role, seed), run in runs.items():
        scratch_run = runs[task, kind, "scratch", seed]
        reached_step = steps_to_score(run, scratch_run["curve"][-1][1])
        share = None if reached_step is None else 100 * reached_step / scratch_run["steps"]
        rows.append(
            {
                "task": task,
                "kind": kind,
                "from": role,
                "seed": seed,
                **drop_predictions(run),
                "area": round(mean_dev_score(run), DIGITS),
                "share": None if share is None else round(share, PERCENT_DIGITS),
            }
        )
    differences = _collect_differences(store, config, runs)
    return {"old": config.old, "new": config.new, "runs": rows, "differences": differences}


def _collect_differences(store: Store, config: Config, runs: dict[tuple[str, str, str, int], Row]) -> list[Row]:
    """Compare every start with scratch over its seeds."""
    rows = []
    for task, kind, role in dict.fromkeys((task, kind, role) for task, kind, role, _ in runs):
        if role == "scratch":
            continue
        seeds = [seed for seed in store.size.seeds if (task, kind, role, seed) in runs]
        difference = accuracy_difference(
            read_tuning_test_labels(store, task, kind, config.new, seeds[0]),
            [runs[task, kind, role, seed] for seed in seeds],
            [runs[task, kind, "scratch", seed] for seed in seeds],
        )
        rows.append({"task": task, "kind": kind, "from": role, **difference})
    return rows


def build_page(results: dict[str, Any]) -> Page:
    """Write one table of starts per task and kind, and draw the learning curves."""
    sections = []
    pictures = {}
    head = [
        "from",
        "dev at the start",
        "mean dev over the steps",
        "steps to scratch's last dev, % (median)",
        "never",
        "test",
        "points above scratch [95 %]",
    ]
    for task, kind in distinct_keys(results["runs"], "task", "kind"):
        runs = select(results["runs"], task=task, kind=kind)
        differences = select(results["differences"], task=task, kind=kind)
        rows = []
        curves = {}
        for role in ("scratch", *ROLES):
            role_runs = select(runs, **{"from": role})
            if role_runs:
                curves[role] = average_curves(role_runs)
                rows.append(_start_row(role, role_runs, select(differences, **{"from": role})))
        picture = f"curves-{task}-{kind}.svg"
        pictures[picture] = draw_lines(curves, f"optimiser steps on M_{results['new']}", "accuracy on dev")
        sections.append(f"## {task}, {kind}\n\n{markdown_table(head, rows)}\n\n![Learning curves]({picture})")
    findings = (*_judge_starts(results["runs"], results["differences"]), _judge_sources(results["runs"]))
    return Page("\n\n".join(sections), pictures, findings)


def _start_row(role: str, runs: list[Row], differences: list[Row]) -> list[str]:
    share = median_steps_share(runs)
    return [
        role,
        format_mean([run["start"] for run in runs]),
        format_mean([run["area"] for run in runs]),
        format_steps_share(share),
        f"{sum(run['share'] is None for run in runs)} of {len(runs)}",
        format_mean([run["test"] for run in runs]),
        format_difference(differences[0] if differences else None),
    ]


def _judge_starts(runs: list[Row], differences: list[Row]) -> list[Finding]:
    """Judge the speed and the final score of starts from the same and from a similar task."""
    findings = []
    for role, source in (("same", "the same task"), ("similar", "a similar task")):
        role_runs = select(runs, **{"from": role})
        shares = [
            median_steps_share(select(role_runs, task=task, kind=kind))
            for task, kind in distinct_keys(runs, "task", "kind")
            if select(role_runs, task=task, kind=kind)
        ]
        medians = ", ".join("never" if share == float("inf") else f"{share:.0f} %" for share in shares)
        speed_claim = (
            f"From outdated weights of {source}, tuning converges faster: scratch's last score on dev is reached in at "
            "most half of its steps."
        )
        is_fast = [share <= MAX_STEPS_SHARE for share in shares]
        findings.append(judge_claim(speed_claim, PART, is_fast, f"medians {medians} of the steps"))
        score_claim = f"From {source} the final score is better than scratch's."
        findings.append(judge_difference(score_claim, PART, select(differences, **{"from": role})))
    return findings


def _judge_sources(runs: list[Row]) -> Finding:
    """Judge whether a similar task is a better source than an unrelated one."""
    gaps = []
    for task, kind in distinct_keys(runs, "task", "kind"):
        cell_runs = select(runs, task=task, kind=kind)
        similar, unrelated = (
            [run["area"] for run in select(cell_runs, **{"from": role})] for role in ("similar", "unrelated")
        )
        if similar and unrelated:
            gaps.append(100 * (statistics.fmean(similar) - statistics.fmean(unrelated)))
    claim = "A similar task is the better source than an unrelated one (mean dev score over the steps)."
    figure = f"{statistics.fmean(gaps):+.1f} points on average" if gaps else ""
    return judge_claim(claim, PART, [gap > 0 for gap in gaps], figure)


EXPERIMENT = Experiment(
    "4-initialisation",
    "4 · Initialisation",
    "Tuning the new base from outdated weights of the same task, of a similar one (head copied where its labels are "
    "the same) and of an unrelated one (fresh head), against scratch with the same recipe: how fast, and how good?",
    Config,
    list_tunings,
    list_cells,
    collect_results,
    build_page,
)
