"""Experiment 6: a map from old to new weights, learned from the other tasks, without any training on this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from tables import mean_sd, table

from findings.charts import bars
from findings.experiment import Cell, Experiment, Finding, Page, tell_difference
from findings.runs import compare, labels_of, points, run_method, without_predictions
from findings.settings import Number, Settings, Tasks
from findings.store import Tuning, figures_of
from regraft.methods.project import Projection

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from findings.store import Store

DIRECT, SCRATCH, OLD = "direct", "scratch", "old deployment"
NAMES = {
    "regression": "project, by regression",
    "distill": "project, by distillation",
    "paper": "project, as in the paper",
}


class Config(Settings):
    """What is run.

    Args:
        tasks: By kind of adaptation; the map for each is learned from all others of its kind.
        upgrades: Numbers of an old and a new base each.
        fits: How the map is learned: by regression, by distillation, or by that as in the paper, P(v) alone.
        rank: Of the map learned by distillation.
        steps: Of that learning.
    """

    tasks: Tasks = Field(description="lists of tasks by kind of adaptation")
    upgrades: tuple[tuple[Number, Number], ...] = Field(min_length=1, description="a list of pairs of bases")
    fits: tuple[Literal["regression", "distill", "paper"], ...] = Field(
        default=("regression", "distill", "paper"), description="a list of regression, distill, paper"
    )
    rank: int = Field(default=16, ge=1, description="a whole number, 1 or more")
    steps: int = Field(default=100, ge=1, description="a whole number of steps, 1 or more")


def places(config: Config) -> list[tuple[str, str, int, int]]:
    """Give each task, kind, old and new base."""
    return [(task, kind, *pair) for kind, tasks in config.tasks.items() for task in tasks for pair in config.upgrades]


def tunings(config: Config, seeds: Sequence[int], bases: int) -> Iterable[Tuning]:
    """Give every task on both bases."""
    return [Tuning(task, kind, base, seed) for task, kind, *both in places(config) for base in both for seed in seeds]


def cells(store: Store, config: Config) -> list[Cell]:
    """Give one for each method and seed."""
    found = []
    for seed in store.size.seeds:
        for task, kind, old, new in places(config):
            others = [other for other in config.tasks[kind] if other != task]
            name = f"{task}-{kind}-M{old}-M{new}"
            found.append(Cell(f"{name}-direct-seed{seed}", measure, (task, kind, old, new, DIRECT, seed, [], [], 0, 0)))
            for fit in config.fits:
                seeds = list(store.size.seeds) if fit == "regression" else [seed]
                more = (0, 0) if fit == "regression" else (config.rank, config.steps)
                given = (task, kind, old, new, fit, seed, others, seeds, *more)
                found.append(Cell(f"{name}-{fit}-seed{seed}", measure, given))
    return found


def measure(
    store: Store, work: Path, task: str, kind: str, old: int, new: int, fit: str, seed: int, others: list[str],
    seeds: list[int], rank: int, steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Put the old weights on the new base, as they are or mapped."""
    source = store.tuned(task, kind, old, seed)
    if fit == DIRECT:
        return run_method(store, work, task, source, kind, (old, new), seed, "direct")
    pairs = []
    for other in others:
        for one in seeds:
            beside = store.tuned(other, kind, new, one) if fit == "regression" else store.task_file(other)
            pairs.append(f"{store.tuned(other, kind, old, one)}={beside}")
    if fit == "regression":
        options = Projection(pairs=tuple(pairs), rank=max(1, min(16, len(pairs) - 1)))
    else:
        residual = fit == "distill"
        options = Projection(pairs=tuple(pairs), fit="distill", rank=rank, steps=steps, residual=residual)
    return run_method(store, work, task, source, kind, (old, new), seed, "project", options=options)


