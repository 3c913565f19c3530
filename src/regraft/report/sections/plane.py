"""The loss on the plane through three models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_plane
from regraft.report.page import Chart, Charts, Section, Table
from regraft.report.wording import finite, listing, number

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Plane

ORDER = 40


def show(plane: Plane, diagnosis: Diagnosis, part: str) -> list[Section]:
    """Show the loss on the plane.

    Args:
        plane: The answer.
        diagnosis: The whole diagnosis.
        part: The part's name, for those of the charts.

    Returns:
        The section; none where the plane has no area or no finite loss.
    """
    values = finite(value for row in plane.loss for value in row)
    if len(plane.x) < 2 or len(plane.y) < 2 or not values:
        return []
    places = [f"({number(x, 2)}, {number(y, 2)})" for x, y in plane.places]
    finding = (
        f"On the plane through {listing(plane.names)} the loss on {plane.split} runs from {number(min(values))} "
        f"to {number(max(values))}; the three lie at {listing(places)}."
    )
    rows = tuple(
        (number(x, 2), number(y, 2), number(loss, 4), number(score, 4))
        for y, losses, scores in zip(plane.y, plane.loss, plane.score, strict=True)
        for x, loss, score in zip(plane.x, losses, scores, strict=True)
    )
    table = Table("Loss on the plane", ("along", "across", "loss", diagnosis.metric), rows)
    chart = Chart(
        f"{part}-plane", "Loss on the plane through three models", finding, draw_plane(plane), table, wide=True
    )
    lead = "Dark is a high loss. Models in one basin have no ridge between them."
    return [Section("plane", "Loss plane", lead, (Charts((chart,)),))]
