"""Summarises runs: by task and setting, averaged over seeds, compared with scratch and the old deployment."""

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
    from collections.abc import Mapping, Sequence

    from regraft.methods import Comparison
    from regraft.report.find import ReportInputs, Run


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """One method in one setting, averaged over seeds.

    Args:
        method: The method's name.
        seeds: The seeds.
        start: The score on dev before the first step.
        best_dev: The best score on dev.
        score: The score on the setting's split.
        deviation: The standard deviation of that score over seeds; None for one seed.
        recovery: (score − floor) / (scratch's score − floor).
        steps_to_scratch: The number of steps until dev first reaches scratch's last score; None if a seed never does.
        negative_flips: The share of examples that the old deployment has right and this method has wrong.
        labels: The number of labelled training examples seen.
        steps: The number of training steps.
        seconds: The training time.
        curve: The learning curve: steps and mean score on dev.
    """

    method: str
    seeds: tuple[int, ...]
    start: float | None
    best_dev: float | None
    score: float | None
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
    """Methods that may be compared: one task, base, kind and amount of training data.

    Args:
        description: The kind, the base and the amount of training data.
        metric: The task's metric.
        split: The split of the scores.
        summaries: Scratch first, then the best method.
        scratch_dev: Scratch's last score on dev; None without scratch.
        old_score: The old deployment's score, if it is known.
        floor: The score of guessing.
        runs: The runs behind the summaries.
    """

    description: str
    metric: str
    split: str
    summaries: tuple[MethodSummary, ...]
    scratch_dev: float | None
    old_score: float | None
    floor: float | None
    runs: tuple[Run, ...]


def settings_by_task(inputs: ReportInputs) -> dict[str, list[Setting]]:
    """Group runs and comparisons into settings.

    Args:
        inputs: The runs and comparisons.

    Returns:
        The settings of each task, by its name, those with most runs first.
    """
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in inputs.runs:
        task = run.record.task
        groups[task.name, task.metric, run.record.base.fingerprint, run.record.kind, task.train].append(run)
    settings: dict[str, list[Setting]] = defaultdict(list)
    for (task_name, *_), runs in sorted(groups.items(), key=lambda group: -len(group[1])):
        settings[task_name].append(_setting(runs, inputs))
    for folder, comparison in inputs.comparisons.items():
        if not any(folder in run.path.parents for run in inputs.runs):
            settings[comparison.task].append(_setting_of_comparison(comparison))
    return dict(settings)


def _setting(runs: list[Run], inputs: ReportInputs) -> Setting:
    record = runs[0].record
    split = "test" if all(run.record.scores.test is not None for run in runs) else "dev"
    scratch_runs = {run.record.seed: run for run in runs if run.record.method == "scratch"}
    old_runs = {run.path: _find_old_deployment(run, inputs.runs) for run in runs}
    comparison = _find_comparison(runs[0], inputs.comparisons)
    runs_by_method: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        runs_by_method[run.record.method].append(run)
    summaries = []
    for method, method_runs in runs_by_method.items():
        figures = [
            _run_figures(run, scratch_runs.get(run.record.seed), old_runs[run.path], split) for run in method_runs
        ]
        means = {name: _mean([row[name] for row in figures]) for name in figures[0]}
        if means["negative_flips"] is None and comparison:
            means["negative_flips"] = next(
                (row.negative_flips for row in comparison.rows if row.method == method), None
            )
        scores = [row["score"] for row in figures if row["score"] is not None]
        summaries.append(
            MethodSummary(
                method=method,
                seeds=tuple(run.record.seed for run in method_runs),
                deviation=deviation(scores) if len(scores) == len(figures) else None,
                curve=_mean_curve(method_runs),
                **means,
            )
        )
    if comparison and comparison.split == split:
        old_score = comparison.old
    else:
        old_score = _mean([old_run.record.scores.of(split) for old_run in old_runs.values() if old_run])
    return Setting(
        description=f"{record.kind} on {base_name(record.base.name)}, {record.task.train:,} training examples",
        metric=record.task.metric,
        split=split,
        summaries=_ranked(summaries, record.task.metric),
        scratch_dev=_mean([run.curve[-1]["score"] for run in scratch_runs.values()]),
        old_score=old_score,
        floor=_mean([run.record.scores.majority(split) for run in runs]),
        runs=tuple(runs),
    )


