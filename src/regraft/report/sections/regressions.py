"""The sections on flips, and on the views that the task type defines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.page import Block, Charts, Facts, FlipBrowser, Section
from regraft.report.views import marked_texts_block, scatter_chart, table_block
from regraft.report.wording import number, percent
from regraft.task.types import MarkedText, Scatter, Table

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Regressions

ORDER = 90
SIGNIFICANCE = 0.05
"""The customary significance level of McNemar's test."""


def show(regressions: Regressions, diagnosis: Diagnosis, prefix: str) -> list[Section]:
    """Show the flips, and the views of the task type.

    Args:
        regressions: The flips, and the views of the task type.
        diagnosis: The diagnosis that the answer belongs to.
        prefix: The prefix of the charts' names.

    Returns:
        One section on flips with the tables and marked texts of the task type, and one per chart of the task type.
    """
    examples = regressions.examples
    p = regressions.mcnemar
    facts = [
        ("negative flips", _count_and_share(regressions.negative, examples), "right before, wrong now"),
        ("positive flips", _count_and_share(regressions.positive, examples), "wrong before, right now"),
        ("McNemar's test", f"p = {_p_value(p)}", _significance(p)),
    ]
    if regressions.noise is not None:
        facts.append(("noise floor", percent(regressions.noise), "negative flips between two seeds of one recipe"))
    blocks: list[Block] = [Facts(tuple(facts))]
    blocks += [table_block(view) for view in regressions.views if isinstance(view, Table)]
    blocks += [marked_texts_block(view) for view in regressions.views if isinstance(view, MarkedText)]
    if regressions.flips:
        blocks.append(FlipBrowser(regressions.flips))
    lead = f"Predictions on {examples:,} examples of {regressions.split} that changed with the upgrade."
    sections = [Section("regressions", "Regressions", lead, tuple(blocks))]
    sections += [
        Section(view.name, view.title, view.lead, (Charts((scatter_chart(view, prefix),)),))
        for view in regressions.views
        if isinstance(view, Scatter)
    ]
    return sections


def _count_and_share(count: int, examples: int) -> str:
    return f"{count:,} ({percent(count / (examples or 1))})"


def _p_value(p: float) -> str:
    return number(p) if p >= 0.001 else f"{p:.1e}".replace("-", "−")


def _significance(p: float) -> str:
    return "more than chance explains" if p < SIGNIFICANCE else "chance alone could explain the difference"
