"""Experiment 1: how long outdated weights go on working while the base is pre-trained further."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import mean_sd, table

from findings.charts import lines
from findings.experiment import Cell, Experiment, Page, tell
from findings.settings import Settings, Tasks
from findings.store import Tuning
from regraft.diagnosis import compatibility, load_pair
from regraft.task import MIN_HEADROOM

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from findings.store import Store

FAR = 0.5
"""Of what tuning the new base gains above guessing, the share that outdated weights must reach to be far above it."""
SLOWLY = 10.0
"""Percent of what the old deployment has above guessing that may be lost a hop."""


class Config(Settings):
    """What is measured.

    Args:
        tasks: By kind of adaptation.
    """

    tasks: Tasks = Field(description="lists of tasks by kind of adaptation")


def places(config: Config) -> list[tuple[str, str]]:
    """Give each task and kind."""
    return [(task, kind) for kind, tasks in config.tasks.items() for task in tasks]


def tunings(config: Config, seeds: Sequence[int], bases: int) -> Iterable[Tuning]:
    """Give the tunings on every base of the chain."""
    return [Tuning(*place, base, seed) for place in places(config) for base in range(bases) for seed in seeds]


def cells(store: Store, config: Config) -> list[Cell]:
    """Give one for each adaptation of M_0."""
    bases = len(store.size.domains) + 1
    return [
        Cell(f"{task}-{kind}-seed{seed}", measure, (task, kind, seed, bases))
        for seed in store.size.seeds for task, kind in places(config)
    ]  # fmt: skip


def measure(store: Store, work: Path, task: str, kind: str, seed: int, bases: int) -> dict[str, Any]:
    """Put what was tuned on M_0 on every base that was kept, as it is."""
    kept = store.checkpoints()
    upgrade = store.upgrade(0, 1)
    with load_pair(upgrade, store.tuned(task, kind, 0, seed), store.task(task),
                   recipe=store.recipe(kind, seed, 0)) as pair:  # fmt: skip
        points = compatibility(pair, [folder for _, _, folder in kept])
    where = [(0, 0), *((hop, steps) for hop, steps, _ in kept)]
    rows = []
    for (hop, steps), point in zip(where, points, strict=True):
        figures = {name: getattr(point, name) for name in ("distance", "score", "loss", "agreement")}
        rows.append({"hop": hop, "steps": steps, **{name: round(value, 5) for name, value in figures.items()}})
    return {"points": rows}


def collect(store: Store, config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the scores of what was tuned on each base beside those of the outdated weights."""
    ends = {hop: steps for hop, steps, _ in store.checkpoints()} | {0: 0}
    runs = []
    for cell in found:
        task, kind, seed, _ = cell["arguments"]
        for base, steps in sorted(ends.items()):
            scores = store.outcome(task, kind, base, seed).scores
            outdated = next(point for point in cell["found"]["points"] if point["steps"] == steps)
            runs.append({
                "task": task, "kind": kind, "seed": seed, "base": base, "outdated": outdated["score"],
                "tuned": scores["test"], "majority": scores["test_majority"], "untuned": scores["dev_at_start"],
                "agreement": outdated["agreement"], "distance": outdated["distance"],
            })  # fmt: skip
    keys = ("task", "kind", "seed")
    points = [
        dict(zip(keys, cell["arguments"], strict=False)) | row for cell in found for row in cell["found"]["points"]
    ]
    return {"runs": runs, "points": points, "ends": [steps for _, steps in sorted(ends.items())]}


@dataclasses.dataclass(frozen=True)
class _Means:
    """One task and kind on one base, over seeds."""

    outdated: float
    tuned: float
    majority: float


def _means(runs: list[dict[str, Any]]) -> dict[tuple[str, str, int], _Means]:
    found = {}
    for place in dict.fromkeys((run["task"], run["kind"], run["base"]) for run in runs):
        mine = [run for run in runs if (run["task"], run["kind"], run["base"]) == place]
        found[place] = _Means(
            *(statistics.fmean(run[name] for run in mine) for name in ("outdated", "tuned", "majority"))
        )
    return found


