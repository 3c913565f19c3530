"""Experiment 5: the old tuned model as teacher, with few labels."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import mean_sd, select, table

from findings.charts import lines
from findings.experiment import OURS, Cell, Experiment, Finding, Page, tell_difference
from findings.runs import compare, labels_of, points, run_method, without_predictions
from findings.settings import Number, Settings
from findings.store import Tuning, figures_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from findings.store import Store

TEACHER, WHOLE = "teacher", "scratch, all labels"


class Upgraded(Settings):
    """A task and the bases it is carried between.

    Args:
        task: The task.
        old: The number of the teacher's base.
        new: The number of the student's.
        kinds: Kinds of adaptation.
    """

    task: str = Field(description="the name of a task")
    old: Number = Field(description="the number of a base")
    new: Number = Field(description="the number of a base")
    kinds: tuple[str, ...] = Field(min_length=1, description="a list of kinds")


class Config(Settings):
    """What is run.

    Args:
        upgrades: The tasks and their bases.
        shots: Labelled examples a class.
        methods: By name; scratch is what the others are held against.
    """

    upgrades: tuple[Upgraded, ...] = Field(min_length=1, description="a list with task, old, new, kinds")
    shots: tuple[Number, ...] = Field(min_length=1, description="a list of whole numbers, 1 or more")
    methods: tuple[str, ...] = Field(
        default=("scratch", "distill", "init", "init+distill", "interpolation"), description="a list of methods"
    )


def places(config: Config) -> list[tuple[str, str, int, int]]:
    """Give each task, kind, old and new base."""
    return [(one.task, kind, one.old, one.new) for one in config.upgrades for kind in one.kinds]


def tunings(config: Config, seeds: Sequence[int], bases: int) -> Iterable[Tuning]:
    """Give the teachers, and scratch with all labels."""
    return [Tuning(task, kind, base, seed) for task, kind, *both in places(config) for base in both for seed in seeds]


def cells(store: Store, config: Config) -> list[Cell]:
    """Give one for each method, number of labels and seed."""
    return [
        Cell(f"{task}-{kind}-{shots}-{method.replace('+', '-')}-seed{seed}", measure,
             (task, kind, old, new, shots, method, seed))
        for seed in store.size.seeds for task, kind, old, new in places(config)
        for shots in config.shots for method in config.methods
    ]  # fmt: skip


def measure(
    store: Store, work: Path, task: str, kind: str, old: int, new: int, shots: int, method: str, seed: int
) -> dict[str, Any]:
    """Recycle with a few labels."""
    teacher = store.tuned(task, kind, old, seed)
    return run_method(store, work, task, teacher, kind, (old, new), seed, method, shots=shots)


def collect(store: Store, config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Give each run, and the differences between methods with as few labels."""
    there, rows = {}, []
    for cell in found:
        task, kind, _, _, shots, method, seed = cell["arguments"]
        there[task, kind, shots, method, seed] = cell["found"]
        where = {"task": task, "kind": kind, "shots": shots, "method": method, "seed": seed}
        rows.append(where | without_predictions(cell["found"]))
    for task, kind, old, new in places(config):
        for name, base in ((TEACHER, old), (WHOLE, new)):
            for seed in (seed for seed in store.size.seeds if store.has(task, kind, base, seed)):
                run = figures_of(store.outcome(task, kind, base, seed))
                there[task, kind, None, name, seed] = run
                where = {"task": task, "kind": kind, "shots": None, "method": name, "seed": seed}
                rows.append(where | without_predictions(run))
    return {"upgrades": [list(place) for place in places(config)], "runs": rows,
            "differences": _differences(store, config, there)}  # fmt: skip


AGAINST = (("distill", "scratch"), ("init", "scratch"), ("init+distill", "scratch"), ("interpolation", "scratch"),
           ("init+distill", "distill"), ("init+distill", "init"), ("interpolation", "init+distill"),
           ("init+distill", TEACHER), ("distill", TEACHER))  # fmt: skip


