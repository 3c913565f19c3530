"""Experiment 7: recycling along the chain of bases, hop by hop and at once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import MISSING, distinct_keys, format_difference, format_mean, markdown_table, mean_and_deviation, select

from findings.charts import draw_lines
from findings.experiment import (
    NOT_STATED,
    Cell,
    CellRecord,
    Experiment,
    Finding,
    Page,
    judge_claim,
    judge_difference,
)
from findings.runs import accuracy_difference
from findings.settings import StrictModel, TasksByKind, list_task_kinds
from findings.store import Tuning, outcome_figures
from regraft import load_outcome
from regraft.chain import Chain, ChainRow, run_chain, summarise_routes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tables import Row

    from findings.store import Store
    from regraft.chain import RouteSummary

HOP_BY_HOP, AT_ONCE = "hop by hop", "at once"
SCRATCH_ALL_STEPS = "scratch, all steps"
PART = "upgrade chains" + NOT_STATED
"""The part of the paper that the claims belong to."""


class Config(StrictModel):
    """The tasks and methods to run.

    Args:
        tasks: Tasks by kind of adaptation.
        methods: The methods that carry adaptations over; scratch is always run.
    """

    tasks: TasksByKind = Field(description="lists of tasks by kind of adaptation")
    methods: tuple[str, ...] = Field(default=("direct", "init+distill"), description="a list of methods")


def list_tunings(config: Config, seeds: Sequence[int], num_bases: int) -> Iterable[Tuning]:
    """Return scratch with all steps on each later base; a chain tunes M_0 by the same recipe."""
    return [
        Tuning(task, kind, base, seed)
        for task, kind in list_task_kinds(config.tasks)
        for base in range(1, num_bases)
        for seed in seeds
    ]


def list_cells(store: Store, config: Config) -> list[Cell]:
    """Return one cell per task, kind and seed."""
    methods = list(config.methods)
    return [
        Cell(f"{task}-{kind}-seed{seed}", measure, (task, kind, seed, methods, store.num_bases))
        for seed in store.size.seeds
        for task, kind in list_task_kinds(config.tasks)
    ]


def measure(
    store: Store, work_folder: Path, task: str, kind: str, seed: int, methods: list[str], num_bases: int
) -> dict[str, Any]:
    """Tune M_0, and carry the adaptation along the chain.

    Args:
        store: The store, with the bases and the task.
        work_folder: The folder for the chain's outcomes.
        task: The name of the task.
        kind: The kind of adaptation.
        seed: The seed of every run.
        methods: The names of the methods; scratch is always run.
        num_bases: The number of bases of the chain, M_0 included.

    Returns:
        `rows`: the fields of each `ChainRow`, with the predictions on test unless the hop was refused; `labels`: the
        true class of each test example.
    """
    chain = Chain(
        bases=tuple(store.base_name(base) for base in range(num_bases)),
        tasks=(str(store.task_file(task)),),
        kinds=(kind,),
        methods=tuple(methods),
        routes=(HOP_BY_HOP, AT_ONCE),
        seeds=(seed,),
        tuning=store.size.tuning[kind],
        recycling=store.size.few_shot[kind],
        precision=store.size.precision,
    )
    rows = []
    for chain_row in run_chain(chain, work_folder):
        row = dataclasses.asdict(chain_row) | {"task": task}
        if chain_row.refused is None:
            row["predictions"] = outcome_figures(load_outcome(work_folder / chain_row.outcome))["predictions"]
        rows.append(row)
    return {"rows": rows, "labels": store.load_data(task, seed).test.labels.tolist()}


def collect_results(store: Store, config: Config, records: list[CellRecord]) -> dict[str, Any]:
    """Summarise the routes over seeds, and compare the routes with one another and with scratch."""
    rows = [row for record in records for row in record.figures["rows"]]
    base_names = [f"M_{base}" for base in range(store.num_bases)]
    chain_fields = {field.name for field in dataclasses.fields(ChainRow)}
    chain_rows = [ChainRow(**{name: value for name, value in row.items() if name in chain_fields}) for row in rows]
    all_step_rows = []
    for tuning in list_tunings(config, store.size.seeds, store.num_bases):
        key = dataclasses.asdict(tuning)
        if store.has_tuning(**key):
            all_step_rows.append(key | {"score": outcome_figures(store.load_tuning(**key))["test"]})
    return {
        "bases": base_names,
        "runs": [
            {name: value for name, value in row.items() if name not in ("predictions", "outcome")} for row in rows
        ],
        "all steps": all_step_rows,
        "standings": [summary_in_percent(summary) for summary in summarise_routes(base_names, chain_rows)],
        "differences": _collect_differences(store, config, rows, records),
    }


def _collect_differences(store: Store, config: Config, rows: list[Row], records: list[CellRecord]) -> list[Row]:
    """Compare the routes of each method with one another and with scratch, on each base from the second hop on."""
    differences = []
    for task, kind in distinct_keys(rows, "task", "kind"):
        labels = next(record.figures["labels"] for record in records if record.arguments[:2] == [task, kind])
        evaluated_rows = [row for row in select(rows, task=task, kind=kind) if "predictions" in row]
        for base in range(2, store.num_bases):
            base_rows = select(evaluated_rows, base=base)
            scratch_runs = _runs_by_seed(base_rows, "scratch", None)
            for method in config.methods:
                runs_by_route = {route: _runs_by_seed(base_rows, method, route) for route in (HOP_BY_HOP, AT_ONCE)}
                for route, against, reference_runs in (
                    (HOP_BY_HOP, AT_ONCE, runs_by_route[AT_ONCE]),
                    (HOP_BY_HOP, "scratch", scratch_runs),
                    (AT_ONCE, "scratch", scratch_runs),
                ):
                    runs = runs_by_route[route]
                    seeds = [seed for seed in store.size.seeds if seed in runs and seed in reference_runs]
                    if seeds:
                        key = {"task": task, "kind": kind, "base": base, "method": method, "route": route}
                        difference = accuracy_difference(
                            labels, [runs[seed] for seed in seeds], [reference_runs[seed] for seed in seeds]
                        )
                        differences.append(key | {"against": against, **difference})
    return differences


def _runs_by_seed(rows: list[Row], method: str, route: str | None) -> dict[int, Row]:
    return {row["seed"]: row for row in select(rows, method=method, route=route)}


def summary_in_percent(summary: RouteSummary) -> Row:
    """Return the published summary of a route: recoveries in %, the loss per hop in points."""
    recoveries = [None if recovery is None else 100 * recovery for recovery in summary.recoveries]
    decay = None if summary.decay is None else 100 * summary.decay
    return dataclasses.asdict(summary) | {"recoveries": recoveries, "decay": decay}


def build_page(results: dict[str, Any]) -> Page:
    """Write one table of scores along the chain per task and kind, and draw the scores."""
    sections = []
    pictures = {}
    num_bases = len(results["bases"])
    head = [
        "",
        *results["bases"],
        "points lost a hop",
        "recovery % on the last",
        "points above scratch there [95 %]",
    ]
    for task, kind in distinct_keys(results["standings"], "task", "kind"):
        runs = select(results["runs"], task=task, kind=kind)
        rows = []
        series = {}
        for summary in select(results["standings"], task=task, kind=kind):
            label = summary["method"] + (f", {summary['route']}" if summary["route"] else "")
            scores_by_base = [_route_scores(runs, summary, base) for base in range(num_bases)]
            rows.append([label, *map(format_mean, scores_by_base), *_route_cells(results, summary)])
            series[label] = [
                (base, *mean_and_deviation(scores)) for base, scores in enumerate(scores_by_base) if scores
            ]
        all_step_runs = select(results["all steps"], task=task, kind=kind)
        all_step_scores = [[run["score"] for run in select(all_step_runs, base=base)] for base in range(num_bases)]
        rows.append([SCRATCH_ALL_STEPS, *map(format_mean, all_step_scores), MISSING, MISSING, MISSING])
        picture = f"chain-{task}-{kind}.svg"
        pictures[picture] = draw_lines(series, "number of the base", "accuracy on test", ticks=range(num_bases))
        sections.append(f"## {task}, {kind}\n\n{markdown_table(head, rows)}\n\n![Along the chain]({picture})")
    sections.append(
        f"`scratch` and `init+distill` tune for as many steps on each base, the few of a hop; {SCRATCH_ALL_STEPS}, is "
        "what M_0 was tuned with too. Hop by hop those of all hops add up."
    )
    findings = (*_judge_routes(results), _judge_decay(results["standings"]))
    return Page("\n\n".join(sections), pictures, findings)


def _route_cells(results: dict[str, Any], summary: Row) -> list[str]:
    """Write a route's loss per hop, and its recovery and difference from scratch on the last base."""
    differences = select(
        results["differences"],
        base=len(results["bases"]) - 1,
        against="scratch",
        **{name: summary[name] for name in ("task", "kind", "method", "route")},
    )
    recovery = summary["recoveries"][-1]
    return [
        MISSING if summary["decay"] is None else f"{summary['decay']:+.1f}",
        MISSING if recovery is None else f"{recovery:.0f}",
        format_difference(differences[0] if differences else None),
    ]


