"""Experiment 4: tuning that begins at outdated weights of the same, a similar or an unrelated task."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import mean_sd, table

from findings.charts import lines
from findings.experiment import Cell, Experiment, Finding, Page, tell, tell_difference
from findings.runs import (
    area,
    compare,
    labels_of,
    mean_curve,
    points,
    run_method,
    steps_to,
    without_predictions,
)
from findings.settings import Number, Settings
from findings.store import Tuning, figures_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from findings.store import Store

ROLES = ("same", "similar", "unrelated")
QUICKLY = 50.0
"""Percent of scratch's steps in which its last score is to be reached."""


class Target(Settings):
    """A task on the new base, and where tuning may begin.

    Args:
        task: The task.
        similar: Another task of its sort.
        unrelated: One that has nothing to do with it.
        kinds: Kinds of adaptation.
    """

    task: str = Field(description="the name of a task")
    similar: str = Field(description="the name of a similar task")
    unrelated: str = Field(description="the name of an unrelated task")
    kinds: tuple[str, ...] = Field(min_length=1, description="a list of kinds")


class Config(Settings):
    """What is run.

    Args:
        old: The number of the base that the sources were tuned on.
        new: The number of the one that is tuned.
        targets: The tasks.
    """

    old: Number = Field(description="the number of a base")
    new: Number = Field(description="the number of a base")
    targets: tuple[Target, ...] = Field(min_length=1, description="a list with task, similar, unrelated, kinds")


def places(config: Config) -> list[tuple[str, str, str, str]]:
    """Give each task and kind with each source and the part it plays."""
    return [
        (target.task, kind, role, target.task if role == "same" else getattr(target, role))
        for target in config.targets for kind in target.kinds for role in ROLES
    ]  # fmt: skip


def tunings(config: Config, seeds: Sequence[int], bases: int) -> Iterable[Tuning]:
    """Give the sources, and scratch."""
    for task, kind, _, source in places(config):
        for seed in seeds:
            yield Tuning(source, kind, config.old, seed)
            yield Tuning(task, kind, config.new, seed)


def cells(store: Store, config: Config) -> list[Cell]:
    """Give one for each source and seed."""
    return [
        Cell(f"{task}-{kind}-from-{role}-seed{seed}", measure, (task, kind, role, source, config.old, config.new, seed))
        for seed in store.size.seeds for task, kind, role, source in places(config)
    ]  # fmt: skip


def measure(
    store: Store, work: Path, task: str, kind: str, role: str, source: str, old: int, new: int, seed: int
) -> dict[str, Any]:
    """Tune the new base from outdated weights; the head is copied where the labels are the same."""
    fresh = role == "unrelated" or store.data(source).labels != store.data(task).labels
    tuned = store.tuned(source, kind, old, seed)
    return run_method(store, work, task, tuned, kind, (old, new), seed, "init", fresh=fresh)


