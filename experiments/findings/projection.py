"""Experiment 6: a map from old to new weights, learned from other tasks, without training on the task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from tables import distinct_keys, distinct_values, format_difference, format_mean, markdown_table, select

from findings.charts import draw_bars
from findings.experiment import Cell, CellRecord, Experiment, Finding, Page, judge_difference
from findings.runs import (
    TaskUpgrade,
    accuracy_difference,
    drop_predictions,
    list_upgrade_tunings,
    read_tuning_test_labels,
    run_method,
)
from findings.settings import BasePair, StrictModel, TasksByKind
from findings.store import outcome_figures
from regraft.methods.project import Projection

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tables import Row

    from findings.store import Store, Tuning

    RunKey = tuple[str, str, int, int, str, int]
    """Task, kind, old base, new base, method and seed."""

DIRECT, SCRATCH, OLD_DEPLOYMENT = "direct", "scratch", "old deployment"
METHOD_BY_FIT = {
    "regression": "project, by regression",
    "distill": "project, by distillation",
    "paper": "project, as in the paper",
}
"""The names in the tables, by the way to learn the map."""
MAX_REGRESSION_RANK = 16
"""The rank of the regression if there are enough pairs of tunings to learn from; arbitrary, equal to the default rank
of distillation."""


class Config(StrictModel):
    """The tasks, upgrades and maps to run.

    Args:
        tasks: Tasks by kind of adaptation; the map for a task is learned from all other tasks of its kind.
        upgrades: Pairs of an old and a new base.
        fits: The ways to learn the map P of a delta v: `regression` and `distill` learn v + P(v), `paper` distils P(v)
            alone.
        rank: The rank of a map that is learned by distillation.
        steps: The optimiser steps of distillation.
    """

    tasks: TasksByKind = Field(description="lists of tasks by kind of adaptation")
    upgrades: tuple[BasePair, ...] = Field(min_length=1, description="a list of pairs of bases")
    fits: tuple[Literal["regression", "distill", "paper"], ...] = Field(
        default=("regression", "distill", "paper"), description="a list of regression, distill, paper"
    )
    rank: int = Field(default=16, ge=1, description="a whole number, 1 or more")
    steps: int = Field(default=100, ge=1, description="a whole number of steps, 1 or more")


def list_upgrades(config: Config) -> list[TaskUpgrade]:
    """Return one upgrade per task, kind and pair of bases."""
    return [
        TaskUpgrade(task, kind, old, new)
        for kind, tasks in config.tasks.items()
        for task in tasks
        for old, new in config.upgrades
    ]


def list_tunings(config: Config, seeds: Sequence[int], num_bases: int) -> Iterable[Tuning]:
    """Return the tunings of every task on the bases of every upgrade."""
    return list_upgrade_tunings(list_upgrades(config), seeds)


def list_cells(store: Store, config: Config) -> list[Cell]:
    """Return one cell per upgrade, method and seed."""
    cells = []
    for seed in store.size.seeds:
        for upgrade in list_upgrades(config):
            prefix = f"{upgrade.task}-{upgrade.kind}-M{upgrade.old}-M{upgrade.new}"
            cells.append(Cell(f"{prefix}-direct-seed{seed}", measure, (*upgrade, DIRECT, seed, [], [], 0, 0)))
            source_tasks = [task for task in config.tasks[upgrade.kind] if task != upgrade.task]
            for fit in config.fits:
                if fit == "regression":  # It learns from the weights of all seeds; rank and steps are for distillation.
                    source = (source_tasks, list(store.size.seeds), 0, 0)
                else:
                    source = (source_tasks, [seed], config.rank, config.steps)
                cells.append(Cell(f"{prefix}-{fit}-seed{seed}", measure, (*upgrade, fit, seed, *source)))
    return cells


def measure(
    store: Store,
    work_folder: Path,
    task: str,
    kind: str,
    old: int,
    new: int,
    fit: str,
    seed: int,
    source_tasks: list[str],
    source_seeds: list[int],
    rank: int,
    steps: int,
) -> dict[str, Any]:
    """Evaluate old weights on the new base, unchanged or projected by a map learned from other tasks.

    Args:
        store: The store, with the bases, the task, the old weights and the other tasks' tunings.
        work_folder: The folder for the outcome.
        task: The name of the task.
        kind: The kind of adaptation.
        old: The index of the old base.
        new: The index of the new base.
        fit: The way to learn the map, as in `Config.fits`, or `direct` for unchanged weights.
        seed: The seed of the old weights and of the run.
        source_tasks: The names of the tasks to learn from; empty for `direct`.
        source_seeds: The seeds of the tunings to learn from; empty for `direct`.
        rank: The rank of a map that is learned by distillation.
        steps: The optimiser steps of distillation.

    Returns:
        The figures of `outcome_figures`.
    """
    upgrade = TaskUpgrade(task, kind, old, new)
    adaptation = store.tuning_folder(task, kind, old, seed)
    if fit == DIRECT:
        return run_method(store, work_folder, upgrade, adaptation, seed, DIRECT)
    pairs = []
    for source_task in source_tasks:
        for source_seed in source_seeds:
            old_folder = store.tuning_folder(source_task, kind, old, source_seed)
            if fit == "regression":
                pairs.append(f"{old_folder}={store.tuning_folder(source_task, kind, new, source_seed)}")
            else:
                pairs.append(f"{old_folder}={store.task_file(source_task)}")
    if fit == "regression":
        options = Projection(pairs=tuple(pairs), rank=max(1, min(MAX_REGRESSION_RANK, len(pairs) - 1)))
    else:
        options = Projection(pairs=tuple(pairs), fit="distill", rank=rank, steps=steps, residual=fit == "distill")
    return run_method(store, work_folder, upgrade, adaptation, seed, "project", options=options)


def collect_results(store: Store, config: Config, records: list[CellRecord]) -> dict[str, Any]:
    """Return each run, with the tunings on both bases as runs, and the differences from `direct`."""
    runs: dict[RunKey, Row] = {}
    for record in records:
        task, kind, old, new, fit, seed, *_ = record.arguments
        runs[task, kind, old, new, METHOD_BY_FIT.get(fit, fit), seed] = record.figures
    for upgrade in list_upgrades(config):
        for seed in store.size.seeds:
            for name, base in ((SCRATCH, upgrade.new), (OLD_DEPLOYMENT, upgrade.old)):
                if store.has_tuning(upgrade.task, upgrade.kind, base, seed):
                    outcome = store.load_tuning(upgrade.task, upgrade.kind, base, seed)
                    runs[(*upgrade, name, seed)] = outcome_figures(outcome)
    rows = [
        {"task": task, "kind": kind, "old": old, "new": new, "method": method, "seed": seed, **drop_predictions(run)}
        for (task, kind, old, new, method, seed), run in runs.items()
    ]
    return {"runs": rows, "differences": _collect_differences(store, config, runs)}


def _collect_differences(store: Store, config: Config, runs: dict[RunKey, Row]) -> list[Row]:
    """Compare each map with `direct` over the seeds that both have."""
    rows = []
    for upgrade in list_upgrades(config):
        for method in METHOD_BY_FIT.values():
            seeds = [
                seed
                for seed in store.size.seeds
                if (*upgrade, method, seed) in runs and (*upgrade, DIRECT, seed) in runs
            ]
            if seeds:
                difference = accuracy_difference(
                    read_tuning_test_labels(store, upgrade.task, upgrade.kind, upgrade.new, seeds[0]),
                    [runs[(*upgrade, method, seed)] for seed in seeds],
                    [runs[(*upgrade, DIRECT, seed)] for seed in seeds],
                )
                rows.append({**upgrade._asdict(), "method": method, **difference})
    return rows


def build_page(results: dict[str, Any]) -> Page:
    """Write one table per kind and upgrade, and draw the scores of the methods."""
    sections = []
    pictures = {}
    for kind, old, new in distinct_keys(results["runs"], "kind", "old", "new"):
        runs = select(results["runs"], kind=kind, old=old, new=new)
        differences = select(results["differences"], kind=kind, old=old, new=new)
        tasks = distinct_values(runs, "task")
        methods = [
            method
            for method in (OLD_DEPLOYMENT, DIRECT, *METHOD_BY_FIT.values(), SCRATCH)
            if select(runs, method=method)
        ]
        rows = [_method_row(method, tasks, runs, differences) for method in methods]
        rows.append(["majority guess", *(f"{select(runs, task=task)[0]['majority']:.3f}" for task in tasks)])
        means = {
            method: [(_mean_score(select(runs, task=task, method=method)), 0.0) for task in tasks] for method in methods
        }
        picture = f"methods-{kind}-M{old}-M{new}.svg"
        pictures[picture] = draw_bars(tasks, means, "accuracy on test")
        sections.append(
            f"## {kind}, M_{old} → M_{new}\n\nAccuracy on test; difference to `direct` in points.\n\n"
            f"{markdown_table(['', *tasks], rows)}\n\n![Methods]({picture})"
        )
    sections.append(
        "The head is left out of the map and copied, so the tasks need not have as many classes (in the paper's they "
        "must). By regression the map is learned from what the other tasks had tuned on both bases, all seeds; by "
        "distillation from their old models and texts. Both learn the change, v + P(v), and so begin at `direct`; the "
        "paper's is learned by distillation too, but is P(v) alone and begins at random. The default rate of learning "
        "by distillation was set by the scores on dev of pilots with three of these tasks and two of "
        "these seeds."
    )
    return Page("\n\n".join(sections), pictures, _judge_claims(results["differences"]))


def _method_row(method: str, tasks: list[str], runs: list[Row], differences: list[Row]) -> list[str]:
    row = [method]
    for task in tasks:
        cell = format_mean([run["test"] for run in select(runs, task=task, method=method)])
        task_differences = select(differences, task=task, method=method)
        if task_differences:
            cell += f"; {format_difference(task_differences[0])}"
        row.append(cell)
    return row


def _mean_score(runs: list[Row]) -> float:
    return sum(run["test"] for run in runs) / len(runs) if runs else float("nan")


def _judge_claims(differences: list[Row]) -> tuple[Finding, ...]:
    """Judge each way to learn the map by its differences from `direct`."""
    descriptions = {
        "regression": "regression",
        "distill": "distillation",
        "paper": "distillation, P(v) alone as in the paper",
    }
    return tuple(
        judge_difference(
            f"A map learned from other tasks carries weights over better than `direct` does ({description}).",
            "method `project`",
            select(differences, method=METHOD_BY_FIT[fit]),
        )
        for fit, description in descriptions.items()
    )


EXPERIMENT = Experiment(
    "6-projection",
    "6 · Projection without training",
    "A map from outdated to upgraded weights, learned from the other tasks and applied to the one that was left out, "
    "against `direct`.",
    Config,
    list_tunings,
    list_cells,
    collect_results,
    build_page,
)
