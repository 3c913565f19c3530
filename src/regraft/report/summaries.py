"""Summarise runs by task and setting, averaged over seeds and compared with scratch and the old deployment."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.report.find import old_answers
from regraft.report.wording import base_name, chance_name
from regraft.task import count_flips, deviation, find_metric, recovery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.methods import Comparison
    from regraft.report.find import ReportInputs, Run


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """One method in one setting, averaged over seeds.

    Args:
        method: The method's name.
        seeds: The seeds of the runs.
        start: The dev score before the first step, by the setting's curve metric; None if it was not measured.
        best_dev: The best dev score during training, by the setting's curve metric, or if the learning curve is
            agreement with the old model, the final weights' dev score; None without labels, or if that is by another
            metric.
        score: The final weights' score on the setting's split; None without labels.
        deviation: The sample standard deviation of `score` over seeds; None for one seed or if a score is missing.
        recovery: (score − chance) / (scratch's score − chance); None without scratch, or if scratch gains too little
            over chance.
        steps_to_scratch: The number of steps until the dev score first reaches scratch's last dev score; None without
            scratch, or if the learning curve does not show that it reaches it for every seed.
        negative_flips: The share of examples for which the old deployment is right and the method wrong; None if
            neither the predictions nor a comparison among the inputs give it.
        labels: The number of labelled training examples used.
        steps: The number of optimiser steps.
        seconds: The training time in seconds, or the time of the whole method if it does not train.
        curve: The learning curve: steps and mean dev score; empty if only a comparison is known, or if the curve is
            agreement with the old model.
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
    """Methods that may be compared, having the same task, base, kind and amount of training data.

    Args:
        description: The kind, the base and the amount of training data, in words.
        type: The name of the task type.
        metric: The name of the task's metric.
        selection: The name of the metric by which the best weights were selected; None if it is `metric`.
        split: The split of the scores, `test` or `dev`.
        summaries: The methods: scratch first, then from the best to the worst score.
        scratch_dev: Scratch's last dev score; None without a run of scratch.
        old_score: The old deployment's score; None if it is unknown.
        chance: The score of the best constant prediction or of the bare new base; None if it is unknown.
        runs: The runs behind the summaries.
        comparison: The comparison that the runs belong to, if it is among the inputs.
        old_answers: The old deployment's answers for the split, as lines of `predictions.jsonl`.
    """

    description: str
    type: str
    metric: str
    selection: str | None
    split: str
    summaries: tuple[MethodSummary, ...]
    scratch_dev: float | None
    old_score: float | None
    chance: float | None
    runs: tuple[Run, ...]
    comparison: Comparison | None
    old_answers: tuple[dict[str, Any], ...] = ()

    @property
    def curve_metric(self) -> str:
        """The name of the metric of learning curves, and of `MethodSummary.start` and `best_dev`."""
        return self.selection or self.metric

    @property
    def chance_name(self) -> str:
        """The name of the model whose score is chance."""
        return chance_name(self.type)

    @property
    def dev(self) -> str:
        """What learning curves show, in words: dev, or the metric on dev if it is not the task's."""
        return f"dev {self.selection}" if self.selection else "dev"


def settings_by_task(inputs: ReportInputs) -> dict[str, list[Setting]]:
    """Group runs and comparisons into settings.

    Args:
        inputs: The records of the report; its diagnoses are not used.

    Returns:
        The settings of each task, by the task's name; settings with more runs first, those without runs
        last.
    """
    runs_by_setting: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in inputs.runs:
        task = run.record.task
        key = (
            task.name,
            task.type,
            task.metric,
            task.selection,
            run.record.base.fingerprint,
            run.record.kind,
            task.train,
        )
        runs_by_setting[key].append(run)
    settings: dict[str, list[Setting]] = defaultdict(list)
    for runs in sorted(runs_by_setting.values(), key=len, reverse=True):
        settings[runs[0].record.task.name].append(_setting(runs, inputs))
    for folder, comparison in inputs.comparisons.items():
        if not any(folder in run.path.parents for run in inputs.runs):
            settings[comparison.task].append(_setting_of_comparison(comparison))
    return dict(settings)


def _setting(runs: list[Run], inputs: ReportInputs) -> Setting:
    """Summarise the runs of a setting by method."""
    record = runs[0].record
    split = "test" if all(run.record.scores.test is not None for run in runs) else "dev"
    scratch_runs = {run.record.seed: run for run in runs if run.record.method == "scratch"}
    old_runs = {run.path: _find_old_deployment(run, inputs.runs) for run in runs}
    folder = next((folder for folder in inputs.comparisons if folder in runs[0].path.parents), None)
    comparison = inputs.comparisons[folder] if folder else None
    runs_by_method: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        runs_by_method[run.record.method].append(run)
    chance = _mean([run.record.scores.majority(split) for run in runs])
    if chance is None and comparison and comparison.split == split:
        chance = comparison.majority
    summaries = []
    for method_runs in runs_by_method.values():
        figures = [
            _run_figures(run, scratch_runs.get(run.record.seed), old_runs[run.path], split, chance)
            for run in method_runs
        ]
        summaries.append(_summary(method_runs, figures, comparison))
    if comparison and comparison.split == split:
        old_score = comparison.old
    else:
        old_score = _mean([old_run.record.scores.of(split) for old_run in old_runs.values() if old_run])
    return Setting(
        description=f"{record.kind} on {base_name(record.base.name)}, {record.task.train:,} training examples",
        type=record.task.type,
        metric=record.task.metric,
        selection=record.task.selection,
        split=split,
        summaries=_sort_summaries(summaries, record.task.metric),
        scratch_dev=_mean([run.curve[-1]["score"] for run in scratch_runs.values()]),
        old_score=old_score,
        chance=chance,
        runs=tuple(runs),
        comparison=comparison,
        old_answers=tuple(_old_answers(runs[0], old_runs[runs[0].path], folder, split)),
    )


def _old_answers(run: Run, old: Run | None, folder: Path | None, split: str) -> list[dict[str, Any]]:
    """Return the old deployment's answers, from its run or else from the folder of a comparison."""
    if not run.answers.get(split):
        return []
    if old and old.answers.get(split):
        return old.answers[split]
    rows = old_answers(folder, run.record.task.digest) if folder else []
    return [row for row in rows if row["split"] == split]


def _summary(runs: list[Run], figures: list[dict[str, float | None]], comparison: Comparison | None) -> MethodSummary:
    """Average the figures of a method's runs; a comparison may know flips that the runs do not."""
    method = runs[0].record.method
    means = {name: _mean([run_figures[name] for run_figures in figures]) for name in figures[0]}
    if means["negative_flips"] is None and comparison:
        recorded_flips = [row.negative_flips for row in comparison.rows if row.method == method]
        means["negative_flips"] = recorded_flips[0] if recorded_flips else None
    scores = [run_figures["score"] for run_figures in figures if run_figures["score"] is not None]
    return MethodSummary(
        method=method,
        seeds=tuple(run.record.seed for run in runs),
        deviation=deviation(scores) if len(scores) == len(figures) else None,
        curve=_mean_curve(runs),
        **means,
    )


def _run_figures(
    run: Run, scratch: Run | None, old: Run | None, split: str, setting_chance: float | None
) -> dict[str, float | None]:
    """Return the figures of one run, by the names of the fields of `MethodSummary` that average them."""
    scores = run.record.scores
    cost = run.record.cost
    metric, curve_metric = find_metric(run.record.task.metric), find_metric(run.record.task.curve_metric)
    chance = setting_chance if scores.majority(split) is None else scores.majority(split)
    score = scores.of(split)
    share = None
    steps_to_scratch = None
    if scratch:
        reference = scratch.record.scores.of(split)
        if reference is not None and chance is not None and score is not None:
            share = recovery(score, chance, reference, metric)
        scratch_dev = scratch.curve[-1]["score"]
        steps_to_scratch = next(
            (point["step"] for point in _scored_curve(run) if curve_metric.gain(point["score"], scratch_dev) >= 0), None
        )
    best_dev = scores.dev if run.record.task.selection is None else None
    if scores.dev is not None and not run.record.curve_is_agreement:
        best_dev = max((point["score"] for point in run.curve), key=curve_metric.merit)
    return {
        "start": None if run.record.curve_is_agreement else scores.dev_at_start,
        "best_dev": best_dev,
        "score": score,
        "recovery": share,
        "steps_to_scratch": steps_to_scratch,
        "negative_flips": _negative_flips(old, run, split) if old else None,
        "labels": cost.labels,
        "steps": cost.steps,
        "seconds": cost.seconds,
    }


def _scored_curve(run: Run) -> list[dict[str, float]]:
    """Return the learning curve; empty if its scores are agreement, which has no relation to the metric."""
    return [] if run.record.curve_is_agreement else run.curve


def _find_old_deployment(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run whose adaptation was recycled into this one, if it is among the runs."""
    source = run.record.recycled_from
    if not source:
        return None
    folder = Path(source.adaptation).resolve()
    for candidate in runs:
        is_on_old_base = candidate.record.base.fingerprint == source.old_base_fingerprint
        candidate_folder = candidate.path.resolve()
        if is_on_old_base and folder in (candidate_folder, candidate_folder / "adaptation"):
            return candidate
    return None


def _negative_flips(old: Run, new: Run, split: str) -> float | None:
    """Return the share of negative flips; None if a prediction is missing or has no label."""
    keys = [(name, row) for name, row in new.right if name == split]
    before = [old.right.get(key) for key in keys]
    after = [new.right[key] for key in keys]
    if not keys or None in before or None in after:
        return None
    return count_flips(before, after).negative_rate


def _mean_curve(runs: list[Run]) -> tuple[tuple[float, float], ...]:
    """Average learning curves over the steps that all of them have."""
    curves = [{point["step"]: point["score"] for point in _scored_curve(run)} for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return tuple((step, statistics.fmean(curve[step] for curve in curves)) for step in steps)


def _mean(figures: list[Any]) -> Any:
    """Average; None if a figure is missing, as the steps to a score that one seed never reaches have no mean."""
    return None if None in figures or not figures else statistics.fmean(figures)


def _sort_summaries(summaries: list[MethodSummary], metric: str) -> tuple[MethodSummary, ...]:
    """Sort scratch first, then by score from the best; methods whose score is missing, infinite or NaN are last."""

    def rank(summary: MethodSummary) -> tuple[bool, float, str]:
        merit = -math.inf
        if summary.score is not None and math.isfinite(summary.score):
            merit = find_metric(metric).merit(summary.score)
        return summary.method != "scratch", -merit, summary.method

    return tuple(sorted(summaries, key=rank))


def _setting_of_comparison(comparison: Comparison) -> Setting:
    """Summarise a comparison whose outcome folders are not among the inputs."""
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
        type=comparison.type,
        metric=comparison.metric,
        selection=comparison.selection,
        split=comparison.split,
        summaries=_sort_summaries(summaries, comparison.metric),
        scratch_dev=None,
        old_score=comparison.old,
        chance=comparison.majority,
        runs=(),
        comparison=comparison,
    )
