"""The section on the loss on the plane through three models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_plane
from regraft.report.page import Chart, Charts, Section, Table
from regraft.report.wording import finite_values, join_words, number

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Plane

ORDER = 40


def show(plane: Plane, diagnosis: Diagnosis, prefix: str) -> list[Section]:
    """Show the loss on the plane.

    Args:
        plane: The losses and scores on the grid.
        diagnosis: The diagnosis that the answer belongs to.
        prefix: The prefix of the chart's name.

    Returns:
        A single section; none if the plane has no area, or if all losses are infinite or NaN.
    """
    losses = finite_values(loss for row in plane.loss for loss in row)
    if len(plane.x) < 2 or len(plane.y) < 2 or not losses:
        return []
    coordinates = join_words(f"({number(x, 2)}, {number(y, 2)})" for x, y in plane.places)
    finding = (
        f"On the plane through {join_words(plane.names)} the loss on {plane.split} runs from {number(min(losses))} "
        f"to {number(max(losses))}; the three lie at {coordinates}."
    )
    rows = tuple(
        (number(x, 2), number(y, 2), number(loss, 4), number(score, 4))
        for y, row_losses, row_scores in zip(plane.y, plane.loss, plane.score, strict=True)
        for x, loss, score in zip(plane.x, row_losses, row_scores, strict=True)
    )
    table = Table("Loss on the plane", ("along", "across", "loss", diagnosis.metric), rows)
    title = "Loss on the plane through three models"
    chart = Chart(f"{prefix}-plane", title, finding, draw_plane(plane), table, wide=True)
    lead = "Dark is a high loss. Models in one basin have no ridge between them."
    return [Section("plane", "Loss plane", lead, (Charts((chart,)),))]
