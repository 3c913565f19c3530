"""Experiment 2: are models tuned on different bases of the chain linearly connected?"""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import mean_sd, table

from findings.charts import lines
from findings.experiment import OURS, Cell, Experiment, Page, tell
from findings.settings import Number, Settings, Tasks
from findings.store import Tuning
from regraft.diagnosis import segment
from regraft.diagnosis.pair import load_counterpart

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from findings.store import Store


class Config(Settings):
    """What is measured.

    Args:
        tasks: By kind of adaptation.
        pairs: Numbers of two bases each, tuned with seeds of their own; a base twice stands for two seeds on it.
        one_seed: Pairs that are tuned with one seed too: from the same fresh head, on the data in the same order.
        points: Places on the line, ends included.
    """

    tasks: Tasks = Field(description="lists of tasks by kind of adaptation")
    pairs: tuple[tuple[Number, Number], ...] = Field(min_length=1, description="a list of pairs of bases")
    one_seed: tuple[tuple[Number, Number], ...] = Field(default=(), description="a list of pairs of bases")
    points: int = Field(default=11, ge=3, description="a whole number of points, 3 or more")


def ends(config: Config, seeds: Sequence[int]) -> list[tuple[Tuning, Tuning]]:
    """Give the tunings that lines run between."""
    following = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
    places = [(task, kind) for kind, tasks in config.tasks.items() for task in tasks]
    found = []
    for seed in seeds:
        for place in places:
            found += [
                (Tuning(*place, i, seed), Tuning(*place, j, following[seed] if i == j else seed))
                for i, j in config.pairs
            ]
            # a base's number is added to the seed of what is tuned on it
            found += [(Tuning(*place, i, seed), Tuning(*place, j, seed + i - j)) for i, j in config.one_seed]
    return found


def tunings(config: Config, seeds: Sequence[int], bases: int) -> Iterable[Tuning]:
    """Give the ends of all lines."""
    return [end for line in ends(config, seeds) for end in line]


def cells(store: Store, config: Config) -> list[Cell]:
    """Give one for each line."""
    found = []
    for first, second in ends(config, store.size.seeds):
        task, kind, i, seed = dataclasses.astuple(first)
        beside = "-one" if i != second.base and second.seed != seed else ""
        arguments = (task, kind, i, second.base, seed, second.seed, config.points)
        found.append(Cell(f"{task}-{kind}-M{i}-M{second.base}{beside}-seed{seed}", measure, arguments))
    return found


def measure(
    store: Store, work: Path, task: str, kind: str, i: int, j: int, seed: int, other: int, points: int
) -> dict[str, Any]:
    """Walk from what was tuned on M_i to what was tuned on M_j; of adapters the base is walked too."""
    data, bases = store.data(task), store.upgrade(i, j)
    recipe = store.recipe(kind, seed, i).resolve(len(data.train), 1.0)
    first = load_counterpart(store.tuned(task, kind, i, seed), bases.old, data)
    second = load_counterpart(store.tuned(task, kind, j, other), bases.new, data)
    line = segment(first, second, bases.old, data, points=points, precision=recipe.precision)
    return {
        "mu": list(line.mu),
        "loss": {split: [round(value, 5) for value in along] for split, along in line.loss.items()},
        "score": {split: [round(value, 5) for value in along] for split, along in line.score.items()},
        "barrier": {split: round(value, 5) for split, value in line.barrier.items()},
        "connected": line.connected,
    }