def _run_figures(run: Run, scratch: Run | None, old: Run | None, split: str) -> dict[str, float | None]:
    """Return the figures of one run, by the names of the fields of `MethodSummary` that average them."""
    scores = run.record.scores
    cost = run.record.cost
    metric = find_metric(run.record.task.metric)
    floor = scores.majority(split)
    score = scores.of(split)
    share = steps_to_scratch = None
    if scratch:
        reference = scratch.record.scores.of(split)
        if reference is not None and floor is not None and score is not None:
            share = recovery(score, floor, reference, metric)
        target = scratch.curve[-1]["score"]
        steps_to_scratch = next(
            (point["step"] for point in run.curve if metric.gain(point["score"], target) >= 0), None
        )
    best_dev = None
    if scores.dev is not None:
        best_dev = max((point["score"] for point in run.curve), key=metric.merit)
    return {
        "start": scores.dev_at_start,
        "best_dev": best_dev,
        "score": score,
        "recovery": share,
        "steps_to_scratch": steps_to_scratch,
        "negative_flips": _negative_flips(old, run, split) if old else None,
        "labels": cost.labels,
        "steps": cost.steps,
        "seconds": cost.seconds,
    }


def _find_comparison(run: Run, comparisons: Mapping[Path, Comparison]) -> Comparison | None:
    """Return the comparison that a run belongs to: the one in a folder above it."""
    for folder, comparison in comparisons.items():
        if folder in run.path.parents:
            return comparison
    return None


def _find_old_deployment(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run whose adaptation was recycled into this one, if it is among the runs."""
    source = run.record.recycled_from
    if not source:
        return None
    folder = Path(source.adaptation).resolve()
    for candidate in runs:
        is_on_old_base = candidate.record.base.fingerprint == source.old_base_fingerprint
        if is_on_old_base and folder in (candidate.path.resolve(), candidate.path.resolve() / "adaptation"):
            return candidate
    return None


def _negative_flips(old: Run, new: Run, split: str) -> float | None:
    rows = [key for key in new.is_right if key[0] == split]
    before, after = [old.is_right.get(key) for key in rows], [new.is_right[key] for key in rows]
    if not rows or None in before or None in after:
        return None
    return count_flips(before, after).negative_rate


def _mean_curve(runs: list[Run]) -> tuple[tuple[float, float], ...]:
    """Average learning curves over the steps that all of them have."""
    curves = [{point["step"]: point["score"] for point in run.curve} for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return tuple((step, statistics.fmean(curve[step] for curve in curves)) for step in steps)


def _mean(values: list[Any]) -> Any:
    """Average; None if a value is missing, because a target that one seed never reached has no mean."""
    return None if None in values or not values else statistics.fmean(values)


def _ranked(summaries: list[MethodSummary], metric: str) -> tuple[MethodSummary, ...]:
    """Sort scratch first, then by score, then those without a finite score."""

    def rank(summary: MethodSummary) -> tuple[bool, float, str]:
        merit = -math.inf
        if summary.score is not None and math.isfinite(summary.score):
            merit = find_metric(metric).merit(summary.score)
        return summary.method != "scratch", -merit, summary.method

    return tuple(sorted(summaries, key=rank))


def _setting_of_comparison(comparison: Comparison) -> Setting:
    """Use the rows of a comparison whose outcome folders are not among the inputs."""
    summaries = [
        MethodSummary(
            method=row.method,
            seeds=row.seeds,
            start=row.start,
            best_dev=row.dev,
            score=row.test,
            deviation=row.test_deviation,
            recovery=row.recovery,
            steps_to_scratch=row.steps_to_scratch,
            negative_flips=row.negative_flips,
            labels=row.labels,
            steps=row.steps,
            seconds=row.seconds,
            curve=(),
        )
        for row in comparison.rows
    ]
    return Setting(
        description="as compared; the outcome folders are elsewhere",
        metric=comparison.metric,
        split=comparison.split,
        summaries=_ranked(summaries, comparison.metric),
        scratch_dev=None,
        old_score=comparison.old,
        floor=comparison.majority,
        runs=(),
    )
