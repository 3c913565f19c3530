"""Targets of the methods, and whether the measured figures reach them."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from tables import CELL_KEYS, distinct_keys, distinct_values, median_steps_share, select

if TYPE_CHECKING:
    from collections.abc import Collection

    from tables import Row

# The thresholds of the targets are arbitrary: round numbers without a source. Some of the targets are not reached.
MIN_GAIN = 3.0
"""Points by which the best method without training is above direct on the heavy upgrade."""
MAX_STEPS_SHARE = 25
"""The % of scratch's steps in which the best tuned method reaches scratch's last dev score."""
MIN_RECOVERY = 95
"""The % that the best tuned method recovers with few labels."""
MAX_AUTO_GAP = 1
"""Points by which `auto` may be below the best method of a cell."""
MAX_AUTO_STEPS_SHARE = 50
"""The % of scratch's steps that `auto` may take; the target's description says "half"."""
RUN_KEYS = (*CELL_KEYS, "seed")
"""The keys of a row that identify its run among the runs of a method in a regime."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A target and its outcome.

    Args:
        description: The target, as a clause.
        is_reached: Whether a method reaches it.
        measured: The best method and its figures, in words.
    """

    description: str
    is_reached: bool
    measured: str


def judge_targets(results: dict[str, Any]) -> list[Target]:
    """Judge every target for which there are runs.

    Args:
        results: The content of `results.json`, as `figures.collect_results` returns it.

    Returns:
        The judged targets, in the order of the page.
    """
    reference, *tuning_regimes = results["made"]["regimes"]
    reference_name = reference["name"]
    all_label_names = [regime["name"] for regime in tuning_regimes if regime["shots"] is None]
    few_label_names = [regime["name"] for regime in tuning_regimes if regime["shots"] is not None]
    heavy_upgrade = list(results["upgrades"])[-1]
    autos = [name for name, method in results["methods"].items() if method["method"] == "auto"]
    tuned_methods = [
        name
        for name, method in results["methods"].items()
        if "training" in method["needs"] and name not in ("scratch", *autos)
    ]

    def runs_in(regimes: Collection[str]) -> list[Row]:
        return [run for run in results["runs"] if run["regime"] in regimes]

    differences = select(results["differences"], regime=reference_name)
    targets = [
        _judge_training_free(differences, heavy_upgrade),
        _judge_speed(runs_in(all_label_names or [reference_name]), tuned_methods),
        _judge_few_labels(runs_in(few_label_names), tuned_methods),
        _judge_final_score(differences, runs_in([reference_name]), tuned_methods),
        *(_judge_auto(name, runs_in([reference_name, *all_label_names]), autos) for name in autos),
    ]
    return [target for target in targets if target]


def _judge_training_free(differences: list[Row], heavy_upgrade: str) -> Target | None:
    """Judge the method without training that gains most over direct on the heavy upgrade; None without runs."""
    rows = select(differences, against="direct")
    heavy_rows = select(rows, upgrade=heavy_upgrade)
    gains = {
        entry: 100 * statistics.fmean(row["estimate"] for row in select(heavy_rows, entry=entry))
        for entry in distinct_values(heavy_rows, "entry")
    }
    if not gains:
        return None
    best = max(gains, key=lambda entry: gains[entry])
    best_rows = select(rows, entry=best)
    num_losses = sum(row["high"] < 0 for row in best_rows)
    return Target(
        "the best method without training is nowhere worse than direct and "
        f"{MIN_GAIN:.0f} points better on {heavy_upgrade}",
        gains[best] >= MIN_GAIN and not num_losses,
        f"{best}: {gains[best]:+.1f} points on {heavy_upgrade}, worse in {num_losses} of {len(best_rows)} cells",
    )


def _judge_speed(runs: list[Row], tuned_methods: list[str]) -> Target | None:
    """Judge the tuned method that reaches scratch's last dev score in the fewest steps; None without runs."""
    medians = {}
    for name in tuned_methods:
        method_runs = select(runs, entry=name)
        if method_runs:
            medians[name] = median_steps_share(method_runs)
    if not medians:
        return None
    best = min(medians, key=lambda name: medians[name])
    return Target(
        f"the best tuned method reaches scratch's last dev score in {MAX_STEPS_SHARE} % of its steps (median)",
        medians[best] <= MAX_STEPS_SHARE,
        f"{best}: {medians[best]:.0f} %",
    )


