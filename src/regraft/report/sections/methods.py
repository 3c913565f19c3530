"""The sections on methods: scores, learning curves and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_learning_curves, draw_method_scores
from regraft.report.comparison_tables import harness_table, keep_table
from regraft.report.page import Block, Chart, Charts, Prose, Section, Table
from regraft.report.sections.answers import answer_blocks
from regraft.report.wording import MISSING, duration, integer, join_words, number, percent, score_text
from regraft.task import find_metric

if TYPE_CHECKING:
    from regraft.report.summaries import MethodSummary, Setting
    from regraft.task import Metric

ORDER = 20
MAX_LISTED_LAYERS = 3  # fewer than in an error message, since there is a note per run


def method_sections(settings: list[Setting], prefix: str) -> list[Section]:
    """Show a task's runs and comparisons.

    Args:
        settings: The settings of one task.
        prefix: The prefix of the charts' names.

    Returns:
        The sections on methods, learning curves and costs; none without settings.
    """
    if not settings:
        return []
    methods: list[Block] = []
    curves: list[Block] = []
    costs: list[Block] = []
    for setting_number, setting in enumerate(settings, start=1):
        name = f"{prefix}-{setting_number}"
        methods.append(_method_table(setting))
        if sum(summary.score is not None for summary in setting.summaries) > 1:
            methods.append(Charts((_score_chart(setting, name),)))
        methods += [Prose(note) for note in _notes(setting)]
        if setting.comparison:
            tables = (keep_table(setting.comparison), harness_table(setting.comparison))
            methods += [table for table in tables if table]
        # Among several settings, one with a single method is mostly the old deployment's: nothing to compare it with.
        has_comparison = len(setting.summaries) > 1 or len(settings) == 1
        if has_comparison and any(len(summary.curve) > 1 for summary in setting.summaries):
            curves.append(Charts((_learning_chart(setting, name),)))
        costs.append(_cost_table(setting))
    dev = settings[0].dev
    lead = (
        f"Recovery: 0 % is {settings[0].chance_name}, 100 % is scratch. Steps to scratch: until {dev} is where scratch "
        "ends. Negative flips: right in the old deployment, wrong here."
    )
    sections = [Section("methods", "Methods", lead, tuple(methods))]
    answers = [block for setting in settings for block in answer_blocks(setting)]
    if answers:
        lead = f"What the old deployment and each method answer on {settings[0].split}, with the first seed."
        sections.append(Section("answers", "Answers", lead, tuple(answers)))
    if curves:
        score = f"Score on {dev}" if dev == "dev" else dev.capitalize()
        lead = f"{score} over the training steps, mean over seeds; a single mark is a method that trains nothing."
        sections.append(Section("learning", "Learning curves", lead, tuple(curves)))
    lead = "What each method took, mean over seeds: optimiser steps, time, and labelled examples seen."
    return [*sections, Section("cost", "Cost", lead, tuple(costs))]


def _method_table(setting: Setting) -> Table:
    """Return the scores, recovery and flips of each method."""
    columns = (
        "method",
        f"{setting.dev} at step 0",
        f"{setting.dev} best",
        setting.split,
        "recovery",
        "steps to scratch",
        "negative flips",
        "labels",
        "seeds",
    )
    metric, curve_metric = find_metric(setting.metric), find_metric(setting.curve_metric)
    rows = tuple(
        (
            summary.method,
            score_text(summary.start, curve_metric),
            score_text(summary.best_dev, curve_metric),
            _score_with_deviation(summary, metric),
            percent(summary.recovery, 0),
            integer(summary.steps_to_scratch),
            percent(summary.negative_flips),
            integer(summary.labels),
            ", ".join(map(str, summary.seeds)),
        )
        for summary in setting.summaries
    )
    return Table(f"{setting.metric} by method: {setting.description}", columns, rows)


def _score_with_deviation(summary: MethodSummary, metric: Metric) -> str:
    score = score_text(summary.score, metric)
    if summary.deviation is None:
        return score
    write_deviation = number if metric.is_bounded else metric.format_deviation
    return f"{score} ± {write_deviation(summary.deviation)}"


def _score_chart(setting: Setting, name: str) -> Chart:
    """Draw the scores by method; at least one summary must have a score."""
    measured = [(summary, summary.score) for summary in setting.summaries if summary.score is not None]
    metric = find_metric(setting.metric)
    best, _ = max(measured, key=lambda entry: metric.merit(entry[1]))
    extreme = "highest" if metric.higher_is_better else "lowest"
    finding = f"{best.method} has the {extreme} {metric.name} on {setting.split}, {_score_with_deviation(best, metric)}"
    if best.method != "scratch":
        scratch_scores = [score_text(score, metric) for row, score in measured if row.method == "scratch"]
        finding += "".join(f"; scratch has {score}" for score in scratch_scores)
    if setting.old_score is not None:
        finding += f"; the old deployment had {score_text(setting.old_score, metric)}"
    rows = [
        (summary.method, score_text(score, metric), score_text(summary.deviation, metric))
        for summary, score in measured
    ]
    for reference, reference_score in (("old deployment", setting.old_score), (setting.chance_name, setting.chance)):
        if reference_score is not None:
            rows.append((reference, score_text(reference_score, metric), MISSING))
    columns = ("method", f"{setting.metric} on {setting.split}", "deviation over seeds")
    title = "Scores by method"
    table = Table(title, columns, tuple(rows))
    return Chart(f"{name}-methods", title, f"{finding}.", draw_method_scores(setting), table, wide=True)


def _learning_chart(setting: Setting, name: str) -> Chart:
    """Draw the learning curves of the methods that have one."""
    metric = find_metric(setting.curve_metric)
    summaries = [summary for summary in setting.summaries if summary.curve]
    finding = f"Learning curves of {len(summaries)} method{'' if len(summaries) == 1 else 's'}"
    if setting.scratch_dev is not None:
        scratch_score = score_text(setting.scratch_dev, metric)
        finding += f": scratch ends at {scratch_score}{_describe_steps_to_scratch(summaries)}"
    curves = {summary.method: summary.curve for summary in summaries}
    rows = tuple(
        (method, integer(step), score_text(score, metric)) for method, curve in curves.items() for step, score in curve
    )
    table = Table("Learning curves", ("method", "steps", f"{setting.curve_metric} on dev"), rows)
    figure = draw_learning_curves(curves, setting.scratch_dev, setting.curve_metric)
    agreement_methods = dict.fromkeys(run.record.method for run in setting.runs if run.record.curve_is_agreement)
    if agreement_methods:
        finding += f"; without {join_words(agreement_methods)}, whose curve is agreement with the old model"
    title = f"Learning curves: {setting.description}"
    return Chart(f"{name}-learning", title, f"{finding}.", figure, table, wide=True)


def _describe_steps_to_scratch(summaries: list[MethodSummary]) -> str:
    """Say when each method reaches scratch's last score, the earliest first, and which methods do not for some seed."""
    steps = {
        summary.method: summary.steps_to_scratch
        for summary in summaries
        if summary.steps_to_scratch is not None and summary.method != "scratch"
    }
    clauses = []
    for method, num_steps in sorted(steps.items(), key=lambda entry: entry[1]):
        time = f"after {integer(num_steps)} steps" if num_steps else "before the first step"
        clauses.append(f"{method} is there {time}")
    never = [summary.method for summary in summaries if summary.steps_to_scratch is None]
    if never:
        clauses.append(f"{join_words(never)} {'does' if len(never) == 1 else 'do'} not get there")
    return "".join(f"; {clause}" for clause in clauses)


def _cost_table(setting: Setting) -> Table:
    rows = tuple(
        (summary.method, integer(summary.steps), duration(summary.seconds), integer(summary.labels))
        for summary in setting.summaries
    )
    return Table(f"Cost by method: {setting.description}", ("method", "steps", "time", "labelled examples"), rows)


def _notes(setting: Setting) -> list[str]:
    """Return the notes of the runs on their choices and limits, without duplicates."""
    notes = []
    for run in setting.runs:
        run_name = f"{run.record.method}, seed {run.record.seed}"
        for key in ("why", "cannot_know"):
            note = run.record.notes.get(key)
            if isinstance(note, str):
                notes.append(f"{run_name}: {note}")
        unchanged = run.record.notes.get("passed_over")
        if unchanged and isinstance(unchanged, dict):
            layers = ", ".join(list(unchanged)[:MAX_LISTED_LAYERS])
            layers += " …" if len(unchanged) > MAX_LISTED_LAYERS else ""
            notes.append(f"{run_name}: {len(unchanged)} layers carry their old delta unchanged: {layers}")
    return list(dict.fromkeys(notes))
