"""The section on the adaptation, untuned, on checkpoints of the base's continual pre-training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_compatibility
from regraft.report.page import Chart, Charts, Section, Table
from regraft.report.wording import base_name, integer, number, percent, score_text
from regraft.task import find_metric

if TYPE_CHECKING:
    from regraft.diagnosis import CompatibilityPoint, Diagnosis

ORDER = 50


def show(points: tuple[CompatibilityPoint, ...], diagnosis: Diagnosis, prefix: str) -> list[Section]:
    """Show the score, loss and agreement of the old adaptation on each checkpoint.

    Args:
        points: The scores on the old base, then on each checkpoint.
        diagnosis: The diagnosis that the answer belongs to.
        prefix: The prefix of the chart's name.

    Returns:
        A single section.
    """
    first = points[0]
    last = points[-1]
    metric = find_metric(diagnosis.metric)
    first_score, last_score = (score_text(point.score, metric) for point in (first, last))
    finding = (
        f"Over {len(points)} checkpoints the {metric.name} of the old weights goes from {first_score} "
        f"({base_name(first.name)}) to {last_score} ({base_name(last.name)})"
    )
    if last.agreement is not None:
        finding += f", with an agreement of {percent(last.agreement)} with the old deployment at the end"
    columns = ("checkpoint", "steps", "distance from the old base", metric.name, "loss", "agreement")
    rows = tuple(
        (
            point.name,
            integer(point.steps),
            number(point.distance, 2),
            score_text(point.score, metric),
            number(point.loss),
            percent(point.agreement),
        )
        for point in points
    )
    title = "Old weights on later checkpoints"
    figure = draw_compatibility(points, metric.name, diagnosis.check.floor, diagnosis.check.floor_name)
    chart = Chart(f"{prefix}-compatibility", title, f"{finding}.", figure, Table(title, columns, rows), wide=True)
    lead = "How well the old weights, without any tuning, work on later and later checkpoints of the base."
    return [Section("compatibility", "Compatibility over checkpoints", lead, (Charts((chart,)),))]
