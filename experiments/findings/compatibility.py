"""Experiment 1: the scores of outdated weights while the base is pre-trained further."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import DIGITS, distinct_keys, distinct_values, format_mean, markdown_table, mean_and_deviation, select

from findings.charts import draw_lines
from findings.experiment import Cell, CellRecord, Experiment, Finding, Page, judge_claim
from findings.settings import StrictModel, TasksByKind, list_task_kinds
from findings.store import Tuning
from regraft.diagnosis import compatibility, load_pair
from regraft.task import MIN_HEADROOM

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tables import Row

    from findings.store import Store

MIN_RECOVERY = 0.5
"""The share of a tuned new base's gain over chance from which outdated weights count as far above an untuned base;
arbitrary, but fixed before any cell was measured."""
MAX_LOSS_PER_HOP = 10.0
"""The % of the old model's gain over chance up to which the loss per hop counts as slow; arbitrary, but fixed before
any cell was measured."""
ROW_LABELS = {"outdated": "tuned on M_0, put on", "tuned": "tuned on", "agreement": "agreement with M_0's deployment"}


class Config(StrictModel):
    """The tasks to measure.

    Args:
        tasks: Tasks by kind of adaptation.
    """

    tasks: TasksByKind = Field(description="lists of tasks by kind of adaptation")


def list_tunings(config: Config, seeds: Sequence[int], num_bases: int) -> Iterable[Tuning]:
    """Return the tunings on every base of the chain."""
    return [
        Tuning(task, kind, base, seed)
        for task, kind in list_task_kinds(config.tasks)
        for base in range(num_bases)
        for seed in seeds
    ]


def list_cells(store: Store, config: Config) -> list[Cell]:
    """Return one cell per adaptation of M_0."""
    return [
        Cell(f"{task}-{kind}-seed{seed}", measure, (task, kind, seed, store.num_bases))
        for seed in store.size.seeds
        for task, kind in list_task_kinds(config.tasks)
    ]


def measure(store: Store, work_folder: Path, task: str, kind: str, seed: int, num_bases: int) -> dict[str, Any]:
    """Evaluate an adaptation of M_0, unchanged, on every saved base.

    Args:
        store: The store, with the bases, the task and the tuning on M_0.
        work_folder: Not used.
        task: The name of the task.
        kind: The kind of adaptation.
        seed: The seed of the tuning.
        num_bases: Not used, but part of the cell's arguments: a longer chain is measured again.

    Returns:
        `points`: one row per saved base, from M_0 on.
    """
    checkpoints = store.list_base_checkpoints()
    recipe = store.recipe(kind, seed, 0)
    adaptation = store.tuning_folder(task, kind, 0, seed)
    # only the old deployment is used: M_1 stands for any new base
    with load_pair(store.load_upgrade(0, 1), adaptation, store.load_task(task), recipe=recipe) as pair:
        points = compatibility(pair, [checkpoint.folder for checkpoint in checkpoints])
    positions = [(0, 0), *((checkpoint.hop, checkpoint.steps) for checkpoint in checkpoints)]
    rows = []
    for (hop, steps), point in zip(positions, points, strict=True):
        figures = {name: round(getattr(point, name), DIGITS) for name in ("distance", "score", "loss", "agreement")}
        rows.append({"hop": hop, "steps": steps, **figures})
    return {"points": rows}


def collect_results(store: Store, config: Config, records: list[CellRecord]) -> dict[str, Any]:
    """Return outdated weights' scores on every saved base; on each M_i, paired with those of weights tuned on it."""
    # the last checkpoint of a hop is its base
    steps_by_base = {0: 0} | {checkpoint.hop: checkpoint.steps for checkpoint in store.list_base_checkpoints()}
    runs, points = [], []
    for record in records:
        task, kind, seed, _ = record.arguments
        cell_points = record.figures["points"]
        points += [{"task": task, "kind": kind, "seed": seed} | point for point in cell_points]
        for base, steps in sorted(steps_by_base.items()):
            tuned_scores = store.load_tuning(task, kind, base, seed).scores
            outdated = next(point for point in cell_points if point["steps"] == steps)
            runs.append(
                {
                    "task": task,
                    "kind": kind,
                    "seed": seed,
                    "base": base,
                    "outdated": outdated["score"],
                    "tuned": tuned_scores["test"],
                    "majority": tuned_scores["test_majority"],
                    "untuned": tuned_scores["dev_at_start"],
                    "agreement": outdated["agreement"],
                    "distance": outdated["distance"],
                }
            )
    return {"runs": runs, "points": points, "ends": [steps for _, steps in sorted(steps_by_base.items())]}


