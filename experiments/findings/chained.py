"""Experiment 7: along the whole chain, hop by hop and at once."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import mean_sd, select, table

from findings.charts import lines
from findings.experiment import OURS, Cell, Experiment, Finding, Page, tell, tell_difference
from findings.runs import compare, points
from findings.settings import Settings, Tasks
from findings.store import Tuning, figures_of
from regraft import load_outcome
from regraft.chain import Chain, ChainRow, run_chain, summarise_routes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from findings.store import Store
    from regraft.chain import RouteSummary

HOPS, ONCE = "hop by hop", "at once"
WHOLE = "scratch, all steps"


class Config(Settings):
    """What is run.

    Args:
        tasks: By kind of adaptation.
        methods: What carries them; scratch is always run.
    """

    tasks: Tasks = Field(description="lists of tasks by kind of adaptation")
    methods: tuple[str, ...] = Field(default=("direct", "init+distill"), description="a list of methods")


def tunings(config: Config, seeds: Sequence[int], bases: int) -> Iterable[Tuning]:
    """Give scratch with all steps on each later base; a chain tunes its first itself, by the same recipe."""
    return [
        Tuning(task, kind, base, seed)
        for kind, tasks in config.tasks.items() for task in tasks for base in range(1, bases) for seed in seeds
    ]  # fmt: skip


def cells(store: Store, config: Config) -> list[Cell]:
    """Give a chain for each task, kind and seed."""
    bases = len(store.size.domains) + 1
    return [
        Cell(f"{task}-{kind}-seed{seed}", measure, (task, kind, seed, list(config.methods), bases))
        for seed in store.size.seeds for kind, tasks in config.tasks.items() for task in tasks
    ]  # fmt: skip


def measure(
    store: Store, work: Path, task: str, kind: str, seed: int, methods: list[str], bases: int
) -> dict[str, Any]:
    """Carry an adaptation of M_0 along the chain, and keep what it predicts on each base."""
    chain = Chain(
        bases=tuple(store.base(number) for number in range(bases)), tasks=(str(store.task_file(task)),), kinds=(kind,),
        methods=tuple(methods), routes=(HOPS, ONCE), seeds=(seed,), tuning=store.size.tuning[kind],
        recycling=store.size.few_shot[kind], precision=store.size.precision,
    )  # fmt: skip
    rows = []
    for row in run_chain(chain, work):
        figures = dataclasses.asdict(row) | {"task": task}
        if row.refused is None:
            figures["predictions"] = figures_of(load_outcome(work / row.outcome))["predictions"]
        rows.append(figures)
    return {"rows": rows, "labels": store.data(task, seed).test.labels.tolist()}


def collect(store: Store, config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Average over seeds, and compare the routes and scratch on the last base."""
    rows = [row for cell in found for row in cell["found"]["rows"]]
    plain = [{name: value for name, value in row.items() if name not in ("predictions", "outcome")} for row in rows]
    known = {field.name for field in dataclasses.fields(ChainRow)}
    chained = [ChainRow(**{name: value for name, value in row.items() if name in known}) for row in rows]
    names = [f"M_{number}" for number in range(len(store.size.domains) + 1)]
    differences = []
    for task, kind in dict.fromkeys((row["task"], row["kind"]) for row in rows):
        labels = next(cell["found"]["labels"] for cell in found if cell["arguments"][:2] == [task, kind])
        mine = [row for row in rows if (row["task"], row["kind"]) == (task, kind) and "predictions" in row]
        for number in range(2, len(names)):
            on = [row for row in mine if row["base"] == number]
            for method in config.methods:
                for one, other in (((method, HOPS), (method, ONCE)), ((method, HOPS), ("scratch", None)),
                                   ((method, ONCE), ("scratch", None))):  # fmt: skip
                    pair = [_by_seed(on, *side) for side in (one, other)]
                    seeds = [seed for seed in store.size.seeds if all(seed in side for side in pair)]
                    if seeds:
                        gap = compare(labels, *([side[seed] for seed in seeds] for side in pair))
                        where = {"task": task, "kind": kind, "base": number, "method": method, "route": one[1]}
                        differences.append(where | {"against": other[1] or other[0], **gap})
    whole = [
        dataclasses.asdict(one) | {"score": figures_of(store.outcome(one.task, one.kind, one.base, one.seed))["test"]}
        for one in tunings(config, store.size.seeds, len(names)) if store.has(one.task, one.kind, one.base, one.seed)
    ]  # fmt: skip
    return {
        "bases": names,
        "runs": plain,
        "all steps": whole,
        "standings": [in_percent(one) for one in summarise_routes(names, chained)],
        "differences": differences,
    }


