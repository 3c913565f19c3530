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
    grids = {"loss": plane.loss, diagnosis.metric: plane.score} if plane.score else {"loss": plane.loss}
    rows = tuple(
        (number(x, 2), number(y, 2), *(number(figure, 4) for figure in figures))
        for y, *grid_rows in zip(plane.y, *grids.values(), strict=True)
        for x, *figures in zip(plane.x, *grid_rows, strict=True)
    )
    table = Table("Loss on the plane", ("along", "across", *grids), rows)
    title = "Loss on the plane through three models"
    chart = Chart(f"{prefix}-plane", title, finding, draw_plane(plane), table, wide=True)
    lead = "Dark is a high loss. Models in one basin have no ridge between them."
    return [Section("plane", "Loss plane", lead, (Charts((chart,)),))]
