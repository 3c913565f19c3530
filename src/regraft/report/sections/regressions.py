"""Which examples changed, and what the type of task shows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.page import Block, Browser, Charts, Facts, Section
from regraft.report.views import chart_of, table_of, texts_of
from regraft.report.wording import number, percent
from regraft.task.types import MarkedText, Scatter, Table

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Regressions

ORDER = 90
MARGIN = 0.05
"""The usual level of significance."""


def show(regressions: Regressions, diagnosis: Diagnosis, part: str) -> list[Section]:
    """Show flips, and what the type of task shows of them.

    Args:
        regressions: The answer.
        diagnosis: The whole diagnosis.
        part: The part's name, for those of the charts.

    Returns:
        Regressions, and a section a chart of the type.
    """
    examples = regressions.examples or 1
    facts = [
        (
            "negative flips",
            f"{regressions.negative:,} ({percent(regressions.negative / examples)})",
            "right before, wrong now",
        ),
        (
            "positive flips",
            f"{regressions.positive:,} ({percent(regressions.positive / examples)})",
            "wrong before, right now",
        ),
        ("McNemar's test", f"p = {_p(regressions.mcnemar)}", _significance(regressions.mcnemar)),
    ]
    if regressions.noise is not None:
        facts.append(("noise floor", percent(regressions.noise), "negative flips between two seeds of one recipe"))
    blocks: list[Block] = [Facts(tuple(facts))]
    blocks += [table_of(view) for view in regressions.views if isinstance(view, Table)]
    blocks += [texts_of(view) for view in regressions.views if isinstance(view, MarkedText)]
    if regressions.flips:
        blocks.append(Browser(regressions.flips))
    lead = f"Predictions on {regressions.examples:,} examples of {regressions.split} that changed with the upgrade."
    sections = [Section("regressions", "Regressions", lead, tuple(blocks))]
    sections += [
        Section(view.name, view.title, view.lead, (Charts((chart_of(view, part),)),))
        for view in regressions.views
        if isinstance(view, Scatter)
    ]
    return sections


def _p(value: float) -> str:
    return number(value) if value >= 0.001 else f"{value:.1e}".replace("-", "−")


def _significance(p: float) -> str:
    return "more than chance explains" if p < MARGIN else "chance alone could explain the difference"
