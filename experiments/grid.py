"""What an experiment consists of: tasks × upgrades × kinds × seeds, and the methods that are run on each."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.methods import methods, parse_options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from regraft import Recipe, Task

OLD_SEED = 1
"""Added to a run's seed for the tuning on the old base, whose very head scratch would begin with otherwise."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method with its options.

    Args:
        name: What it is called in the tables.
        method: The method's name.
        options: As on the command line, `name=value`.
        average: The recipe's: the fraction of the steps after which weights are averaged, 0 for not at all.
    """

    name: str
    method: str
    options: tuple[str, ...] = ()
    average: float = 0.0


@dataclasses.dataclass(frozen=True)
class Regime:
    """How many labels and steps there are on the new base.

    Args:
        name: What it is called in the tables.
        shots: Labelled examples a class; None for all.
        recipes: How to train, by kind of adaptation; the seed is each run's.
        entries: Names of the methods to run; None for all there are.
    """

    name: str
    shots: int | None
    recipes: dict[str, Recipe]
    entries: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Grid:
    """The whole experiment.

    Args:
        out: The folder for everything it makes.
        old: The base that tasks are tuned on first.
        upgrades: The new bases by name, all made from the old one.
        tasks: By name.
        tuning: How the old base is tuned, by kind of adaptation; its keys are the kinds.
        regimes: The first is the reference of all recoveries.
        seeds: A run of everything with each.
        extras: Methods with options, beside those with their defaults.
        without: Names of methods that are left out.
    """

    out: Path
    old: Path
    upgrades: dict[str, Path]
    tasks: dict[str, Task]
    tuning: dict[str, Recipe]
    regimes: tuple[Regime, ...]
    seeds: tuple[int, ...]
    extras: tuple[Entry, ...] = ()
    without: tuple[str, ...] = ()

    def entries(self, regime: Regime) -> list[Entry]:
        """Give the methods of a regime that are there, as they are registered, then those with options."""
        known = [Entry(name, name) for name in methods()]
        known += [extra for extra in self.extras if extra.method in methods()]
        wanted = regime.entries
        return [e for e in known if e.name not in self.without and (wanted is None or e.name in wanted)]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method on one task, upgrade, kind and seed."""

    task: str
    upgrade: str
    kind: str
    regime: str
    entry: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.kind} {self.upgrade}, {self.regime}, {self.entry}, seed {self.seed}"


def old_folder(grid: Grid, task: str, kind: str, seed: int) -> Path:
    """Give the place of an old adaptation."""
    return grid.out / "old" / f"{task}-{kind}-seed{seed}"


def cell_folder(grid: Grid, cell: Cell) -> Path:
    """Give the place of an outcome."""
    name = "".join(letter if letter.isalnum() else "-" for letter in cell.entry)
    return grid.out / "cells" / f"{cell.task}-{cell.upgrade}-{cell.kind}-{cell.regime}" / f"{name}-seed{cell.seed}"


def cells(grid: Grid) -> Iterator[Cell]:
    """Go through the experiment; scratch comes first in each cell, and whole seeds one after the other."""
    for seed in grid.seeds:
        for regime in grid.regimes:
            for task in grid.tasks:
                for kind in grid.tuning:
                    for upgrade in grid.upgrades:
                        for entry in grid.entries(regime):
                            yield Cell(task, upgrade, kind, regime.name, entry.name, seed)


def recipe_of(grid: Grid, cell: Cell) -> Recipe:
    """Give the recipe of a cell."""
    regime, entry = _regime_and_entry(grid, cell)
    return dataclasses.replace(regime.recipes[cell.kind], seed=cell.seed, average=entry.average)


def _regime_and_entry(grid: Grid, cell: Cell) -> tuple[Regime, Entry]:
    regime = next(regime for regime in grid.regimes if regime.name == cell.regime)
    return regime, next(entry for entry in grid.entries(regime) if entry.name == cell.entry)


def task_of(grid: Grid, cell: Cell) -> Task:
    """Give the task of a cell, with the labels that its regime has."""
    regime = next(regime for regime in grid.regimes if regime.name == cell.regime)
    return grid.tasks[cell.task].with_shots(regime.shots)


def method_of(grid: Grid, cell: Cell) -> tuple[str, Any]:
    """Give the name and the options of a cell's method."""
    _, entry = _regime_and_entry(grid, cell)
    options = parse_options(entry.method, entry.options)
    if needs_tasks(cell, grid):
        options = dataclasses.replace(options, pairs=other_tasks(grid, cell))
    return entry.method, options


def needs_tasks(cell: Cell, grid: Grid) -> bool:
    """Tell whether a cell's method learns from other tasks that were tuned on both bases."""
    method = next((extra.method for extra in grid.extras if extra.name == cell.entry), cell.entry)
    return "tasks" in methods()[method].needs()


def other_tasks(grid: Grid, cell: Cell) -> tuple[str, ...]:
    """Give `OLD=NEW` for each other task and seed: what was tuned on the old base, and scratch on the new one."""
    pairs = []
    for task in grid.tasks:
        for seed in grid.seeds if task != cell.task else ():
            new = dataclasses.replace(cell, task=task, seed=seed, entry="scratch", regime=grid.regimes[0].name)
            pairs.append(f"{old_folder(grid, task, cell.kind, seed)}={cell_folder(grid, new)}")
    return tuple(pairs)