def collect(store: Store, config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Hold every start against scratch."""
    cells_, rows = {}, []
    for cell in found:
        task, kind, role, _, _, _, seed = cell["arguments"]
        cells_[task, kind, role, seed] = cell["found"]
    for target in config.targets:
        for kind in target.kinds:
            for seed in store.size.seeds:
                if store.has(target.task, kind, config.new, seed):
                    outcome = store.outcome(target.task, kind, config.new, seed)
                    cells_[target.task, kind, "scratch", seed] = figures_of(outcome)
    for (task, kind, role, seed), run in cells_.items():
        scratch = cells_[task, kind, "scratch", seed]
        reached = steps_to(run, scratch["curve"][-1][1])
        rows.append({
            "task": task, "kind": kind, "from": role, "seed": seed, **without_predictions(run),
            "area": round(area(run), 5),
            "share": None if reached is None else round(100 * reached / scratch["steps"], 2),
        })  # fmt: skip
    return {"old": config.old, "new": config.new, "runs": rows, "differences": _differences(store, config, cells_)}


def _differences(store: Store, config: Config, found: dict[tuple[str, str, str, int], Any]) -> list[dict[str, Any]]:
    rows = []
    for task, kind, role in dict.fromkeys(place[:3] for place in found):
        seeds = [seed for seed in store.size.seeds if (task, kind, role, seed) in found]
        if role != "scratch":
            ours, theirs = ([found[task, kind, one, seed] for seed in seeds] for one in (role, "scratch"))
            labels = labels_of(store, task, kind, config.new, seeds[0])
            rows.append({"task": task, "kind": kind, "from": role, **compare(labels, ours, theirs)})
    return rows


def page(results: dict[str, Any]) -> Page:
    """Write a table of all starts, and draw the learning curves."""
    runs, parts, pictures = results["runs"], [], {}
    head = ["from", "dev at the start", "mean dev over the steps", "steps to scratch's last dev, % (median)", "never",
            "test", "points above scratch [95 %]"]  # fmt: skip
    for task, kind in dict.fromkeys((run["task"], run["kind"]) for run in runs):
        mine = [run for run in runs if (run["task"], run["kind"]) == (task, kind)]
        rows, curves = [], {}
        for role in ("scratch", *ROLES):
            of = [run for run in mine if run["from"] == role]
            if not of:
                continue
            gaps = [d for d in results["differences"] if (d["task"], d["kind"], d["from"]) == (task, kind, role)]
            curves[role] = mean_curve(of)
            middle = _median([run["share"] for run in of])
            rows.append([
                role, *(mean_sd([run[name] for run in of]) for name in ("start", "area")),
                "never" if middle == float("inf") else f"{middle:.0f}",
                f"{sum(run['share'] is None for run in of)} of {len(of)}",
                mean_sd([run["test"] for run in of]), points(gaps[0] if gaps else None),
            ])  # fmt: skip
        name = f"curves-{task}-{kind}.svg"
        pictures[name] = lines(curves, f"optimiser steps on M_{results['new']}", "accuracy on dev")
        parts.append(f"## {task}, {kind}\n\n" + table(head, rows) + f"\n\n![Learning curves]({name})")
    return Page("\n\n".join(parts), pictures, _findings(results))


def _median(shares: Sequence[float | None]) -> float:
    return statistics.median([float("inf") if share is None else share for share in shares])


def _findings(results: dict[str, Any]) -> tuple[Finding, ...]:
    part, found = "method `init`", []
    runs, differences = results["runs"], results["differences"]
    places_ = list(dict.fromkeys((run["task"], run["kind"]) for run in runs))

    def of(role: str, place: tuple[str, str]) -> list[dict[str, Any]]:
        return [run for run in runs if (run["task"], run["kind"]) == place and run["from"] == role]

    for role in ("same", "similar"):
        shares = [_median([run["share"] for run in of(role, place)]) for place in places_ if of(role, place)]
        told = ", ".join("never" if share == float("inf") else f"{share:.0f} %" for share in shares)
        what = "the same task" if role == "same" else "a similar task"
        found.append(tell(f"From outdated weights of {what}, tuning converges faster: scratch's last score on dev is "
                          "reached in at most half of its steps.", part, [share <= QUICKLY for share in shares],
                          f"medians {told} of the steps"))  # fmt: skip
        rows = [row for row in differences if row["from"] == role]
        found.append(tell_difference(f"From {what} the final score is better than scratch's.", part, rows))
    gaps = []
    for place in places_:
        both = [[run["area"] for run in of(role, place)] for role in ("similar", "unrelated")]
        gaps += [100 * (statistics.fmean(both[0]) - statistics.fmean(both[1]))] if all(both) else []
    claim = "A similar task is the better source than an unrelated one (mean dev score over the steps)."
    figure = f"{statistics.fmean(gaps):+.1f} points on average" if gaps else ""
    found.append(tell(claim, part, [gap > 0 for gap in gaps], figure))
    return tuple(found)


EXPERIMENT = Experiment(
    "4-initialisation",
    "4 · Initialisation",
    "Tuning the new base from outdated weights of the same task, of a similar one (head copied where its labels are "
    "the same) and of an unrelated one (fresh head), against scratch with the same recipe: how fast, and how good?",
    Config, tunings, cells, collect, page,
)  # fmt: skip