def collect(store: Store, config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Give each run, beside what was tuned on both bases, and the differences to direct."""
    there, rows = {}, []
    for cell in found:
        task, kind, old, new, fit, seed, *_ = cell["arguments"]
        there[task, kind, old, new, NAMES.get(fit, fit), seed] = cell["found"]
    for place in places(config):
        task, kind, old, new = place
        for seed in store.size.seeds:
            for name, base in ((SCRATCH, new), (OLD, old)):
                if store.has(task, kind, base, seed):
                    there[(*place, name, seed)] = figures_of(store.outcome(task, kind, base, seed))
    keys = ("task", "kind", "old", "new", "method", "seed")
    rows = [dict(zip(keys, place, strict=True)) | without_predictions(run) for place, run in there.items()]
    differences = []
    for place in places(config):
        for name in NAMES.values():
            seeds = [seed for seed in store.size.seeds if all((*place, one, seed) in there for one in (name, DIRECT))]
            if seeds:
                ours, theirs = ([there[(*place, one, seed)] for seed in seeds] for one in (name, DIRECT))
                gap = compare(labels_of(store, place[0], place[1], place[3], seeds[0]), ours, theirs)
                differences.append(dict(zip(keys, (*place, name), strict=False)) | gap)
    return {"runs": rows, "differences": differences}


def page(results: dict[str, Any]) -> Page:
    """Write a table for each upgrade."""
    runs, parts, pictures = results["runs"], [], {}
    for kind, old, new in dict.fromkeys((run["kind"], run["old"], run["new"]) for run in runs):
        mine = [run for run in runs if (run["kind"], run["old"], run["new"]) == (kind, old, new)]
        tasks = list(dict.fromkeys(run["task"] for run in mine))
        methods = [name for name in (OLD, DIRECT, *NAMES.values(), SCRATCH)
                   if any(run["method"] == name for run in mine)]  # fmt: skip
        rows: list[list[str]] = []
        series: dict[str, list[tuple[float, float]]] = {}
        for method in methods:
            line, series[method] = [method], []
            for task in tasks:
                values = [run["test"] for run in mine if (run["task"], run["method"]) == (task, method)]
                gaps = [d for d in results["differences"] if (d["task"], d["kind"], d["old"], d["new"], d["method"])
                        == (task, kind, old, new, method)]  # fmt: skip
                line.append(mean_sd(values) + (f"; {points(gaps[0])}" if gaps else ""))
                mean = sum(values) / len(values) if values else float("nan")
                series[method].append((mean, 0.0))
            rows.append(line)
        floor = {task: next(run["majority"] for run in mine if run["task"] == task) for task in tasks}
        rows.append(["majority guess", *(f"{floor[task]:.3f}" for task in tasks)])
        name = f"methods-{kind}-M{old}-M{new}.svg"
        pictures[name] = bars(tasks, series, "accuracy on test")
        parts.append(f"## {kind}, M_{old} → M_{new}\n\nAccuracy on test; difference to `direct` in points.\n\n"
                     + table(["", *tasks], rows) + f"\n\n![Methods]({name})")  # fmt: skip
    parts.append(
        "The head is left out of the map and copied, so the tasks need not have as many classes (in the paper's they "
        "must). By regression the map is learned from what the other tasks had tuned on both bases, all seeds; by "
        "distillation from their old models and texts. Both learn the change, v + P(v), and so begin at `direct`; the "
        "paper's is learned by distillation too, but is P(v) alone and begins at random. The default rate of learning "
        "by distillation was set by the scores on dev of pilots with three of these tasks and two of "
        "these seeds."
    )
    return Page("\n\n".join(parts), pictures, _findings(results["differences"]))


def _findings(rows: list[dict[str, Any]]) -> tuple[Finding, ...]:
    return tuple(
        tell_difference(f"A map learned from other tasks carries weights over better than `direct` does ({how}).",
                        "method `project`", [row for row in rows if row["method"] == name])
        for how, name in (("regression", NAMES["regression"]), ("distillation", NAMES["distill"]),
                          ("distillation, P(v) alone as in the paper", NAMES["paper"]))
    )  # fmt: skip


EXPERIMENT = Experiment(
    "6-projection",
    "6 · Projection without training",
    "A map from outdated to upgraded weights, learned from the other tasks and applied to the one that was left out, "
    "against `direct`.",
    Config, tunings, cells, collect, page,
)  # fmt: skip
