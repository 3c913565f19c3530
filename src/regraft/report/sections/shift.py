"""The section on the upgrade's shift of the base, compared with the adaptation's delta."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_group_shifts, draw_shift_angles
from regraft.report.page import Block, Chart, Charts, Facts, Section, Table
from regraft.report.wording import MISSING, number, percent

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Shift
    from regraft.diagnosis.shift import GroupShift

ORDER = 70


def show(shift: Shift, diagnosis: Diagnosis, prefix: str) -> list[Section]:
    """Show shift and delta of the body, by layer and by kind of tensor.

    Args:
        shift: The norms and angles of shift and delta.
        diagnosis: The diagnosis that the answer belongs to.
        prefix: The prefix of the charts' names.

    Returns:
        A single section.
    """
    body = shift.whole
    facts = (
        ("base shift", percent(_relative_norm(body.shift, body)), f"of the old base's norm of {number(body.base, 2)}"),
        ("delta", percent(_relative_norm(body.delta, body)), "how far tuning had moved it, the same way"),
        ("cosine", number(body.cosine), "of shift and delta: 0 is neither with nor against"),
        ("equal signs", percent(body.signs), "entries that both move the same way"),
        ("overlap", number(body.overlap), "of leading subspaces: mean squared cosine"),
    )
    blocks: list[Block] = [Facts(tuple(fact for fact in facts if fact[1] != MISSING))]
    charts: list[Chart] = []
    for grouping, groups in (("layer", shift.layers), ("kind", shift.kinds)):
        if groups:
            charts += _group_charts(grouping, groups, prefix)
    if charts:
        blocks.append(Charts(tuple(charts)))
    lead = (
        "The base shift is new base minus old base, the delta is tuned minus old base; both relative to the old base."
    )
    return [Section("distance", "Distance", lead, tuple(blocks))]


def _group_charts(grouping: str, groups: tuple[GroupShift, ...], prefix: str) -> list[Chart]:
    """Return the chart of the norms of shift and delta, and, where there are deltas, the chart of their angles."""
    names = [group.name for group in groups]
    shifts = [100 * _relative_norm(group.shift, group) for group in groups]
    deltas = [100 * _relative_norm(group.delta, group) for group in groups]
    largest = max(range(len(groups)), key=shifts.__getitem__)
    finding = (
        f"By {grouping}: the upgrade moved {names[largest]} most, by {number(shifts[largest], 1)} % of its norm, where "
        f"tuning moved it by {number(deltas[largest], 1)} %."
    )
    title = f"Distance by {grouping}"
    columns = (grouping, "norm of the base", "base shift", "delta", "cosine", "equal signs", "subspace overlap")
    table = Table(title, columns, tuple(_row(group) for group in groups))
    figure = draw_group_shifts(names, shifts, deltas)
    charts = [Chart(f"{prefix}-distance-{grouping}s", title, finding, figure, table)]
    angles = {
        "cosine": [group.cosine for group in groups],
        "equal signs": [group.signs for group in groups],
        "subspace overlap": [group.overlap for group in groups],
    }
    measured = {name: [measure for measure in measures if measure is not None] for name, measures in angles.items()}
    ranges = [
        f"{name} from {number(min(measures))} to {number(max(measures))}"
        for name, measures in measured.items()
        if measures
    ]
    if ranges:
        title = f"Shift against delta by {grouping}"
        finding = f"By {grouping}: {'; '.join(ranges)}."
        figure = draw_shift_angles(names, angles)
        charts.append(Chart(f"{prefix}-angles-{grouping}s", title, finding, figure, table))
    return charts


def _relative_norm(norm: float, group: GroupShift) -> float:
    return norm / group.base if group.base else 0.0


def _row(group: GroupShift) -> tuple[str, ...]:
    return (
        group.name,
        number(group.base, 2),
        percent(_relative_norm(group.shift, group), 2),
        percent(_relative_norm(group.delta, group), 2),
        number(group.cosine),
        percent(group.signs),
        number(group.overlap),
    )