def _route_scores(runs: list[Row], summary: Row, base: int) -> list[float]:
    """Return the scores of a route on a base, one per seed.

    All routes but scratch start from the same tuning on M_0. The first hop of both routes of a method is the same run,
    whose `route` is None.
    """
    if base == 0:
        route_runs = [] if summary["method"] == "scratch" else select(runs, base=0)
    else:
        method_runs = select(runs, base=base, method=summary["method"])
        route_runs = [run for run in method_runs if run["route"] in (None, summary["route"])]
    return [run["score"] for run in route_runs if run["score"] is not None]


def _judge_routes(results: dict[str, Any]) -> list[Finding]:
    """Judge each route against scratch, and the routes against one another, on the last base."""
    last_base = len(results["bases"]) - 1
    differences = [row for row in select(results["differences"], base=last_base) if row["method"] != "direct"]
    findings = [
        judge_difference(
            f"After all hops, recycling {route} (`init+distill`) is better than tuning the last base from scratch with "
            "as many steps.",
            PART,
            select(differences, route=route, against="scratch"),
        )
        for route in (HOP_BY_HOP, AT_ONCE)
    ]
    claim = "Recycling hop by hop ends better than recycling at once."
    return [*findings, judge_difference(claim, PART, select(differences, against=AT_ONCE))]


def _judge_decay(summaries: list[Row]) -> Finding:
    """Judge whether `init+distill` loses less per hop than `direct`."""
    decays = []
    hop_summaries = [row for row in select(summaries, route=HOP_BY_HOP) if row["decay"] is not None]
    for direct in select(hop_summaries, method="direct"):
        for recycled in select(hop_summaries, method="init+distill", task=direct["task"], kind=direct["kind"]):
            decays.append((direct["decay"], recycled["decay"]))
    return judge_claim(
        "`init+distill`, hop by hop, loses less a hop than `direct` does.",
        PART,
        [recycled < direct for direct, recycled in decays],
        "; ".join(f"{direct:+.1f} and {recycled:+.1f} points a hop" for direct, recycled in decays),
    )


EXPERIMENT = Experiment(
    "7-chain",
    "7 · Along a chain of upgrades",
    "What was tuned on M_0 is carried to the last base: hop by hop, each from what was last recycled, or at once, "
    "always from M_0; by `direct` and by `init+distill`, against scratch on each base with as many steps.",
    Config,
    list_tunings,
    list_cells,
    collect_results,
    build_page,
)
