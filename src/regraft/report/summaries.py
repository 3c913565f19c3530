"""Puts outcomes together: by task and setting, over seeds, held against scratch and the old deployment."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.report.wording import base_name
from regraft.task import count_flips, deviation, find_metric, recovery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.methods import Comparison
    from regraft.report.find import Run, Runs


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
        recovery: (score − floor) / (scratch's score − floor).
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
        floor: The score of guessing.
        outcomes: The outcomes they come from.
    """

    about: str
    metric: str
    split: str
    standings: tuple[Standing, ...]
    level: float | None
    old: float | None
    floor: float | None
    outcomes: tuple[Run, ...]


def settings_by_task(runs: Runs) -> dict[str, list[Setting]]:
    """Group outcomes.

    Args:
        runs: What there is.

    Returns:
        By task the settings, those with most outcomes first.
    """
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs.outcomes:
        task = run.record.task
        groups[task.name, task.metric, run.record.base.fingerprint, run.record.kind, task.train].append(run)
    settings: dict[str, list[Setting]] = defaultdict(list)
    for (task_name, *_), group in sorted(groups.items(), key=lambda entry: -len(entry[1])):
        settings[task_name].append(_setting(group, runs))
    for folder, comparison in runs.comparisons.items():
        if not any(folder in run.path.parents for run in runs.outcomes):
            settings[comparison.task].append(_stored(comparison))
    return dict(settings)


def _setting(group: list[Run], runs: Runs) -> Setting:
    record = group[0].record
    split = "test" if all(run.record.scores.test is not None for run in group) else "dev"
    scratch = {run.record.seed: run for run in group if run.record.method == "scratch"}
    comparison = next((c for f, c in runs.comparisons.items() if f in group[0].path.parents), None)
    compared_flips = {row.method: row.negative_flips for row in comparison.rows} if comparison else {}
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in group:
        by_method[run.record.method].append(run)
    before = {run.path: _old_deployment(run, runs.outcomes) for run in group}
    standings = []
    for method, seeds in by_method.items():
        figures = [_figures(run, scratch.get(run.record.seed), before[run.path], split) for run in seeds]
        tests = [row["test"] for row in figures if row["test"] is not None]
        mean = {name: _mean([row[name] for row in figures]) for name in figures[0]}
        if mean["negative_flips"] is None:
            mean["negative_flips"] = compared_flips.get(method)
        spread = deviation(tests) if len(tests) == len(figures) else None
        numbers = tuple(run.record.seed for run in seeds)
        standings.append(Standing(method, numbers, deviation=spread, curve=_curve(seeds), **mean))
    scores = [old.record.scores.of(split) for old in before.values() if old]
    old = comparison.old if comparison and comparison.split == split else _mean(scores)
    return Setting(
        about=f"{record.kind} on {base_name(record.base.name)}, {record.task.train:,} training examples",
        metric=record.task.metric,
        split=split,
        standings=_ordered(standings, record.task.metric),
        level=_mean([run.curve[-1]["score"] for run in scratch.values()]),
        old=old,
        floor=_mean([run.record.scores.majority(split) for run in group]),
        outcomes=tuple(group),
    )


def _figures(run: Run, scratch: Run | None, old: Run | None, split: str) -> dict[str, float | None]:
    scores, cost, metric = run.record.scores, run.record.cost, find_metric(run.record.task.metric)
    share = steps = None
    floor, value = scores.majority(split), scores.of(split)
    if scratch:
        reference = scratch.record.scores.of(split)
        if reference is not None and floor is not None and value is not None:
            share = recovery(value, floor, reference, metric)
        target = scratch.curve[-1]["score"]
        steps = next((point["step"] for point in run.curve if metric.gain(point["score"], target) >= 0), None)
    return {
        "start": scores.dev_at_start,
        "dev": max((point["score"] for point in run.curve), key=metric.merit) if scores.dev is not None else None,
        "test": value,
        "recovery": share,
        "steps_to_scratch": steps,
        "negative_flips": _negative_flips(old, run, split) if old else None,
        "labels": cost.labels,
        "steps": cost.steps,
        "seconds": cost.seconds,
    }


def _old_deployment(run: Run, outcomes: Sequence[Run]) -> Run | None:
    """Find the outcome, if it is among them, that an adaptation was recycled from."""
    source = run.record.recycled_from
    if not source:
        return None
    folder = Path(source.adaptation).resolve()
    for other in outcomes:
        is_of_old_base = other.record.base.fingerprint == source.old_base_fingerprint
        if is_of_old_base and folder in (other.path.resolve(), other.path.resolve() / "adaptation"):
            return other
    return None


def _negative_flips(old: Run, new: Run, split: str) -> float | None:
    rows = [key for key in new.right if key[0] == split]
    if not rows or any(old.right.get(key) is None or new.right[key] is None for key in rows):
        return None
    return count_flips([old.right[key] for key in rows], [new.right[key] for key in rows]).negative_rate


def _curve(runs: list[Run]) -> tuple[tuple[float, float], ...]:
    """Average learning curves over the steps that all of them have."""
    curves = [{point["step"]: point["score"] for point in run.curve} for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return tuple((step, statistics.fmean(curve[step] for curve in curves)) for step in steps)


def _mean(values: list[Any]) -> Any:
    """Average; a figure that one seed lacks is lacking (a target not reached is not an average)."""
    return None if None in values or not values else statistics.fmean(values)


def _ordered(standings: list[Standing], metric: str) -> tuple[Standing, ...]:
    def rank(standing: Standing) -> tuple[bool, float, str]:
        is_measured = standing.test is not None and math.isfinite(standing.test)
        return (
            standing.method != "scratch",
            -find_metric(metric).merit(standing.test or 0.0) if is_measured else math.inf,
            standing.method,
        )

    return tuple(sorted(standings, key=rank))


def _stored(comparison: Comparison) -> Setting:
    """Take a comparison's own rows, where its outcome folders are gone."""
    standings = [
        Standing(
            method=row.method, seeds=row.seeds, start=row.start, dev=row.dev, test=row.test,
            deviation=row.test_deviation, recovery=row.recovery, steps_to_scratch=row.steps_to_scratch,
            negative_flips=row.negative_flips, labels=row.labels, steps=row.steps, seconds=row.seconds, curve=(),
        )
        for row in comparison.rows
    ]  # fmt: skip
    return Setting(
        about="as compared; the outcome folders are elsewhere",
        metric=comparison.metric,
        split=comparison.split,
        standings=_ordered(standings, comparison.metric),
        level=None,
        old=comparison.old,
        floor=comparison.majority,
        outcomes=(),
    )
