"""What the experiments share that train on the new base: running a method, differences, speeds, tables."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from typing import TYPE_CHECKING, Any

from figures import difference, test_labels

from findings.store import figures_of
from regraft import recycle

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from findings.store import Store

Run = dict[str, Any]


def run_method(
    store: Store, work: Path, task: str, source: Path, kind: str, bases: tuple[int, int], seed: int, method: str,
    *, shots: int | None = None, times: float = 1.0, fresh: bool = False, options: Any = None,
) -> Run:  # fmt: skip
    """Recycle an adaptation, and give the figures of the outcome.

    Args:
        store: Where everything is.
        work: A folder for the outcome.
        task: The task that it does on the new base.
        source: The adaptation of the old base.
        kind: Its kind.
        bases: The numbers of the old and the new base.
        seed: The seed.
        method: The method.
        shots: Labelled examples a class; None for all, and the recipe for all.
        times: How many times the recipe's steps are tuned for.
        fresh: Whether the head is drawn anew.
        options: The method's.

    Returns:
        As `figures_of`.
    """
    recipe = store.recipe(kind, seed, bases[1], few=shots is not None)
    if times != 1:
        steps = round(times * recipe.steps) if recipe.steps else None
        recipe = dataclasses.replace(recipe, steps=steps, epochs=times * recipe.epochs)
    done = recycle(
        store.upgrade(*bases), source, store.task(task).with_shots(shots), method, work, recipe=recipe, options=options,
        head="fresh" if fresh else "copy",
    )  # fmt: skip
    return figures_of(done)


def steps_to(run: Run, target: float) -> float | None:
    """Tell at which step dev first reached a score; None if it never did."""
    return next((step for step, score in run["curve"] if score >= target), None)


def area(run: Run) -> float:
    """Give the mean score on dev over the steps, by the trapezoid rule."""
    curve = run["curve"]
    if len(curve) < 2:
        return float(curve[0][1])
    total = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))
    return float(total / (curve[-1][0] - curve[0][0]))


def compare(labels: Sequence[int], ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, float]:
    """Give the difference in accuracy of two methods over seeds, with its 95 % interval.

    Args:
        labels: The true classes of test.
        ours: The runs of one, a seed each.
        theirs: Those of the other, likewise.

    Returns:
        `estimate`, `low`, `high`, and how many `seeds`.
    """
    both = [[run["predictions"] for run in runs] for runs in (ours, theirs)]
    return {**difference("accuracy", labels, *both), "seeds": len(both[0])}


def labels_of(store: Store, task: str, kind: str, base: int, seed: int) -> list[int]:
    """Give the true classes of a task's test."""
    return test_labels(store.outcome(task, kind, base, seed))


def without_predictions(run: Run) -> Run:
    """Leave out what is too long for the results."""
    return {name: value for name, value in run.items() if name != "predictions"}


def points(row: dict[str, float] | None) -> str:
    """Write a difference with its interval, in points."""
    if row is None:
        return "–"
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{100 * row['estimate']:+.1f} [{low:+.1f}, {high:+.1f}]"


def mean_curve(runs: Sequence[Run]) -> list[tuple[float, float, float]]:
    """Average learning curves over seeds, at the steps that all have."""
    shared = sorted(set.intersection(*({step for step, _ in run["curve"]} for run in runs)))
    found = []
    for step in shared:
        values = [dict(map(tuple, run["curve"]))[step] for run in runs]
        found.append((step, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return found