def in_percent(standing: RouteSummary) -> dict[str, Any]:
    """Give a standing as it is published: recoveries in %, the loss a hop in points."""
    recoveries = [None if share is None else 100 * share for share in standing.recoveries]
    decay = None if standing.decay is None else 100 * standing.decay
    return dataclasses.asdict(standing) | {"recoveries": recoveries, "decay": decay}


def _by_seed(rows: list[dict[str, Any]], method: str, route: str | None) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in rows if (row["method"], row["route"]) == (method, route)}


def page(results: dict[str, Any]) -> Page:
    """Write a table of scores along the chain, and draw them."""
    parts, pictures = [], {}
    last = len(results["bases"]) - 1
    for task, kind in dict.fromkeys((one["task"], one["kind"]) for one in results["standings"]):
        rows, series = [], {}
        for one in [s for s in results["standings"] if (s["task"], s["kind"]) == (task, kind)]:
            name = one["method"] + (f", {one['route']}" if one["route"] else "")
            scores = [
                [run["score"] for run in results["runs"] if _is_of(run, one, number)] for number in range(last + 1)
            ]
            loss = "–" if one["decay"] is None else f"{one['decay']:+.1f}"
            recovered = one["recoveries"][-1]
            of = {name: one[name] for name in ("task", "kind", "method", "route")}
            gaps = select(results["differences"], base=last, against="scratch", **of)
            share = "–" if recovered is None else f"{recovered:.0f}"
            rows.append([name, *map(mean_sd, scores), loss, share, points(gaps[0] if gaps else None)])
            series[name] = [(number, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
                            for number, values in enumerate(scores) if values]  # fmt: skip
        whole = [
            [run["score"] for run in select(results["all steps"], task=task, kind=kind, base=number)]
            for number in range(last + 1)
        ]
        rows.append([WHOLE, *map(mean_sd, whole), "–", "–", "–"])
        head = [
            "",
            *results["bases"],
            "points lost a hop",
            "recovery % on the last",
            "points above scratch there [95 %]",
        ]
        name = f"chain-{task}-{kind}.svg"
        pictures[name] = lines(series, "number of the base", "accuracy on test", ticks=range(last + 1))
        parts.append(f"## {task}, {kind}\n\n" + table(head, rows) + f"\n\n![Along the chain]({name})")
    parts.append(
        f"`scratch` and `init+distill` tune for as many steps on each base, the few of a hop; {WHOLE}, is what M_0 was "
        "tuned with too. Hop by hop those of all hops add up."
    )
    return Page("\n\n".join(parts), pictures, _findings(results))


def _is_of(run: dict[str, Any], one: dict[str, Any], number: int) -> bool:
    """Whether a run belongs to a line of the table: the first hop is the same by both routes."""
    if (run["task"], run["kind"], run["base"]) != (one["task"], one["kind"], number) or run["score"] is None:
        return False
    if number == 0:
        return one["method"] != "scratch"
    return run["method"] == one["method"] and run["route"] in (None, one["route"])


def _findings(results: dict[str, Any]) -> tuple[Finding, ...]:
    last, part = len(results["bases"]) - 1, "upgrade chains" + OURS
    found = []
    tuned = [row for row in results["differences"] if row["base"] == last and row["method"] != "direct"]
    for route in (HOPS, ONCE):
        rows = [row for row in tuned if (row["route"], row["against"]) == (route, "scratch")]
        found.append(tell_difference(f"After all hops, recycling {route} (`init+distill`) is better than tuning "
                                     "the last base from scratch with as many steps.", part, rows))  # fmt: skip
    rows = [row for row in tuned if row["against"] == ONCE]
    found.append(tell_difference("Recycling hop by hop ends better than recycling at once.", part, rows))
    decays = [
        (one["decay"], other["decay"])
        for one in results["standings"] for other in results["standings"]
        if (one["task"], one["kind"]) == (other["task"], other["kind"]) and one["method"] == "direct"
        and other["method"] == "init+distill" and one["route"] == other["route"] == HOPS
        and one["decay"] is not None and other["decay"] is not None
    ]  # fmt: skip
    figure = "; ".join(f"{direct:+.1f} and {recycled:+.1f} points a hop" for direct, recycled in decays)
    found.append(tell("`init+distill`, hop by hop, loses less a hop than `direct` does.", part,
                      [recycled < direct for direct, recycled in decays], figure))  # fmt: skip
    return tuple(found)


EXPERIMENT = Experiment(
    "7-chain",
    "7 · Along a chain of upgrades",
    "What was tuned on M_0 is carried to the last base: hop by hop, each from what was last recycled, or at once, "
    "always from M_0; by `direct` and by `init+distill`, against scratch on each base with as many steps.",
    Config, tunings, cells, collect, page,
)  # fmt: skip
