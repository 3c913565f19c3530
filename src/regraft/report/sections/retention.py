"""The section on the new deployment's retention of the new base's gain in language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_retention
from regraft.report.page import Block, Chart, Charts, Facts, Section, Table
from regraft.report.wording import number, percent

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Retention

ORDER = 80


def show(retention: Retention, diagnosis: Diagnosis, prefix: str) -> list[Section]:
    """Show the language-modelling losses.

    Args:
        retention: The language-modelling losses.
        diagnosis: The diagnosis that the answer belongs to.
        prefix: The prefix of the chart's name.

    Returns:
        A single section; none if there are no losses.
    """
    if not retention.loss:
        return []
    title = "Language-modelling loss"
    finding = f"{title}: {', '.join(f'{name} {number(loss)}' for name, loss in retention.loss.items())}"
    blocks: list[Block] = []
    if retention.share is not None:
        share = percent(retention.share, 0)
        finding += f"; the recycled model keeps {share} of the new base's gain"
        blocks.append(Facts((("kept", share, "of the new base's gain"),)))
    rows = tuple((name, number(loss, 4)) for name, loss in retention.loss.items())
    table = Table(title, ("model", "nats a token"), rows)
    figure = draw_retention(retention.loss)
    blocks.append(Charts((Chart(f"{prefix}-kept", title, f"{finding}.", figure, table, wide=True),)))
    lead = f"Whether what the new base learnt survives in the deployment, measured on {retention.text}."
    return [Section("kept", "Keeps the upgrade", lead, tuple(blocks))]
