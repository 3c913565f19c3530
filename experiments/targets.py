"""What the methods were meant to reach, held against what was measured."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

ENOUGH = 3.0
"""Points that the best method without training shall be above direct on a heavy upgrade."""


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
    first, *others = [regime["name"] for regime in results["made"]["regimes"]]
    heavy = list(results["upgrades"])[-1]
    runs = [run for run in results["runs"] if run["regime"] == first]
    differences = [row for row in results["differences"] if row["regime"] == first]
    few = [run for run in results["runs"] if run["regime"] in others]
    tuned = [name for name, about in results["methods"].items() if "training" in about["needs"]]
    tuned = [name for name in tuned if name not in ("scratch", "auto")]
    found = [_free(differences, heavy), _speed(runs, tuned), _few(few, tuned), _auto(runs)]
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


def _auto(runs: list[dict[str, Any]]) -> Target | None:
    cells: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        cell = cells.setdefault((run["task"], run["upgrade"], run["kind"]), {})
        cell.setdefault(run["entry"], []).append(run)
    behind, costs = [], []
    for cell in cells.values():
        if "auto" in cell and len(cell) > 1:
            scores = {name: statistics.fmean(run["test"] for run in several) for name, several in cell.items()}
            behind.append(100 * (max(score for name, score in scores.items() if name != "auto") - scores["auto"]))
            costs.append(statistics.fmean(run["steps_share"] for run in cell["auto"]))
    if not behind:
        return None
    good = sum(gap <= 1 and cost <= 50 for gap, cost in zip(behind, costs, strict=True))
    return Target(
        "auto is within 1 point of the best method at no more than half of scratch's steps, in every cell",
        good == len(behind),
        f"in {good} of {len(behind)} cells; median {statistics.median(behind):.1f} points behind the best at "
        f"{statistics.median(costs):.0f} % of the steps",
    )
