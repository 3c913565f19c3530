"""The sections on flips, and on the views that the task type defines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.page import AnswerBrowser, Block, Charts, Facts, FlipBrowser, Section
from regraft.report.views import marked_texts_block, scatter_chart, table_block
from regraft.report.wording import number, percent
from regraft.task.types import Answers, MarkedText, Scatter, Table

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Regressions
    from regraft.report.page import Fact

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
    facts = _flip_facts(regressions)
    blocks: list[Block] = [Facts(facts)] if facts else []
    blocks += [table_block(view) for view in regressions.views if isinstance(view, Table)]
    blocks += [marked_texts_block(view) for view in regressions.views if isinstance(view, MarkedText)]
    answers = [AnswerBrowser(view.title, view.pairs) for view in regressions.views if isinstance(view, Answers)]
    blocks += answers
    if regressions.flips and not answers:  # which show the flips, in a layout for long texts
        blocks.append(FlipBrowser(regressions.flips))
    lead = f"Predictions on {examples:,} examples of {regressions.split} that changed with the upgrade."
    if not facts:
        lead = f"Whether predictions on the {examples:,} examples of {regressions.split} are right is not known."
    sections = [Section("regressions", "Regressions", lead, tuple(blocks))]
    sections += [
        Section(view.name, view.title, view.lead, (Charts((scatter_chart(view, prefix),)),))
        for view in regressions.views
        if isinstance(view, Scatter)
    ]
    return sections


def _flip_facts(regressions: Regressions) -> tuple[Fact, ...]:
    """Return the numbers of flips with their test; none if no prediction is right or wrong."""
    negative, positive, p = regressions.negative, regressions.positive, regressions.mcnemar
    if negative is None or positive is None or p is None:
        return ()
    facts: tuple[Fact, ...] = (
        ("negative flips", _count_and_share(negative, regressions.examples), "right before, wrong now"),
        ("positive flips", _count_and_share(positive, regressions.examples), "wrong before, right now"),
        ("McNemar's test", f"p = {_p_value(p)}", _significance(p)),
    )
    if regressions.noise is None:
        return facts
    return (*facts, ("noise floor", percent(regressions.noise), "negative flips between two seeds of one recipe"))


def _count_and_share(count: int, examples: int) -> str:
    return f"{count:,} ({percent(count / (examples or 1))})"


def _p_value(p: float) -> str:
    return number(p) if p >= 0.001 else f"{p:.1e}".replace("-", "−")


def _significance(p: float) -> str:
    return "more than chance explains" if p < SIGNIFICANCE else "chance alone could explain the difference"
