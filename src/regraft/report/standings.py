"""Puts outcomes together: by task and setting, over seeds, held against scratch and the old deployment."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.report.wording import base_name
from regraft.task import count_flips, recovery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.report.find import Found, Runs


@dataclasses.dataclass(frozen=True)
class Standing:
    """One method, over its seeds.

    Args:
        method: Its name.
        seeds: The seeds.
        start: The score on dev before the first step.
        dev: The best score on dev.
        test: The score on the setting's split.
        deviation: Its standard deviation over seeds, None for one seed.
        recovery: (score − majority) / (scratch's score − majority) in %.
        steps_to_scratch: Steps until dev first reached scratch's last score; None if a seed never did.
        negative_flips: The share of examples the old deployment had right and this has wrong.
        labels: Labelled training examples that were seen.
        steps: Steps of the whole training.
        seconds: Seconds of it.
        curve: Step and mean score on dev.
    """

    method: str
    seeds: tuple[int, ...]
    start: float | None
    dev: float | None
    test: float | None
    deviation: float | None
    recovery: float | None
    steps_to_scratch: float | None
    negative_flips: float | None
    labels: float
    steps: float
    seconds: float
    curve: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Standings that may be compared: one task, base, kind and amount of training data.

    Args:
        about: What they have in common.
        metric: The task's.
        split: What the scores are measured on.
        standings: Scratch first, then the best.
        level: Scratch's last score on dev, None without scratch.
        old: The old deployment's score, if it is known.
        floor: The score of a majority guess.
        outcomes: The outcomes they come from.
    """

    about: str
    metric: str
    split: str
    standings: tuple[Standing, ...]
    level: float | None
    old: float | None
    floor: float | None
    outcomes: tuple[Found, ...]


def settings_by_task(runs: Runs) -> dict[str, list[Setting]]:
    """Group outcomes.

    Args:
        runs: What was found.

    Returns:
        By task the settings, those with most outcomes first.
    """
    groups: dict[tuple[Any, ...], list[Found]] = defaultdict(list)
    for found in runs.outcomes:
        record = found.record
        task = record["task"]
        groups[task["name"], task["metric"], record["base"]["fingerprint"], record["kind"], task["train"]].append(found)
    settings: dict[str, list[Setting]] = defaultdict(list)
    for (task, *_), group in sorted(groups.items(), key=lambda entry: -len(entry[1])):
        settings[task].append(_setting(group, runs))
    for folder, comparison in runs.comparisons.items():
        if not any(folder in found.path.parents for found in runs.outcomes):
            settings[comparison["task"]].append(_stored(comparison))
    return dict(settings)


def _setting(group: list[Found], runs: Runs) -> Setting:
    record = group[0].record
    split = "test" if all(found.record["scores"].get("test") is not None for found in group) else "dev"
    scratch = {found.record["seed"]: found for found in group if found.record["method"] == "scratch"}
    comparison = next((c for f, c in runs.comparisons.items() if f in group[0].path.parents), None)
    told = {row["method"]: row["negative_flips"] for row in comparison["rows"]} if comparison else {}
    by_method: dict[str, list[Found]] = defaultdict(list)
    for found in group:
        by_method[found.record["method"]].append(found)
    before = {found.path: _old_deployment(found, runs.outcomes) for found in group}
    standings = []
    for method, several in by_method.items():
        figures = [_figures(found, scratch.get(found.record["seed"]), before[found.path], split) for found in several]
        seeds = tuple(found.record["seed"] for found in several)
        tests = [one["test"] for one in figures if one["test"] is not None]
        mean = {name: _mean([one[name] for one in figures]) for name in figures[0]}
        if mean["negative_flips"] is None:
            mean["negative_flips"] = told.get(method)
        deviation = statistics.stdev(tests) if len(tests) == len(figures) > 1 else None
        standings.append(Standing(method, seeds, deviation=deviation, curve=_curve(several), **mean))
    known = [_score(old, split) for old in before.values() if old]
    old = comparison["old"] if comparison and comparison["split"] == split else _mean(known) if known else None
    return Setting(
        about=f"{record['kind']} on {base_name(record['base']['name'])}, {record['task']['train']:,} training examples",
        metric=record["task"]["metric"],
        split=split,
        standings=_ordered(standings),
        level=_mean([found.curve[-1]["score"] for found in scratch.values()]) if scratch else None,
        old=old,
        floor=_mean([found.record["scores"].get(f"{split}_majority") for found in group]),
        outcomes=tuple(group),
    )


def _figures(found: Found, scratch: Found | None, old: Found | None, split: str) -> dict[str, float | None]:
    scores, cost = found.record["scores"], found.record["cost"]
    share = steps = None
    floor, value = scores.get(f"{split}_majority"), scores.get(split)
    if scratch:
        reference = scratch.record["scores"].get(split)
        if None not in (reference, floor, value):
            share = recovery(value, floor, reference)
        target = scratch.curve[-1]["score"]
        steps = next((point["step"] for point in found.curve if point["score"] >= target), None)
    return {
        "start": scores.get("dev_at_start"),
        "dev": max(point["score"] for point in found.curve) if scores.get("dev") is not None else None,
        "test": value,
        "recovery": share,
        "steps_to_scratch": steps,
        "negative_flips": _negative_flips(old, found, split) if old else None,
        "labels": cost["labels"],
        "steps": cost["steps"],
        "seconds": cost["seconds"],
    }


def _old_deployment(found: Found, outcomes: Sequence[Found]) -> Found | None:
    """Find the outcome, if it is among them, that an adaptation was recycled from."""
    source = found.record.get("recycled_from")
    if not source:
        return None
    place = Path(source["adaptation"]).resolve()
    for other in outcomes:
        right_base = other.record["base"]["fingerprint"] == source["old_base_fingerprint"]
        if right_base and place in (other.path.resolve(), other.path.resolve() / "adaptation"):
            return other
    return None


def _negative_flips(old: Found, new: Found, split: str) -> float | None:
    rows = [key for key in new.right if key[0] == split]
    if not rows or any(old.right.get(key) is None or new.right[key] is None for key in rows):
        return None
    return count_flips([old.right[key] for key in rows], [new.right[key] for key in rows]).negative_rate


def _score(found: Found, split: str) -> float | None:
    score: float | None = found.record["scores"].get(split)
    return score


def _curve(several: list[Found]) -> tuple[tuple[float, float], ...]:
    """Average learning curves over the steps that all of them have."""
    curves = [{point["step"]: point["score"] for point in found.curve} for found in several]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return tuple((step, statistics.fmean(curve[step] for curve in curves)) for step in steps)


def _mean(values: list[Any]) -> Any:
    """Average; a figure that one seed lacks is lacking (a target not reached is not an average)."""
    return None if None in values or not values else statistics.fmean(values)


def _ordered(standings: list[Standing]) -> tuple[Standing, ...]:
    def place(one: Standing) -> tuple[bool, float, str]:
        known = one.test is not None and math.isfinite(one.test)
        return one.method != "scratch", -(one.test or 0.0) if known else math.inf, one.method

    return tuple(sorted(standings, key=place))


def _stored(comparison: dict[str, Any]) -> Setting:
    """Take a comparison's own rows, where its outcome folders are gone."""
    standings = []
    for row in comparison["rows"]:
        same = {name: row[name] for name in ("method", "start", "dev", "test", "recovery", "steps_to_scratch")}
        cost = {name: row[name] for name in ("negative_flips", "labels", "steps", "seconds")}
        standings.append(Standing(**same, **cost, seeds=tuple(row["seeds"]), deviation=row["test_deviation"], curve=()))
    return Setting(
        about="as compared; the outcome folders are elsewhere",
        metric=comparison["metric"],
        split=comparison["split"],
        standings=_ordered(standings),
        level=None,
        old=comparison["old"],
        floor=comparison["majority"],
        outcomes=(),
    )
