"""Run methods on the new base, and compare their scores and learning curves."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from figures import bootstrap_difference, read_test_labels
from tables import mean_and_deviation

from findings.store import Tuning, outcome_figures
from regraft import recycle

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tables import Row

    from findings.store import Store


class TaskUpgrade(NamedTuple):
    """A task with a kind of adaptation that is carried from one base to another.

    Args:
        task: The name of the task.
        kind: The kind of adaptation.
        old: The index of the old base.
        new: The index of the new base.
    """

    task: str
    kind: str
    old: int
    new: int


def list_upgrade_tunings(upgrades: Iterable[TaskUpgrade], seeds: Sequence[int]) -> list[Tuning]:
    """Return the tunings on the old and the new base of each upgrade, one per seed."""
    return [
        Tuning(upgrade.task, upgrade.kind, base, seed)
        for upgrade in upgrades
        for base in (upgrade.old, upgrade.new)
        for seed in seeds
    ]


def run_method(
    store: Store,
    work_folder: Path,
    upgrade: TaskUpgrade,
    source: Path,
    seed: int,
    method: str,
    *,
    shots: int | None = None,
    steps_factor: float = 1.0,
    fresh_head: bool = False,
    options: Any = None,
) -> Row:
    """Recycle an adaptation and return the figures of its outcome.

    Args:
        store: The store, with both bases, the task and the source.
        work_folder: The folder for the outcome.
        upgrade: The task on the new base, the kind and the bases.
        source: The outcome folder of the adaptation of the old base, possibly to a different task.
        seed: The seed of the run.
        method: The name of the method.
        shots: Labelled examples per class, with the recipe for few labels; None for all labels and their recipe.
        steps_factor: Factor on the recipe's steps and epochs.
        fresh_head: Whether to initialise a new head instead of copying the old one.
        options: The options of the method; None for the defaults.

    Returns:
        The figures of `outcome_figures`.
    """
    recipe = store.recipe(upgrade.kind, seed, upgrade.new, few_labels=shots is not None)
    if steps_factor != 1:
        steps = round(steps_factor * recipe.steps) if recipe.steps else None
        recipe = dataclasses.replace(recipe, steps=steps, epochs=steps_factor * recipe.epochs)
    outcome = recycle(
        store.load_upgrade(upgrade.old, upgrade.new),
        source,
        store.load_task(upgrade.task).with_shots(shots),
        method,
        work_folder,
        recipe=recipe,
        options=options,
        head="fresh" if fresh_head else "copy",
    )
    return outcome_figures(outcome)


def steps_to_score(run: Row, score: float) -> float | None:
    """Return the step at which dev first reached a score; None if dev never reached it."""
    return next((step for step, dev_score in run["curve"] if dev_score >= score), None)


def mean_dev_score(run: Row) -> float:
    """Return the mean dev score over the steps, by the trapezoid rule."""
    curve = run["curve"]
    if len(curve) < 2:
        return float(curve[0][1])
    total = sum(
        (next_step - step) * (score + next_score) / 2
        for (step, score), (next_step, next_score) in itertools.pairwise(curve)
    )
    return float(total / (curve[-1][0] - curve[0][0]))


def accuracy_difference(labels: Sequence[int], runs: Sequence[Row], reference_runs: Sequence[Row]) -> Row:
    """Compute the difference in accuracy of two methods over seeds, with its 95 % interval.

    Args:
        labels: The true class of each test example.
        runs: The runs of the method, one per seed.
        reference_runs: The runs of the reference method, one per seed.

    Returns:
        `estimate`, `low` and `high`, positive if the method is better than the reference; and the number of `seeds`.
    """
    predictions = [run["predictions"] for run in runs]
    reference_predictions = [run["predictions"] for run in reference_runs]
    difference = bootstrap_difference("accuracy", labels, predictions, reference_predictions)
    return {**difference, "seeds": len(predictions)}


def read_tuning_test_labels(store: Store, task: str, kind: str, base: int, seed: int) -> list[int]:
    """Read the true class of each test example of a task from the outcome of a tuning.

    Args:
        store: The store, with the tuning.
        task: The name of the task.
        kind: The kind of adaptation of the tuning.
        base: The index of its base.
        seed: Its seed.

    Returns:
        The indices of the classes, in the order of the predictions.
    """
    return read_test_labels(store.load_tuning(task, kind, base, seed))


def drop_predictions(run: Row) -> Row:
    """Return a run without its predictions, which are too long to publish."""
    return {name: value for name, value in run.items() if name != "predictions"}


def average_curves(runs: Sequence[Row]) -> list[tuple[float, float, float]]:
    """Average learning curves over seeds, at the steps that all curves have.

    Args:
        runs: The runs, one per seed.

    Returns:
        Step, mean dev score and standard deviation of each point.
    """
    curves = [{step: score for step, score in run["curve"]} for run in runs]
    shared_steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(step, *mean_and_deviation([curve[step] for curve in curves])) for step in shared_steps]