def collect(store: Store, config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Give each line with its pair and its hops."""
    keys = ("task", "kind", "first", "second", "seed", "other")
    runs = []
    for cell in found:
        run = dict(zip(keys, cell["arguments"], strict=False)) | cell["found"]
        hops, other = run["second"] - run["first"], run.pop("other")
        runs.append(run | {"hops": hops, "one_seed": bool(hops) and other != run["seed"]})
    return {"runs": runs}


def _where(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["task"], run["kind"], run["first"], run["second"], run["one_seed"]


def _line(run: dict[str, Any]) -> str:
    if not run["hops"]:
        return f"M_{run['first']}, two seeds"
    return f"M_{run['first']} → M_{run['second']}" + (", one seed" if run["one_seed"] else "")


def _dip(run: dict[str, Any]) -> float:
    """How many points the score on test falls below the lower end, at its lowest."""
    scores = run["score"]["test"]
    return 100 * float(min(scores) - min(scores[0], scores[-1]))


def page(results: dict[str, Any]) -> Page:
    """Write a table of barriers, and draw the lines and the barriers over hops."""
    runs, parts, pictures = results["runs"], [], {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        mine, rows = [run for run in runs if run["kind"] == kind], []
        for place in dict.fromkeys(map(_where, mine)):
            of = [run for run in mine if _where(run) == place]
            ends = [[run["score"]["test"][at] for run in of] for at in (0, -1)]
            lowest = [_dip(run) for run in of]
            rows.append([
                place[0], _line(of[0]),
                *(mean_sd([run["barrier"][split] for run in of]) for split in ("dev", "test")),
                f"{sum(run['connected'] for run in of)} of {len(of)}", *map(mean_sd, ends), mean_sd(lowest, 1),
            ])  # fmt: skip
        head = ["task", "line", "barrier (dev)", "barrier (test)", "connected", "score at μ = 0", "at μ = 1",
                "lowest against the lower end, points"]  # fmt: skip
        pictures[f"barrier-{kind}.svg"] = lines(
            _barriers(mine), "hops between the bases (0: two seeds on one)", "barrier on test (nats)",
            ticks=sorted({run["hops"] for run in mine}), score=False,
        )  # fmt: skip
        pictures[f"lines-{kind}.svg"] = lines(_losses(mine), "μ", "mean loss on test (nats)", score=False)
        parts.append(f"## {kind}\n\nBarriers in nats, means ± deviations over seeds.\n\n" + table(head, rows))
        parts.append(f"![Barrier over hops](barrier-{kind}.svg)\n\n![Loss along the lines](lines-{kind}.svg)")
    return Page("\n\n".join(parts), pictures, tuple(_findings(runs)))


def _spread(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _barriers(runs: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    series = {}
    for task, shared in dict.fromkeys((run["task"], run["one_seed"]) for run in runs):
        mine = [run for run in runs if (run["task"], run["one_seed"]) == (task, shared)]
        series[task + (", one seed" if shared else "")] = [
            (hops, *_spread([run["barrier"]["test"] for run in mine if run["hops"] == hops]))
            for hops in sorted({run["hops"] for run in mine})
        ]
    return series


def _losses(runs: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    series = {}
    for hops, shared in sorted({(run["hops"], run["one_seed"]) for run in runs}):
        mine = [run for run in runs if (run["hops"], run["one_seed"]) == (hops, shared)]
        along = zip(*(run["loss"]["test"] for run in mine), strict=True)
        series[_hops(hops) + (", one seed" if shared else "")] = [
            (mu, statistics.fmean(values), 0.0) for mu, values in zip(mine[0]["mu"], along, strict=True)
        ]
    return series


def _hops(count: int) -> str:
    return "two seeds" if not count else "1 hop" if count == 1 else f"{count} hops"


def _findings(runs: list[dict[str, Any]]) -> Iterable[Any]:
    part = "2. mode connectivity"
    for kind in dict.fromkeys(run["kind"] for run in runs):
        for shared in (True, False):
            how = f"{kind}; the same fresh head and order of data" if shared else f"{kind}; a head of its own each"
            for name, wanted in (("consecutive", range(1, 2)), ("distant", range(2, 100))):
                mine = [r for r in runs if (r["kind"], r["one_seed"]) == (kind, shared) and r["hops"] in wanted]
                if not mine:
                    continue
                heights = [run["barrier"]["test"] for run in mine]
                dips = [_dip(run) for run in mine]
                figure = (
                    f"mean barrier {statistics.fmean(heights):.3f} nats on test, highest {max(heights):.3f}; at its "
                    f"lowest the score is {statistics.fmean(dips):+.1f} points from the lower end"
                )
                yield tell(f"Models tuned on {name} bases ({how}) are linearly connected: no barrier of loss.",
                           part if shared else part + OURS, [run["connected"] for run in mine], figure)  # fmt: skip
        grows = []
        for task in dict.fromkeys(run["task"] for run in runs if run["kind"] == kind):
            mine = [r for r in runs if (r["task"], r["kind"]) == (task, kind) and r["hops"] and not r["one_seed"]]
            points = _barriers(mine).get(task, [])
            if len(points) > 1:
                grows.append((points[0][1], points[-1][1]))
        if grows:
            first, last = (statistics.fmean(values) for values in zip(*grows, strict=True))
            yield tell(f"The farther apart the bases, the higher the barrier ({kind}).", part + OURS,
                       [high > low for low, high in grows],
                       f"{first:.3f} nats after the fewest hops, {last:.3f} after the most")  # fmt: skip


EXPERIMENT = Experiment(
    "2-connectivity",
    "2 · Linear connectivity",
    "The straight line between what was tuned on M_i and on M_j for the same task, on dev and test: does the loss rise "
    "in between, and does the barrier grow with the hops? The ends are tuned with seeds of their own, or with one: "
    "from the same fresh head, on the data in the same order. Two seeds on one base are the control.",
    Config, tunings, cells, collect, page,
)  # fmt: skip
