"""Experiment 2: the linear connectivity of models tuned on different bases of the chain."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import DIGITS, distinct_keys, distinct_values, format_mean, markdown_table, mean_and_deviation, select

from findings.charts import draw_lines
from findings.experiment import NOT_STATED, Cell, CellRecord, Experiment, Finding, Page, judge_claim
from findings.settings import BasePair, StrictModel, TasksByKind, list_task_kinds
from findings.store import Tuning
from regraft.diagnosis import segment
from regraft.diagnosis.pair import load_counterpart

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tables import Row

    from findings.store import Store

PART = "2. mode connectivity"
"""The part of the paper that the claims belong to."""


class Config(StrictModel):
    """The lines to measure.

    Args:
        tasks: Tasks by kind of adaptation.
        pairs: Pairs of bases whose runs differ in their seeds; a base paired with itself stands for two seeds on it.
        one_seed: Pairs of bases whose runs share a seed: the same fresh head, and the data in the same order.
        points: The number of points on each line, ends included.
    """

    tasks: TasksByKind = Field(description="lists of tasks by kind of adaptation")
    pairs: tuple[BasePair, ...] = Field(min_length=1, description="a list of pairs of bases")
    one_seed: tuple[BasePair, ...] = Field(default=(), description="a list of pairs of bases")
    points: int = Field(default=11, ge=3, description="a whole number of points, 3 or more")


def list_lines(config: Config, seeds: Sequence[int]) -> list[tuple[Tuning, Tuning]]:
    """Return the two ends of each line."""
    next_seed = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
    lines = []
    for seed in seeds:
        for task, kind in list_task_kinds(config.tasks):
            for i, j in config.pairs:
                second_seed = next_seed[seed] if i == j else seed
                lines.append((Tuning(task, kind, i, seed), Tuning(task, kind, j, second_seed)))
            for i, j in config.one_seed:  # a run's seed is `Tuning.seed` plus the base's index: seed + i at both ends
                lines.append((Tuning(task, kind, i, seed), Tuning(task, kind, j, seed + i - j)))
    return lines


def _share_seed(first: Tuning, second: Tuning) -> bool:
    """Return whether tunings on different bases have the same seed once the index of the base is added."""
    return first.base != second.base and first.seed + first.base == second.seed + second.base


def list_tunings(config: Config, seeds: Sequence[int], num_bases: int) -> Iterable[Tuning]:
    """Return the tunings at the ends of all lines."""
    return [tuning for line in list_lines(config, seeds) for tuning in line]


def list_cells(store: Store, config: Config) -> list[Cell]:
    """Return one cell per line."""
    cells = []
    for first, second in list_lines(config, store.size.seeds):
        suffix = "-one" if _share_seed(first, second) else ""
        name = f"{first.task}-{first.kind}-M{first.base}-M{second.base}{suffix}-seed{first.seed}"
        arguments = (first.task, first.kind, first.base, second.base, first.seed, second.seed, config.points)
        cells.append(Cell(name, measure, arguments))
    return cells


def measure(
    store: Store, work_folder: Path, task: str, kind: str, i: int, j: int, seed: int, second_seed: int, num_points: int
) -> dict[str, Any]:
    """Evaluate models on the line from a tuning on M_i to a tuning on M_j; for adapters, interpolate the base too.

    Args:
        store: The store, with both tunings.
        work_folder: Not used.
        task: The name of the task.
        kind: The kind of adaptation.
        i: The index of the base at the start of the line.
        j: The index of the base at its end.
        seed: The seed of the tuning on M_i.
        second_seed: The seed of the tuning on M_j.
        num_points: The number of points on the line, ends included.

    Returns:
        The positions `mu`, from 0 to 1; `loss` and `score` at each position, and the `barrier`, by split; and whether
        the ends are `connected`.
    """
    data = store.load_data(task)
    upgrade = store.load_upgrade(i, j)
    precision = store.recipe(kind, seed, i).resolve_precision()
    first = load_counterpart(store.tuning_folder(task, kind, i, seed), upgrade.old, data)
    second = load_counterpart(store.tuning_folder(task, kind, j, second_seed), upgrade.new, data)
    line = segment(first, second, upgrade.old, data, points=num_points, precision=precision)
    return {
        "mu": list(line.mu),
        "loss": {split: [round(value, DIGITS) for value in values] for split, values in line.loss.items()},
        "score": {split: [round(value, DIGITS) for value in values] for split, values in line.score.items()},
        "barrier": {split: round(value, DIGITS) for split, value in line.barrier.items()},
        "connected": line.connected,
    }


def collect_results(store: Store, config: Config, records: list[CellRecord]) -> dict[str, Any]:
    """Return each line with its bases, its number of hops, and whether its ends share a seed."""
    runs = []
    for record in records:
        task, kind, first, second, seed, second_seed, _ = record.arguments
        ends = Tuning(task, kind, first, seed), Tuning(task, kind, second, second_seed)
        runs.append(
            {"task": task, "kind": kind, "first": first, "second": second, "seed": seed}
            | record.figures
            | {"hops": second - first, "one_seed": _share_seed(*ends)}
        )
    return {"runs": runs}


def build_page(results: dict[str, Any]) -> Page:
    """Write one table of barriers per kind, and draw the losses along the lines and the barriers over hops."""
    runs = results["runs"]
    sections = []
    pictures = {}
    head = [
        "task",
        "line",
        "barrier (dev)",
        "barrier (test)",
        "connected",
        "score at μ = 0",
        "at μ = 1",
        "lowest against the lower end, points",
    ]
    for kind in distinct_values(runs, "kind"):
        kind_runs = select(runs, kind=kind)
        rows = [
            _line_row(select(kind_runs, task=task, first=first, second=second, one_seed=one_seed))
            for task, first, second, one_seed in distinct_keys(kind_runs, "task", "first", "second", "one_seed")
        ]
        pictures[f"barrier-{kind}.svg"] = draw_lines(
            _barriers_over_hops(kind_runs),
            "hops between the bases (0: two seeds on one)",
            "barrier on test (nats)",
            ticks=sorted(distinct_values(kind_runs, "hops")),
            is_score=False,
        )
        pictures[f"lines-{kind}.svg"] = draw_lines(
            _losses_over_mu(kind_runs), "μ", "mean loss on test (nats)", is_score=False
        )
        table = markdown_table(head, rows)
        sections.append(f"## {kind}\n\nBarriers in nats, means ± deviations over seeds.\n\n{table}")
        sections.append(f"![Barrier over hops](barrier-{kind}.svg)\n\n![Loss along the lines](lines-{kind}.svg)")
    return Page("\n\n".join(sections), pictures, tuple(_judge_claims(runs)))


def _line_row(runs: list[Row]) -> list[str]:
    """Write the row of a line from its runs, one per seed."""
    return [
        runs[0]["task"],
        _line_label(runs[0]),
        format_mean([run["barrier"]["dev"] for run in runs]),
        format_mean([run["barrier"]["test"] for run in runs]),
        f"{sum(run['connected'] for run in runs)} of {len(runs)}",
        format_mean([run["score"]["test"][0] for run in runs]),
        format_mean([run["score"]["test"][-1] for run in runs]),
        format_mean([_score_dip(run) for run in runs], 1),
    ]


def _line_label(run: Row) -> str:
    if not run["hops"]:
        return f"M_{run['first']}, two seeds"
    return f"M_{run['first']} → M_{run['second']}" + (", one seed" if run["one_seed"] else "")


def _score_dip(run: Row) -> float:
    """Return the lowest score on test along the line minus the score of the lower end, in points."""
    scores = run["score"]["test"]
    return 100 * float(min(scores) - min(scores[0], scores[-1]))


def _barriers_over_hops(runs: list[Row]) -> dict[str, list[tuple[float, float, float]]]:
    series = {}
    for task, one_seed in distinct_keys(runs, "task", "one_seed"):
        line_runs = select(runs, task=task, one_seed=one_seed)
        series[task + (", one seed" if one_seed else "")] = [
            (hops, *mean_and_deviation([run["barrier"]["test"] for run in select(line_runs, hops=hops)]))
            for hops in sorted(distinct_values(line_runs, "hops"))
        ]
    return series


def _losses_over_mu(runs: list[Row]) -> dict[str, list[tuple[float, float, float]]]:
    series = {}
    for hops, one_seed in sorted(distinct_keys(runs, "hops", "one_seed")):
        line_runs = select(runs, hops=hops, one_seed=one_seed)
        losses = zip(*(run["loss"]["test"] for run in line_runs), strict=True)
        series[_hops_label(hops) + (", one seed" if one_seed else "")] = [
            (mu, statistics.fmean(values), 0.0) for mu, values in zip(line_runs[0]["mu"], losses, strict=True)
        ]
    return series


def _hops_label(hops: int) -> str:
    if not hops:
        return "two seeds"
    return "1 hop" if hops == 1 else f"{hops} hops"


def _judge_claims(runs: list[Row]) -> Iterable[Finding]:
    """Judge the claims on consecutive and distant bases for each kind, with and without a shared seed."""
    for kind in distinct_values(runs, "kind"):
        kind_runs = select(runs, kind=kind)
        for one_seed in (True, False):
            seed_runs = select(kind_runs, one_seed=one_seed)
            condition = f"{kind}; " + (
                "the same fresh head and order of data" if one_seed else "a head of its own each"
            )
            part = PART if one_seed else PART + NOT_STATED
            for name, pair_runs in (
                ("consecutive", [run for run in seed_runs if run["hops"] == 1]),
                ("distant", [run for run in seed_runs if run["hops"] > 1]),
            ):
                if pair_runs:
                    claim = f"Models tuned on {name} bases ({condition}) are linearly connected: no barrier of loss."
                    yield _judge_connection(claim, part, pair_runs)
        growth = _judge_growth(kind, select(kind_runs, one_seed=False))
        if growth is not None:
            yield growth


def _judge_connection(claim: str, part: str, runs: list[Row]) -> Finding:
    barriers = [run["barrier"]["test"] for run in runs]
    figure = (
        f"mean barrier {statistics.fmean(barriers):.3f} nats on test, highest {max(barriers):.3f}; at its lowest the "
        f"score is {statistics.fmean(map(_score_dip, runs)):+.1f} points from the lower end"
    )
    return judge_claim(claim, part, [run["connected"] for run in runs], figure)


def _judge_growth(kind: str, runs: list[Row]) -> Finding | None:
    """Judge whether barriers grow with the hops; return None if no task has lines of different length."""
    barriers_by_task = _barriers_over_hops([run for run in runs if run["hops"]])
    ends = [(points[0][1], points[-1][1]) for points in barriers_by_task.values() if len(points) > 1]
    if not ends:
        return None
    nearest, farthest = (statistics.fmean(barriers) for barriers in zip(*ends, strict=True))
    return judge_claim(
        f"The farther apart the bases, the higher the barrier ({kind}).",
        PART + NOT_STATED,
        [high > low for low, high in ends],
        f"{nearest:.3f} nats after the fewest hops, {farthest:.3f} after the most",
    )


EXPERIMENT = Experiment(
    "2-connectivity",
    "2 · Linear connectivity",
    "The straight line between what was tuned on M_i and on M_j for the same task, on dev and test: does the loss rise "
    "in between, and does the barrier grow with the hops? The ends are tuned with seeds of their own, or with one: "
    "from the same fresh head, on the data in the same order. Two seeds on one base are the control.",
    Config,
    list_tunings,
    list_cells,
    collect_results,
    build_page,
)
