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


class Longer(Settings):
    """What is run with more steps as well.

    Args:
        times: How many times the steps.
        shots: Labelled examples a class.
        methods: By name, scratch among them.
    """

    times: float = Field(gt=1, description="a number above 1")
    shots: tuple[Number, ...] = Field(min_length=1, description="a list of whole numbers, 1 or more")
    methods: tuple[str, ...] = Field(min_length=1, description="a list of methods")


class Config(Settings):
    """What is run.

    Args:
        upgrades: The tasks and their bases.
        shots: Labelled examples a class.
        methods: By name; scratch is what the others are held against.
        longer: What is run with more steps as well.
    """

    upgrades: tuple[Upgraded, ...] = Field(min_length=1, description="a list with task, old, new, kinds")
    shots: tuple[Number, ...] = Field(min_length=1, description="a list of whole numbers, 1 or more")
    methods: tuple[str, ...] = Field(
        default=("scratch", "distill", "init", "init+distill", "interpolation"), description="a list of methods"
    )
    longer: Longer | None = Field(default=None, description="times, shots and methods")


def places(config: Config) -> list[tuple[str, str, int, int]]:
    """Give each task, kind, old and new base."""
    return [(one.task, kind, one.old, one.new) for one in config.upgrades for kind in one.kinds]


def tunings(config: Config, seeds: Sequence[int], bases: int) -> Iterable[Tuning]:
    """Give the teachers, and scratch with all labels."""
    return [Tuning(task, kind, base, seed) for task, kind, *both in places(config) for base in both for seed in seeds]


def cells(store: Store, config: Config) -> list[Cell]:
    """Give one for each method, number of labels and seed."""
    longer = config.longer
    wanted: list[tuple[int, str, tuple[float, ...]]] = [
        (n, method, ()) for n in config.shots for method in config.methods
    ]
    if longer is not None:
        wanted += [(n, method, (longer.times,)) for n in longer.shots for method in longer.methods]
    return [
        Cell(f"{task}-{kind}-{shots}-{method.replace('+', '-')}{'-longer' if times else ''}-seed{seed}", measure,
             (task, kind, old, new, shots, method, seed, *times))
        for seed in store.size.seeds for task, kind, old, new in places(config) for shots, method, times in wanted
    ]  # fmt: skip


def measure(
    store: Store, work: Path, task: str, kind: str, old: int, new: int, shots: int, method: str, seed: int,
    times: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """Recycle with a few labels."""
    teacher = store.tuned(task, kind, old, seed)
    return run_method(store, work, task, teacher, kind, (old, new), seed, method, shots=shots, times=times)


def _long(method: str) -> str:
    return f"{method}, longer"


def collect(store: Store, config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Give each run, and the differences between methods with as few labels."""
    there, rows = {}, []
    for cell in found:
        task, kind, _, _, shots, method, seed, *times = cell["arguments"]
        method = _long(method) if times else method
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
    longer = config.longer.model_dump(mode="json") if config.longer else None
    return {"upgrades": [list(place) for place in places(config)], "longer": longer, "runs": rows,
            "differences": _differences(store, config, there)}  # fmt: skip


PAIRS = (("distill", "scratch"), ("init", "scratch"), ("init+distill", "scratch"), ("interpolation", "scratch"),
         ("init+distill", "distill"), ("init+distill", "init"), ("interpolation", "init+distill"),
         ("init+distill", TEACHER), ("distill", TEACHER))  # fmt: skip
AGAINST = (*PAIRS, *((_long(one), other if other == TEACHER else _long(other)) for one, other in PAIRS))


def _differences(store: Store, config: Config, there: dict[tuple[Any, ...], Any]) -> list[dict[str, Any]]:
    rows = []
    for task, kind, _, new in places(config):
        for shots in dict.fromkeys([*config.shots, *(config.longer.shots if config.longer else ())]):
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
                long = method.endswith(_long(""))
                gaps = select(results["differences"], against=_long("scratch") if long else "scratch", **of)
                line.append(mean_sd(values) + (f"; {points(gaps[0])}" if gaps else ""))
                if values and not long:
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
    if results["longer"]:
        parts.append(f"Longer: {results['longer']['times']:g} times the steps, held against scratch with as many. This "
                     "was asked after the other runs had been seen.")  # fmt: skip
    return Page("\n\n".join(parts), pictures, _findings(results["differences"], results["longer"]))


def _findings(rows: list[dict[str, Any]], longer: dict[str, Any] | None) -> tuple[Finding, ...]:
    def of(one: str, other: str) -> list[dict[str, Any]]:
        return [row for row in rows if (row["method"], row["against"]) == (one, other)]

    more = []
    if longer is not None:
        claim = (
            f"With few labels and {longer['times']:g} times the steps, distilling is better than scratch with as many."
        )
        more.append(tell_difference(claim, "method `distill`", of(_long("distill"), _long("scratch"))))
    return (
        tell_difference("With few labels, distilling from the old model is better than scratch.", "method `distill`",
                        of("distill", "scratch")),
        *more,
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