def page(results: dict[str, Any]) -> Page:
    """Write the tables and the charts of scores over steps."""
    runs, points = results["runs"], results["points"]
    means = _means(runs)
    parts, pictures = [], {}
    bases = sorted({run["base"] for run in runs})
    for kind in dict.fromkeys(run["kind"] for run in runs):
        rows = []
        for task in dict.fromkeys(run["task"] for run in runs if run["kind"] == kind):
            for name in ("outdated", "tuned", "agreement"):
                mine = [[r[name] for r in runs if (r["task"], r["kind"], r["base"]) == (task, kind, b)] for b in bases]
                rows.append([task, LABELS[name], *(mean_sd(values) for values in mine)])
            of = [run for run in runs if (run["task"], run["kind"]) == (task, kind)]
            rows.append([task, "majority guess", *[f"{of[0]['majority']:.3f}"] * len(bases)])
            levels = [[r["untuned"] for r in of if r["base"] == base] for base in bases]
            rows.append([task, "an untrained head (dev)", *(mean_sd(values) for values in levels)])
        for what, label in (
            ("score", "accuracy on test"),
            ("agreement", "agreement with M_0's"),
        ):
            pictures[f"{what}-{kind}.svg"] = lines(
                _series(points, kind, what), "pre-training steps since M_0 (dotted: the end of a domain)", label,
                marks=results["ends"][1:],
            )  # fmt: skip
        parts.append(f"## {kind}\n\n" + table(["task", "", *(f"M_{base}" for base in bases)], rows))
        parts.append(f"![Score over steps](score-{kind}.svg)\n\n![Agreement over steps](agreement-{kind}.svg)")
    distances = [next((run["distance"] for run in runs if run["base"] == base), 0.0) for base in bases]
    parts.append("L2 distance from M_0: " + ", ".join(f"M_{b} {d:.1f}" for b, d in zip(bases, distances, strict=True)))
    return Page("\n\n".join(parts), pictures, _findings(means))


LABELS = {"outdated": "tuned on M_0, put on", "tuned": "tuned on", "agreement": "agreement with M_0's deployment"}


def _findings(means: dict[tuple[str, str, int], _Means]) -> tuple[Any, ...]:
    later = {place: one for place, one in means.items() if place[2]}
    shares = [(one.outdated - one.majority) / (one.tuned - one.majority) for one in later.values()
              if one.tuned - one.majority >= MIN_HEADROOM]  # fmt: skip
    median = f"median {100 * statistics.median(shares):.0f} % of that gain" if shares else ""
    gaps = [100 * (one.tuned - one.outdated) for one in later.values()]
    losses, falls = [], []
    for task, kind in dict.fromkeys(place[:2] for place in means):
        along = [one for place, one in sorted(means.items()) if place[:2] == (task, kind)]
        room, last = along[0].outdated - along[0].majority, along[-1].outdated
        if len(along) > 1 and room >= MIN_HEADROOM:
            losses.append(100 * (along[0].outdated - last) / room / (len(along) - 1))
            falls.append(last < along[0].outdated)
    lost = f"median {statistics.median(losses):.1f} % a hop, at most {max(losses):.1f} %" if losses else ""
    part = "1. compatibility; method `direct`"
    return (
        tell("Outdated weights score far above an untuned new base: they keep at least half of what tuning it gains "
             "above guessing.", part, [share >= FAR for share in shares], median),
        tell("Outdated weights score below a tuned new base.", part, [gap > 0 for gap in gaps],
             f"{statistics.fmean(gaps):.1f} points below on average" if gaps else ""),
        tell("The score of outdated weights falls as pre-training of the base goes on.", part, falls, lost),
        tell(f"It falls slowly: a hop costs outdated weights at most {SLOWLY:.0f} % of what they had above guessing.",
             part, [loss <= SLOWLY for loss in losses], lost),
    )  # fmt: skip


def _series(points: list[dict[str, Any]], kind: str, what: str) -> dict[str, list[tuple[float, float, float]]]:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for task in dict.fromkeys(point["task"] for point in points if point["kind"] == kind):
        mine = [point for point in points if (point["task"], point["kind"]) == (task, kind)]
        for steps in sorted({point["steps"] for point in mine}):
            values = [point[what] for point in mine if point["steps"] == steps]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            series.setdefault(task, []).append((steps, statistics.fmean(values), spread))
    return series


EXPERIMENT = Experiment(
    "1-compatibility",
    "1 · Compatibility of outdated weights",
    "What was tuned on M_0 is put on every later base as it is (`direct`). How much of its score is left, after how "
    "many steps of pre-training and how many hops?",
    Config, tunings, cells, collect, page,
)  # fmt: skip