def build_page(results: dict[str, Any]) -> Page:
    """Write the scores on every base as tables, and draw them over the steps."""
    runs = results["runs"]
    bases = sorted(set(distinct_values(runs, "base")))
    sections = []
    pictures = {}
    for kind in distinct_values(runs, "kind"):
        kind_runs = select(runs, kind=kind)
        rows = [row for task in distinct_values(kind_runs, "task") for row in _task_rows(kind_runs, task, bases)]
        sections.append(f"## {kind}\n\n" + markdown_table(["task", "", *(f"M_{base}" for base in bases)], rows))
        sections.append(f"![Score over steps](score-{kind}.svg)\n\n![Agreement over steps](agreement-{kind}.svg)")
        for figure, label in (("score", "accuracy on test"), ("agreement", "agreement with M_0's")):
            pictures[f"{figure}-{kind}.svg"] = draw_lines(
                _series_over_steps(select(results["points"], kind=kind), figure),
                "pre-training steps since M_0 (dotted: the end of a domain)",
                label,
                marks=results["ends"][1:],
            )
    distances = [f"M_{base} {select(runs, base=base)[0]['distance']:.1f}" for base in bases]
    sections.append("L2 distance from M_0: " + ", ".join(distances))
    return Page("\n\n".join(sections), pictures, _judge_claims(runs))


def _task_rows(runs: list[Row], task: str, bases: list[int]) -> list[list[str]]:
    task_runs = select(runs, task=task)

    def row(label: str, figure: str) -> list[str]:
        return [task, label, *(format_mean([run[figure] for run in select(task_runs, base=base)]) for base in bases)]

    return [
        *(row(label, figure) for figure, label in ROW_LABELS.items()),
        [task, "majority guess", *[f"{task_runs[0]['majority']:.3f}"] * len(bases)],
        row("an untrained head (dev)", "untuned"),
    ]


def _series_over_steps(points: list[Row], figure: str) -> dict[str, list[tuple[float, float, float]]]:
    series = {}
    for task in distinct_values(points, "task"):
        task_points = select(points, task=task)
        series[task] = [
            (steps, *mean_and_deviation([point[figure] for point in select(task_points, steps=steps)]))
            for steps in sorted(distinct_values(task_points, "steps"))
        ]
    return series


@dataclasses.dataclass(frozen=True)
class _MeanScores:
    """The mean scores of one task and kind on one base, over seeds."""

    outdated: float
    tuned: float
    majority: float


def _mean_scores(runs: list[Row]) -> _MeanScores:
    return _MeanScores(*(statistics.fmean(run[name] for run in runs) for name in ("outdated", "tuned", "majority")))


def _judge_claims(runs: list[Row]) -> tuple[Finding, ...]:
    """Judge the claims on recovery, the gap to a tuned new base, and the loss per hop, by mean scores over seeds."""
    recoveries, gaps, losses, is_falling = [], [], [], []
    for task, kind in distinct_keys(runs, "task", "kind"):
        task_runs = select(runs, task=task, kind=kind)
        first, *later_scores = [
            _mean_scores(select(task_runs, base=base)) for base in sorted(distinct_values(task_runs, "base"))
        ]
        for scores in later_scores:
            gaps.append(100 * (scores.tuned - scores.outdated))
            if scores.tuned - scores.majority >= MIN_HEADROOM:
                recoveries.append((scores.outdated - scores.majority) / (scores.tuned - scores.majority))
        headroom = first.outdated - first.majority
        if later_scores and headroom >= MIN_HEADROOM:
            losses.append(100 * (first.outdated - later_scores[-1].outdated) / headroom / len(later_scores))
            is_falling.append(later_scores[-1].outdated < first.outdated)
    recovery_figure = f"median {100 * statistics.median(recoveries):.0f} % of that gain" if recoveries else ""
    gap_figure = f"{statistics.fmean(gaps):.1f} points below on average" if gaps else ""
    loss_figure = f"median {statistics.median(losses):.1f} % a hop, at most {max(losses):.1f} %" if losses else ""
    part = "1. compatibility; method `direct`"
    return (
        judge_claim(
            "Outdated weights score far above an untuned new base: they keep at least half of what tuning it gains "
            "above guessing.",
            part,
            [recovery >= MIN_RECOVERY for recovery in recoveries],
            recovery_figure,
        ),
        judge_claim("Outdated weights score below a tuned new base.", part, [gap > 0 for gap in gaps], gap_figure),
        judge_claim(
            "The score of outdated weights falls as pre-training of the base goes on.", part, is_falling, loss_figure
        ),
        judge_claim(
            f"It falls slowly: a hop costs outdated weights at most {MAX_LOSS_PER_HOP:.0f} % of what they had above "
            "guessing.",
            part,
            [loss <= MAX_LOSS_PER_HOP for loss in losses],
            loss_figure,
        ),
    )


EXPERIMENT = Experiment(
    "1-compatibility",
    "1 · Compatibility of outdated weights",
    "What was tuned on M_0 is put on every later base as it is (`direct`). How much of its score is left, after how "
    "many steps of pre-training and how many hops?",
    Config,
    list_tunings,
    list_cells,
    collect_results,
    build_page,
)
