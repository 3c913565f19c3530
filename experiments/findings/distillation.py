"""Experiment 5: the old model as teacher, with few labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import distinct_values, format_difference, format_mean, markdown_table, mean_and_deviation, select

from findings.charts import draw_lines
from findings.experiment import NOT_STATED, Cell, CellRecord, Experiment, Finding, Page, judge_difference
from findings.runs import (
    TaskUpgrade,
    accuracy_difference,
    drop_predictions,
    list_upgrade_tunings,
    read_tuning_test_labels,
    run_method,
)
from findings.settings import NonNegativeInt, StrictModel
from findings.store import outcome_figures

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tables import Row

    from findings.store import Store, Tuning

    RunKey = tuple[str, str, int | None, str, int]
    """Task, kind, labels per class (None for all), method and seed."""

TEACHER, SCRATCH_ALL_LABELS = "teacher", "scratch, all labels"
LONGER_SUFFIX = ", longer"
"""Appended to the name of a method in runs with more steps."""
COMPARISONS = (
    ("distill", "scratch"),
    ("init", "scratch"),
    ("init+distill", "scratch"),
    ("interpolation", "scratch"),
    ("init+distill", "distill"),
    ("init+distill", "init"),
    ("interpolation", "init+distill"),
    ("init+distill", TEACHER),
    ("distill", TEACHER),
)
"""Pairs of a method and its reference, whose difference is computed."""


class TeacherUpgrade(StrictModel):
    """A task, with the bases of its teacher and its student.

    Args:
        task: The name of the task.
        old: The index of the teacher's base.
        new: The index of the student's base.
        kinds: Kinds of adaptation.
    """

    task: str = Field(description="the name of a task")
    old: NonNegativeInt = Field(description="the index of a base, 0 or more")
    new: NonNegativeInt = Field(description="the index of a base, 0 or more")
    kinds: tuple[str, ...] = Field(min_length=1, description="a list of kinds")


class LongerRuns(StrictModel):
    """Runs that are repeated with more steps.

    Args:
        times: Multiplies the steps.
        shots: Numbers of labelled examples per class.
        methods: Names of methods, scratch included.
    """

    times: float = Field(gt=1, description="a number above 1")
    shots: tuple[NonNegativeInt, ...] = Field(min_length=1, description="a list of whole numbers, 1 or more")
    methods: tuple[str, ...] = Field(min_length=1, description="a list of methods")


class Config(StrictModel):
    """The upgrades, numbers of labels and methods to run.

    Args:
        upgrades: The tasks and their bases.
        shots: Numbers of labelled examples per class.
        methods: Names of methods; scratch is the reference of the others.
        longer: The runs to repeat with more steps; None for no such runs.
    """

    upgrades: tuple[TeacherUpgrade, ...] = Field(min_length=1, description="a list with task, old, new, kinds")
    shots: tuple[NonNegativeInt, ...] = Field(min_length=1, description="a list of whole numbers, 1 or more")
    methods: tuple[str, ...] = Field(
        default=("scratch", "distill", "init", "init+distill", "interpolation"), description="a list of methods"
    )
    longer: LongerRuns | None = Field(default=None, description="times, shots and methods")


def list_upgrades(config: Config) -> list[TaskUpgrade]:
    """Return one upgrade per task and kind."""
    return [
        TaskUpgrade(upgrade.task, kind, upgrade.old, upgrade.new)
        for upgrade in config.upgrades
        for kind in upgrade.kinds
    ]


def list_tunings(config: Config, seeds: Sequence[int], num_bases: int) -> Iterable[Tuning]:
    """Return the teachers on the old bases, and scratch with all labels on the new ones."""
    return list_upgrade_tunings(list_upgrades(config), seeds)


def list_cells(store: Store, config: Config) -> list[Cell]:
    """Return one cell per upgrade, method, number of labels and seed."""
    cells = []
    for seed in store.size.seeds:
        for upgrade in list_upgrades(config):
            prefix = f"{upgrade.task}-{upgrade.kind}"
            for shots in config.shots:
                for method in config.methods:
                    name = f"{prefix}-{shots}-{method.replace('+', '-')}-seed{seed}"
                    cells.append(Cell(name, measure, (*upgrade, shots, method, seed)))
            if config.longer is None:
                continue
            for shots in config.longer.shots:
                for method in config.longer.methods:
                    name = f"{prefix}-{shots}-{method.replace('+', '-')}-longer-seed{seed}"
                    cells.append(Cell(name, measure, (*upgrade, shots, method, seed, config.longer.times)))
    return cells


def measure(
    store: Store,
    work_folder: Path,
    task: str,
    kind: str,
    old: int,
    new: int,
    shots: int,
    method: str,
    seed: int,
    steps_factor: float = 1.0,
) -> dict[str, Any]:
    """Recycle an adaptation with few labels.

    Args:
        store: The store, with the bases, the task and the teacher.
        work_folder: The folder for the outcome.
        task: The name of the task.
        kind: The kind of adaptation.
        old: The index of the teacher's base.
        new: The index of the student's base.
        shots: The number of labelled examples per class.
        method: The name of the method.
        seed: The seed of the teacher and of the run.
        steps_factor: Multiplies the recipe's steps.

    Returns:
        The figures of `outcome_figures`.
    """
    teacher = store.tuning_folder(task, kind, old, seed)
    upgrade = TaskUpgrade(task, kind, old, new)
    return run_method(store, work_folder, upgrade, teacher, seed, method, shots=shots, steps_factor=steps_factor)


def collect_results(store: Store, config: Config, records: list[CellRecord]) -> dict[str, Any]:
    """Return each run, and the differences between methods with as many labels, or from the teacher."""
    runs: dict[RunKey, Row] = {}
    for record in records:
        task, kind, _, _, shots, method, seed, *steps_factor = record.arguments
        runs[task, kind, shots, method + LONGER_SUFFIX if steps_factor else method, seed] = record.figures
    for task, kind, old, new in list_upgrades(config):
        for name, base in ((TEACHER, old), (SCRATCH_ALL_LABELS, new)):
            for seed in store.size.seeds:
                if store.has_tuning(task, kind, base, seed):
                    runs[task, kind, None, name, seed] = outcome_figures(store.load_tuning(task, kind, base, seed))
    rows = [
        {"task": task, "kind": kind, "shots": shots, "method": method, "seed": seed, **drop_predictions(run)}
        for (task, kind, shots, method, seed), run in runs.items()
    ]
    return {
        "upgrades": [list(upgrade) for upgrade in list_upgrades(config)],
        "longer": config.longer.model_dump(mode="json") if config.longer else None,
        "runs": rows,
        "differences": _collect_differences(store, config, runs),
    }


def _collect_differences(store: Store, config: Config, runs: dict[RunKey, Row]) -> list[Row]:
    """Compare the methods of `COMPARISONS` over the seeds that both have, and the longer runs likewise."""
    longer_comparisons = [
        (method + LONGER_SUFFIX, reference if reference == TEACHER else reference + LONGER_SUFFIX)
        for method, reference in COMPARISONS
    ]
    rows = []
    for task, kind, _, new in list_upgrades(config):
        for shots in dict.fromkeys([*config.shots, *(config.longer.shots if config.longer else ())]):
            for method, reference in (*COMPARISONS, *longer_comparisons):
                reference_shots = None if reference == TEACHER else shots
                method_runs, reference_runs = [], []
                for seed in store.size.seeds:
                    run = runs.get((task, kind, shots, method, seed))
                    reference_run = runs.get((task, kind, reference_shots, reference, seed))
                    if run and reference_run:
                        method_runs.append(run)
                        reference_runs.append(reference_run)
                if method_runs:
                    labels = read_tuning_test_labels(store, task, kind, new, store.size.seeds[0])
                    key = {"task": task, "kind": kind, "shots": shots, "method": method, "against": reference}
                    rows.append(key | accuracy_difference(labels, method_runs, reference_runs))
    return rows


def build_page(results: dict[str, Any]) -> Page:
    """Write one table of methods by number of labels per upgrade, and draw the scores."""
    sections = []
    pictures = {}
    shots = sorted({run["shots"] for run in results["runs"] if run["shots"] is not None})
    head = ["method", *(f"{num_shots} a class" for num_shots in shots)]
    for task, kind, old, new in results["upgrades"]:
        runs = select(results["runs"], task=task, kind=kind)
        differences = select(results["differences"], task=task, kind=kind)
        methods = distinct_values([run for run in runs if run["shots"] is not None], "method")
        rows = [_method_row(method, shots, runs, differences) for method in methods]
        levels = {}
        for reference in (TEACHER, SCRATCH_ALL_LABELS):
            scores = [run["test"] for run in select(runs, method=reference)]
            rows.append([reference, *[format_mean(scores)] * len(shots)])
            if scores:
                levels[reference], _ = mean_and_deviation(scores)
        picture = f"shots-{task}-{kind}.svg"
        pictures[picture] = draw_lines(
            _series_over_shots(methods, shots, runs),
            "labelled examples a class",
            "accuracy on test",
            levels=levels,
            ticks=shots,
        )
        sections.append(
            f"## {task}, {kind}: M_{old} → M_{new}\n\n"
            "Accuracy on test; difference to scratch with as few labels in points.\n\n"
            f"{markdown_table(head, rows)}\n\n![Accuracy over labels]({picture})"
        )
    if results["longer"]:
        sections.append(
            f"Longer: {results['longer']['times']:g} times the steps, held against scratch with as many. This was "
            "asked after the other runs had been seen."
        )
    return Page("\n\n".join(sections), pictures, _judge_claims(results["differences"], results["longer"]))


def _method_row(method: str, shots: list[int], runs: list[Row], differences: list[Row]) -> list[str]:
    """Write the scores of a method by number of labels, with the differences from scratch."""
    scratch = "scratch" + LONGER_SUFFIX if method.endswith(LONGER_SUFFIX) else "scratch"
    row = [method]
    for num_shots in shots:
        cell = format_mean([run["test"] for run in select(runs, method=method, shots=num_shots)])
        scratch_differences = select(differences, shots=num_shots, method=method, against=scratch)
        if scratch_differences:
            cell += f"; {format_difference(scratch_differences[0])}"
        row.append(cell)
    return row


def _series_over_shots(
    methods: list[str], shots: list[int], runs: list[Row]
) -> dict[str, list[tuple[float, float, float]]]:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for method in methods:
        if method.endswith(LONGER_SUFFIX):
            continue
        for num_shots in shots:
            scores = [run["test"] for run in select(runs, method=method, shots=num_shots)]
            if scores:
                series.setdefault(method, []).append((num_shots, *mean_and_deviation(scores)))
    return series


def _judge_claims(differences: list[Row], longer: dict[str, Any] | None) -> tuple[Finding, ...]:
    """Judge each claim by the differences of two methods over all upgrades and numbers of labels."""

    def judge(claim: str, part: str, method: str, reference: str) -> Finding:
        return judge_difference(claim, part, select(differences, method=method, against=reference))

    findings = [
        judge(
            "With few labels, distilling from the old model is better than scratch.",
            "method `distill`",
            "distill",
            "scratch",
        )
    ]
    if longer is not None:
        claim = (
            f"With few labels and {longer['times']:g} times the steps, distilling is better than scratch with as many."
        )
        findings.append(judge(claim, "method `distill`", "distill" + LONGER_SUFFIX, "scratch" + LONGER_SUFFIX))
    part = "method `init+distill`"
    return (
        *findings,
        judge(
            "With few labels, starting from the old weights and distilling beats distilling alone.",
            part,
            "init+distill",
            "distill",
        ),
        judge(
            "With few labels, that beats starting from the old weights without a teacher.",
            part,
            "init+distill",
            "init",
        ),
        judge(
            "The student becomes better than its teacher, the old deployment.",
            part + NOT_STATED,
            "init+distill",
            TEACHER,
        ),
        judge(
            "Distilling at points between student and teacher too is better still.",
            "`interpolation`",
            "interpolation",
            "init+distill",
        ),
    )


EXPERIMENT = Experiment(
    "5-distillation",
    "5 · Distillation with few labels",
    "The old deployment, tuned with all labels, teaches the new base, for which there are few: scratch, `distill`, "
    "`init`, `init+distill` and distillation at points between student and teacher.",
    Config,
    list_tunings,
    list_cells,
    collect_results,
    build_page,
)
