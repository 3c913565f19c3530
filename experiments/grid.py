"""The cells of the experiment over all methods: tasks × upgrades × kinds × seeds × methods."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.methods import methods, parse_options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from regraft import Recipe, Task

OLD_SEED_OFFSET = 1
"""Added to a run's seed for the tuning on the old base, so that scratch does not begin with the same fresh head."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method with its options and its averaging of weights.

    Args:
        name: The entry's name in the tables.
        method: The name of the method.
        options: `name=value`, as on the command line.
        average: The recipe's `average`: the fraction of the steps after which weights are averaged, 0 for never.
    """

    name: str
    method: str
    options: tuple[str, ...] = ()
    average: float = 0.0


@dataclasses.dataclass(frozen=True)
class Regime:
    """The numbers of labels and steps on the new base.

    Args:
        name: The regime's name in the tables.
        shots: Labelled examples per class; None for all.
        recipes: Recipes by kind of adaptation; the seed of each run replaces the recipe's.
        entry_names: Names of the entries to run; None for all.
    """

    name: str
    shots: int | None
    recipes: dict[str, Recipe]
    entry_names: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Grid:
    """The experiment over all methods.

    Args:
        out: The folder for all bases, tasks and outcomes of the experiment.
        old_base: The base that tasks are tuned on first.
        upgrades: The new bases by name of the upgrade, all pre-trained from the old base.
        tasks: Tasks by name.
        old_recipes: Recipes of the tuning on the old base, by kind of adaptation; the keys are the kinds of the grid.
        regimes: The regimes; scratch in the first is the reference of all recoveries.
        seeds: The seeds with which every run is repeated.
        extra_entries: Methods with options or averaging, in addition to all methods with their defaults.
    """

    out: Path
    old_base: Path
    upgrades: dict[str, Path]
    tasks: dict[str, Task]
    old_recipes: dict[str, Recipe]
    regimes: tuple[Regime, ...]
    seeds: tuple[int, ...]
    extra_entries: tuple[Entry, ...] = ()

    def regime(self, name: str) -> Regime:
        """Return the regime of this name."""
        return next(regime for regime in self.regimes if regime.name == name)

    def entries(self, regime: Regime) -> list[Entry]:
        """Return the entries of a regime: the listed methods in their order, then `extra_entries`."""
        entries = [Entry(name, name) for name in methods()]
        entries += [entry for entry in self.extra_entries if entry.method in methods()]
        return [entry for entry in entries if regime.entry_names is None or entry.name in regime.entry_names]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a method on a task, upgrade, kind, regime and seed.

    Args:
        task: The name of the task.
        upgrade: The name of the upgrade.
        kind: The kind of adaptation.
        regime: The name of the regime.
        entry: The name of the entry.
        seed: The seed of the run.
    """

    task: str
    upgrade: str
    kind: str
    regime: str
    entry: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.kind} {self.upgrade}, {self.regime}, {self.entry}, seed {self.seed}"


def old_folder(grid: Grid, task: str, kind: str, seed: int) -> Path:
    """Return the outcome folder of an adaptation of the old base."""
    return grid.out / "old" / f"{task}-{kind}-seed{seed}"


def cell_folder(grid: Grid, cell: Cell) -> Path:
    """Return the outcome folder of a cell."""
    entry = "".join(character if character.isalnum() else "-" for character in cell.entry)
    return grid.out / "cells" / f"{cell.task}-{cell.upgrade}-{cell.kind}-{cell.regime}" / f"{entry}-seed{cell.seed}"


def iterate_cells(grid: Grid) -> Iterator[Cell]:
    """Yield all cells, one seed after the other; scratch comes first among the methods."""
    for seed in grid.seeds:
        for regime in grid.regimes:
            for task in grid.tasks:
                for kind in grid.old_recipes:
                    for upgrade in grid.upgrades:
                        for entry in grid.entries(regime):
                            yield Cell(task, upgrade, kind, regime.name, entry.name, seed)


def cell_entry(grid: Grid, cell: Cell) -> Entry:
    """Return the entry of a cell: its method with options and averaging."""
    return next(entry for entry in grid.entries(grid.regime(cell.regime)) if entry.name == cell.entry)


def cell_recipe(grid: Grid, cell: Cell) -> Recipe:
    """Return the recipe of a cell."""
    recipe = grid.regime(cell.regime).recipes[cell.kind]
    return dataclasses.replace(recipe, seed=cell.seed, average=cell_entry(grid, cell).average)


def cell_task(grid: Grid, cell: Cell) -> Task:
    """Return the task of a cell, with as many labels as its regime has."""
    return grid.tasks[cell.task].with_shots(grid.regime(cell.regime).shots)


def cell_options(grid: Grid, cell: Cell) -> Any:
    """Return the parsed options of a cell's method."""
    entry = cell_entry(grid, cell)
    options = parse_options(entry.method, entry.options)
    if needs_other_tasks(grid, cell):
        options = dataclasses.replace(options, pairs=other_task_pairs(grid, cell))
    return options


def needs_other_tasks(grid: Grid, cell: Cell) -> bool:
    """Return whether a cell's method learns from other tasks."""
    return "tasks" in methods()[cell_entry(grid, cell).method].needs()


def other_task_pairs(grid: Grid, cell: Cell) -> tuple[str, ...]:
    """Return the tunings that a cell's method may learn from: every other task on both bases.

    Args:
        grid: The experiment.
        cell: A cell of the experiment.

    Returns:
        `OLD=NEW` for each of the other tasks and each seed: the folder of the old adaptation, and the folder of scratch
        on the new base.
    """
    pairs = []
    for task in grid.tasks:
        if task == cell.task:
            continue
        for seed in grid.seeds:
            scratch = dataclasses.replace(cell, task=task, seed=seed, entry="scratch", regime=grid.regimes[0].name)
            pairs.append(f"{old_folder(grid, task, cell.kind, seed)}={cell_folder(grid, scratch)}")
    return tuple(pairs)
