"""The section on what the upgrade brought, and how much of it models have beside the old behaviour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_knowledge
from regraft.report.page import Block, Chart, Charts, Section, Table
from regraft.report.wording import join_words, score_text
from regraft.task import find_metric

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Knowledge

ORDER = 25


def show(knowledge: Knowledge, diagnosis: Diagnosis, prefix: str) -> list[Section]:
    """Show the new knowledge and the old behaviour of each model.

    Args:
        knowledge: The two figures of each model.
        diagnosis: The diagnosis that the answer belongs to.
        prefix: The prefix of the chart's name.

    Returns:
        A single section; without a chart if the examples have no labels.
    """
    keep, behaviour = find_metric(knowledge.metric), find_metric(diagnosis.metric)
    columns = ("model", f"new knowledge ({keep.name})", f"old behaviour ({behaviour.name})")
    rows = tuple(
        (model.model, score_text(model.new_knowledge, keep), score_text(model.old_behaviour, behaviour))
        for model in knowledge.models
    )
    title = "New knowledge and old behaviour"
    table = Table(title, columns, rows)
    finding = f"{keep.name} on {knowledge.source}: {join_words(f'{model} {score}' for model, score, _ in rows)}."
    lead = f"Whether what the upgrade brought, measured on {knowledge.source}, comes with what the adaptation learnt."
    reversed_names = dict.fromkeys(metric.name for metric in (keep, behaviour) if not metric.higher_is_better)
    if reversed_names:
        lead += f" Lower is better for {join_words(reversed_names)}."
    blocks: list[Block] = [table]
    if any(model.old_behaviour is not None for model in knowledge.models):
        figure = draw_knowledge(knowledge, behaviour)
        blocks = [Charts((Chart(f"{prefix}-knowledge", title, finding, figure, table, wide=True),))]
    return [Section("knowledge", "What the upgrade brought", lead, tuple(blocks))]