def _judge_few_labels(runs: list[Row], tuned_methods: list[str]) -> Target | None:
    """Judge the tuned method with the highest median recovery; None without runs that have a recovery."""
    medians = {}
    for name in tuned_methods:
        recoveries = [run["recovery"] for run in select(runs, entry=name) if run["recovery"] is not None]
        if recoveries:
            medians[name] = statistics.median(recoveries)
    if not medians:
        return None
    best = max(medians, key=lambda name: medians[name])
    return Target(
        f"with few labels the best tuned method recovers {MIN_RECOVERY} % (median)",
        medians[best] >= MIN_RECOVERY,
        f"{best}: {medians[best]:.0f} %",
    )


def _judge_final_score(differences: list[Row], runs: list[Row], tuned_methods: list[str]) -> Target | None:
    """Judge the tuned method that is significantly below scratch in the fewest cells; None without runs."""
    num_losses = {}
    for name in tuned_methods:
        method_differences = select(differences, entry=name)
        if method_differences:
            num_losses[name] = sum(row["high"] < 0 for row in method_differences)
    if not num_losses:
        return None
    best = min(num_losses, key=lambda name: num_losses[name])
    num_cells = len(select(differences, entry=best))
    direct_starts = {_run_key(run): run["start"] for run in select(runs, entry="direct")}
    start_gaps = [
        run["start"] - direct_starts[_run_key(run)]
        for run in select(runs, entry=best)
        if _run_key(run) in direct_starts
    ]
    return Target(
        "a tuned method ends nowhere significantly below scratch with the same steps, and starts nowhere below direct",
        not num_losses[best] and min(start_gaps, default=0.0) >= 0,
        f"{best}: below scratch in {num_losses[best]} of {num_cells} cells, below direct at the start in "
        f"{sum(gap < 0 for gap in start_gaps)} of {len(start_gaps)} runs",
    )


def _run_key(run: Row) -> tuple[Any, ...]:
    return tuple(run[name] for name in RUN_KEYS)


def _judge_auto(name: str, runs: list[Row], autos: list[str]) -> Target | None:
    """Judge an entry of `auto` against the best other method of each cell; None without runs."""
    gaps, costs = [], []
    for task, upgrade, kind in distinct_keys(runs, *CELL_KEYS):
        cell_runs = select(runs, task=task, upgrade=upgrade, kind=kind)
        scores = {
            (entry, regime): statistics.fmean(run["test"] for run in select(cell_runs, entry=entry, regime=regime))
            for entry, regime in distinct_keys(cell_runs, "entry", "regime")
        }
        auto_keys = [key for key in scores if key[0] == name]
        manual_scores = [score for (entry, _), score in scores.items() if entry not in autos]
        if auto_keys and manual_scores:
            entry, regime = auto_keys[0]
            gaps.append(100 * (max(manual_scores) - scores[entry, regime]))
            auto_runs = select(cell_runs, entry=entry, regime=regime)
            costs.append(statistics.fmean(run["steps_share"] for run in auto_runs))
    if not gaps:
        return None
    num_successes = sum(
        gap <= MAX_AUTO_GAP and cost <= MAX_AUTO_STEPS_SHARE for gap, cost in zip(gaps, costs, strict=True)
    )
    return Target(
        f"{name} is within {MAX_AUTO_GAP} point of the best method at no more than half of scratch's steps, in every "
        "cell",
        num_successes == len(gaps),
        f"in {num_successes} of {len(gaps)} cells; median {statistics.median(gaps):.1f} points behind the best at "
        f"{statistics.median(costs):.0f} % of the steps",
    )
