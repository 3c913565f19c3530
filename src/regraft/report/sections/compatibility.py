"""How the outdated weights, as they are, fare on later and later checkpoints of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_compatibility
from regraft.report.page import Chart, Charts, Section, Table
from regraft.report.wording import base_name, number, percent, whole

if TYPE_CHECKING:
    from regraft.diagnosis import CompatibilityPoint, Diagnosis

ORDER = 50


def show(points: tuple[CompatibilityPoint, ...], diagnosis: Diagnosis, part: str) -> list[Section]:
    """Show how the old weights fare on each checkpoint.

    Args:
        points: The answer.
        diagnosis: The whole diagnosis.
        part: The part's name, for those of the charts.

    Returns:
        The section.
    """
    first, last, metric = points[0], points[-1], diagnosis.metric
    finding = (
        f"Over {len(points)} checkpoints the {metric} of the old weights goes from {number(first.score)} "
        f"({base_name(first.name)}) to {number(last.score)} ({base_name(last.name)}), with "
        f"{percent(last.agreement)} of predictions unchanged at the end."
    )
    rows = tuple(
        (
            point.name, whole(point.steps), number(point.distance, 2), number(point.score), number(point.loss),
            percent(point.agreement),
        )
        for point in points
    )  # fmt: skip
    head = ("checkpoint", "steps", "distance from the old base", metric, "loss", "agreement")
    figure = draw_compatibility(points, metric, diagnosis.check.floor)
    table = Table("Old weights on later checkpoints", head, rows)
    chart = Chart(f"{part}-compatibility", "Old weights on later checkpoints", finding, figure, table, wide=True)
    lead = "How the outdated weights, as they are, fare on checkpoints of the base further and further on."
    return [Section("compatibility", "Compatibility over checkpoints", lead, (Charts((chart,)),))]
