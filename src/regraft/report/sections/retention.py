"""Whether what the new base learnt survives in the deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_kept
from regraft.report.page import Block, Chart, Charts, Facts, Section, Table
from regraft.report.wording import number, percent

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Retention

ORDER = 80


def show(kept: Retention, diagnosis: Diagnosis, part: str) -> list[Section]:
    """Show the language-modelling losses.

    Args:
        kept: The answer.
        diagnosis: The whole diagnosis.
        part: The part's name, for those of the charts.

    Returns:
        The section; none without losses.
    """
    if not kept.loss:
        return []
    finding = f"Language-modelling loss: {', '.join(f'{name} {number(value)}' for name, value in kept.loss.items())}"
    share = None if kept.share is None else percent(kept.share, 0)
    finding += "." if share is None else f"; the recycled model keeps {share} of the new base's gain."
    rows = tuple((name, number(value, 4)) for name, value in kept.loss.items())
    table = Table("Language-modelling loss", ("model", "nats a token"), rows)
    chart = Chart(f"{part}-kept", "Language-modelling loss", finding, draw_kept(kept.loss), table, wide=True)
    lead = f"Whether what the new base learnt survives in the deployment, measured on {kept.text}."
    blocks: list[Block] = [] if share is None else [Facts((("kept", share, "of the new base's gain"),))]
    return [Section("kept", "Keeps the upgrade", lead, (*blocks, Charts((chart,))))]