def _differences(store: Store, config: Config, there: dict[tuple[Any, ...], Any]) -> list[dict[str, Any]]:
    rows = []
    for task, kind, _, new in places(config):
        for shots in config.shots:
            for one, other in AGAINST:
                beside = None if other == TEACHER else shots
                pairs = [
                    (there[task, kind, shots, one, seed], there[task, kind, beside, other, seed])
                    for seed in store.size.seeds
                    if (task, kind, shots, one, seed) in there and (task, kind, beside, other, seed) in there
                ]
                if pairs:
                    labels = labels_of(store, task, kind, new, store.size.seeds[0])
                    gap = compare(labels, *map(list, zip(*pairs, strict=True)))
                    rows.append({"task": task, "kind": kind, "shots": shots, "method": one, "against": other, **gap})
    return rows


def page(results: dict[str, Any]) -> Page:
    """Write a table of methods by number of labels, and draw them."""
    runs, parts, pictures = results["runs"], [], {}
    shots = sorted({run["shots"] for run in runs if run["shots"] is not None})
    for task, kind, old, new in results["upgrades"]:
        mine = [run for run in runs if (run["task"], run["kind"]) == (task, kind)]
        levels = {name: [run["test"] for run in mine if run["method"] == name] for name in (TEACHER, WHOLE)}
        rows: list[list[str]] = []
        series: dict[str, list[tuple[float, float, float]]] = {}
        for method in dict.fromkeys(run["method"] for run in mine if run["shots"] is not None):
            line = [method]
            for count in shots:
                values = [run["test"] for run in mine if (run["method"], run["shots"]) == (method, count)]
                of = {"task": task, "kind": kind, "shots": count, "method": method}
                gaps = select(results["differences"], against="scratch", **of)
                line.append(mean_sd(values) + (f"; {points(gaps[0])}" if gaps else ""))
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    series.setdefault(method, []).append((count, statistics.fmean(values), spread))
            rows.append(line)
        rows += [[name, *[mean_sd(values)] * len(shots)] for name, values in levels.items()]
        name = f"shots-{task}-{kind}.svg"
        known = {name_: statistics.fmean(values) for name_, values in levels.items() if values}
        pictures[name] = lines(series, "labelled examples a class", "accuracy on test", levels=known, ticks=shots)
        parts.append(
            f"## {task}, {kind}: M_{old} → M_{new}\n\n"
            "Accuracy on test; difference to scratch with as few labels in points.\n\n"
            + table(["method", *(f"{count} a class" for count in shots)], rows)
            + f"\n\n![Accuracy over labels]({name})"
        )
    return Page("\n\n".join(parts), pictures, _findings(results["differences"]))


def _findings(rows: list[dict[str, Any]]) -> tuple[Finding, ...]:
    def of(one: str, other: str) -> list[dict[str, Any]]:
        return [row for row in rows if (row["method"], row["against"]) == (one, other)]

    return (
        tell_difference("With few labels, distilling from the old model is better than scratch.", "method `distill`",
                        of("distill", "scratch")),
        tell_difference("With few labels, starting from the old weights and distilling beats distilling alone.",
                        "method `init+distill`", of("init+distill", "distill")),
        tell_difference("With few labels, that beats starting from the old weights without a teacher.",
                        "method `init+distill`", of("init+distill", "init")),
        tell_difference("The student becomes better than its teacher, the old deployment.",
                        "method `init+distill`" + OURS, of("init+distill", TEACHER)),
        tell_difference("Distilling at points between student and teacher too is better still.", "`interpolation`",
                        of("interpolation", "init+distill")),
    )  # fmt: skip


EXPERIMENT = Experiment(
    "5-distillation",
    "5 · Distillation with few labels",
    "The old deployment, tuned with all labels, teaches the new base, for which there are few: scratch, `distill`, "
    "`init`, `init+distill` and distillation at points between student and teacher.",
    Config, tunings, cells, collect, page,
)  # fmt: skip
