"""What the methods were meant to reach, held against what was measured."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

ENOUGH = 3.0
"""Points that the best method without training is to be above direct on a heavy upgrade."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A target.

    Args:
        what: What was wanted.
        reached: Whether it was.
        found: The measured figure, in words.
    """

    what: str
    reached: bool
    found: str


def targets(results: dict[str, Any]) -> list[Target]:
    """Judge every target that there are runs for.

    Args:
        results: From `figures.collect`.

    Returns:
        The targets.
    """
    first, *others = results["made"]["regimes"]
    all_labels = [regime["name"] for regime in others if regime["shots"] is None]
    heavy = list(results["upgrades"])[-1]
    tuned = [name for name, about in results["methods"].items() if "training" in about["needs"]]
    autos = [name for name, about in results["methods"].items() if about["method"] == "auto"]
    tuned = [name for name in tuned if name not in ("scratch", *autos)]

    def of(name: str, regimes: list[str]) -> list[dict[str, Any]]:
        return [row for row in results[name] if row["regime"] in regimes]

    whole = [first["name"]]
    found = [
        _free(of("differences", whole), heavy),
        _speed(of("runs", all_labels or whole), tuned),
        _few(of("runs", [regime["name"] for regime in others if regime["shots"] is not None]), tuned),
        _end(of("differences", whole), of("runs", whole), tuned),
        *(_auto(name, of("runs", whole + all_labels), autos) for name in autos),
    ]
    return [target for target in found if target]


def _free(differences: list[dict[str, Any]], heavy: str) -> Target | None:
    rows = [row for row in differences if row["against"] == "direct"]
    gains = {
        entry: 100
        * statistics.fmean(row["estimate"] for row in rows if (row["entry"], row["upgrade"]) == (entry, heavy))
        for entry in dict.fromkeys(row["entry"] for row in rows if row["upgrade"] == heavy)
    }
    if not gains:
        return None
    best = max(gains, key=lambda entry: gains[entry])
    mine = [row for row in rows if row["entry"] == best]
    worse = sum(row["high"] < 0 for row in mine)
    return Target(
        f"the best method without training is nowhere worse than direct and {ENOUGH:.0f} points better on {heavy}",
        gains[best] >= ENOUGH and not worse,
        f"{best}: {gains[best]:+.1f} points on {heavy}, worse in {worse} of {len(mine)} cells",
    )


def _speed(runs: list[dict[str, Any]], tuned: list[str]) -> Target | None:
    medians = {
        name: statistics.median(shares)
        for name in tuned
        if (shares := [_share(run) for run in runs if run["entry"] == name])
    }
    if not medians:
        return None
    best = min(medians, key=lambda name: medians[name])
    return Target(
        "the best tuned method reaches scratch's last dev score in 25 % of its steps (median)",
        medians[best] <= 25,
        f"{best}: {medians[best]:.0f} %",
    )


def _share(run: dict[str, Any]) -> float:
    return float("inf") if run["share"] is None else run["share"]


def _few(runs: list[dict[str, Any]], tuned: list[str]) -> Target | None:
    medians = {
        name: statistics.median(recoveries)
        for name in tuned
        if (recoveries := [run["recovery"] for run in runs if run["entry"] == name and run["recovery"] is not None])
    }
    if not medians:
        return None
    best = max(medians, key=lambda name: medians[name])
    return Target(
        "with few labels the best tuned method recovers 95 % (median)",
        medians[best] >= 95,
        f"{best}: {medians[best]:.0f} %",
    )


def _end(differences: list[dict[str, Any]], runs: list[dict[str, Any]], tuned: list[str]) -> Target | None:
    below = {
        name: sum(row["high"] < 0 for row in mine)
        for name in tuned
        if (mine := [row for row in differences if row["entry"] == name])
    }
    if not below:
        return None
    best = min(below, key=lambda name: below[name])
    cells = sum(row["entry"] == best for row in differences)
    direct = {_where(run): run["start"] for run in runs if run["entry"] == "direct"}
    starts = [run["start"] - direct[_where(run)] for run in runs if run["entry"] == best and _where(run) in direct]
    return Target(
        "a tuned method ends nowhere significantly below scratch with the same steps, and starts nowhere below direct",
        not below[best] and min(starts, default=0.0) >= 0,
        f"{best}: below scratch in {below[best]} of {cells} cells, below direct at the start in "
        f"{sum(gap < 0 for gap in starts)} of {len(starts)} runs",
    )


def _where(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("task", "upgrade", "kind", "seed"))


def _auto(name: str, runs: list[dict[str, Any]], autos: list[str]) -> Target | None:
    cells: dict[tuple[str, ...], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for run in runs:
        cell = cells.setdefault((run["task"], run["upgrade"], run["kind"]), {})
        cell.setdefault((run["entry"], run["regime"]), []).append(run)
    behind, costs = [], []
    for cell in cells.values():
        scores = {entry: statistics.fmean(run["test"] for run in several) for entry, several in cell.items()}
        mine = [entry for entry in scores if entry[0] == name]
        others = [score for entry, score in scores.items() if entry[0] not in autos]
        if mine and others:
            behind.append(100 * (max(others) - scores[mine[0]]))
            costs.append(statistics.fmean(run["steps_share"] for run in cell[mine[0]]))
    if not behind:
        return None
    good = sum(gap <= 1 and cost <= 50 for gap, cost in zip(behind, costs, strict=True))
    return Target(
        f"{name} is within 1 point of the best method at no more than half of scratch's steps, in every cell",
        good == len(behind),
        f"in {good} of {len(behind)} cells; median {statistics.median(behind):.1f} points behind the best at "
        f"{statistics.median(costs):.0f} % of the steps",
    )
