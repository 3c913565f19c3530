"""Which method gives what: the table, the scores, the learning curves and the cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_learning, draw_methods
from regraft.report.page import Block, Chart, Charts, Prose, Section, Table
from regraft.report.wording import NONE, listing, number, percent, seconds, whole

if TYPE_CHECKING:
    from regraft.report.summaries import Setting, Standing


ORDER = 20


def method_sections(settings: list[Setting], part: str) -> list[Section]:
    """Show a task's outcomes.

    Args:
        settings: The task's.
        part: The part's name, for those of the charts.

    Returns:
        Methods, learning curves and cost; none without outcomes.
    """
    if not settings:
        return []
    methods: list[Block] = []
    curves: list[Block] = []
    cost: list[Block] = []
    for place, setting in enumerate(settings, 1):
        name = f"{part}-{place}"
        methods.append(_table(setting))
        if sum(one.test is not None for one in setting.standings) > 1:
            methods.append(Charts((_scores(setting, name),)))
        methods += [Prose(note) for note in _notes(setting)]
        compared = len(setting.standings) > 1 or len(settings) == 1  # not the old deployment alone
        if compared and any(len(one.curve) > 1 for one in setting.standings):
            curves.append(Charts((_learning(setting, name),)))
        cost.append(_cost(setting))
    lead = (
        "Recovery: 0 % is guessing, 100 % is scratch. Steps to scratch: until dev is where scratch ends. "
        "Negative flips: right in the old deployment, wrong here."
    )
    sections = [Section("methods", "Methods", lead, tuple(methods))]
    if curves:
        lead = "Score on dev after so many steps, mean over seeds; a single mark is a method that trains nothing."
        sections.append(Section("learning", "Learning curves", lead, tuple(curves)))
    lead = "What each method took, mean over seeds: optimiser steps, time, and labelled examples seen."
    return [*sections, Section("cost", "Cost", lead, tuple(cost))]


def _table(setting: Setting) -> Table:
    head = (
        "method", "dev at step 0", "dev best", setting.split, "recovery", "steps to scratch", "negative flips",
        "labels", "seeds",
    )  # fmt: skip
    rows = tuple(
        (
            one.method,
            number(one.start),
            number(one.dev),
            number(one.test) + (f" ± {number(one.deviation)}" if one.deviation is not None else ""),
            percent(one.recovery, 0),
            "–" if one.steps_to_scratch is None else whole(one.steps_to_scratch),
            percent(one.negative_flips),
            whole(one.labels),
            ", ".join(map(str, one.seeds)),
        )
        for one in setting.standings
    )
    return Table(f"{setting.metric} by method: {setting.about}", head, rows)


def _scores(setting: Setting, name: str) -> Chart:
    shown = [one for one in setting.standings if one.test is not None]
    best = max(shown, key=lambda one: one.test or 0.0)
    finding = f"{best.method} has the highest {setting.metric} on {setting.split}, {number(best.test)}"
    if best.deviation is not None:
        finding += f" ± {number(best.deviation)}"
    others = [one for one in shown if one.method == "scratch" and one is not best]
    finding += "".join(f"; scratch has {number(one.test)}" for one in others)
    if setting.old is not None:
        finding += f"; the old deployment had {number(setting.old)}"
    rows = tuple((one.method, number(one.test), number(one.deviation)) for one in shown)
    levels = (("old deployment", setting.old), ("guessing", setting.floor))
    rows += tuple((level, number(value), NONE) for level, value in levels if value is not None)
    table = Table("Scores by method", ("method", f"{setting.metric} on {setting.split}", "deviation over seeds"), rows)
    return Chart(f"{name}-methods", "Scores by method", f"{finding}.", draw_methods(setting), table, wide=True)


def _learning(setting: Setting, name: str) -> Chart:
    shown = [one for one in setting.standings if one.curve]
    curves = {one.method: one.curve for one in shown}
    finding = f"Learning curves of {len(shown)} method{'' if len(shown) == 1 else 's'}"
    if setting.level is not None:
        finding += f": scratch ends at {number(setting.level)}"
        reached = [one for one in shown if one.steps_to_scratch is not None and one.method != "scratch"]
        never = [one.method for one in shown if one.steps_to_scratch is None]
        finding += "".join(
            f"; {one.method} is there {'before the first step' if not one.steps_to_scratch else _after(one)}"
            for one in sorted(reached, key=lambda one: one.steps_to_scratch or 0.0)
        )
        finding += f"; {listing(never)} {'does' if len(never) == 1 else 'do'} not get there" if never else ""
    rows = tuple((one.method, whole(step), number(score)) for one in shown for step, score in one.curve)
    table = Table("Learning curves", ("method", "steps", f"{setting.metric} on dev"), rows)
    figure = draw_learning(curves, setting.level, setting.metric)
    title = f"Learning curves: {setting.about}"
    return Chart(f"{name}-learning", title, f"{finding}.", figure, table, wide=True)


def _after(one: Standing) -> str:
    return f"after {whole(one.steps_to_scratch)} steps"


def _cost(setting: Setting) -> Table:
    rows = tuple((one.method, whole(one.steps), seconds(one.seconds), whole(one.labels)) for one in setting.standings)
    return Table(f"Cost by method: {setting.about}", ("method", "steps", "time", "labelled examples"), rows)


def _notes(setting: Setting) -> list[str]:
    said = []
    for record in (run.record for run in setting.outcomes):
        for name in ("why", "cannot_know"):
            note = record.notes.get(name)
            if isinstance(note, str):
                said.append(f"{record.method}, seed {record.seed}: {note}")
        left = record.notes.get("passed_over")
        if left and isinstance(left, dict):
            said.append(
                f"{record.method}, seed {record.seed}: {len(left)} layers carry their old delta unchanged: "
                f"{', '.join(list(left)[:3])}{' …' * (len(left) > 3)}"
            )
    return list(dict.fromkeys(said))
