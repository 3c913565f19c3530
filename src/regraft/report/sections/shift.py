"""How far the upgrade moved the base, against what tuning had moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_angles, draw_moved
from regraft.report.page import Chart, Charts, Facts, Section, Table
from regraft.report.wording import NONE, number, percent

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Shift
    from regraft.diagnosis.shift import GroupShift

ORDER = 70


def show(shift: Shift, diagnosis: Diagnosis, part: str) -> list[Section]:
    """Show distances by layer and by kind of tensor.

    Args:
        shift: The answer.
        diagnosis: The whole diagnosis.
        part: The part's name, for those of the charts.

    Returns:
        The section.
    """
    whole = shift.whole
    charts = []
    for name, groups in (("layer", shift.layers), ("kind", shift.kinds)):
        if not groups:
            continue
        names = [group.name for group in groups]
        shifts = [100 * _relative(group.shift, group) for group in groups]
        deltas = [100 * _relative(group.delta, group) for group in groups]
        top = max(range(len(groups)), key=shifts.__getitem__)
        finding = (
            f"By {name}: the upgrade moved {names[top]} most, by {number(shifts[top], 1)} % of its norm, where tuning "
            f"moved it by {number(deltas[top], 1)} %."
        )
        rows = tuple((group.name, number(group.base, 2), *_cells(group)) for group in groups)
        head = (name, "norm of the base", "base shift", "delta", "cosine", "equal signs", "subspace overlap")
        table = Table(f"Distance by {name}", head, rows)
        figure = draw_moved(names, shifts, deltas)
        charts.append(Chart(f"{part}-distance-{name}s", f"Distance by {name}", finding, figure, table))
        angles = {
            "cosine": [group.cosine for group in groups],
            "share of equal signs": [group.signs for group in groups],
            "subspace overlap": [group.overlap for group in groups],
        }
        if any(value is not None for values in angles.values() for value in values):
            figure = draw_angles(names, *angles.values())
            finding = f"By {name}: " + "; ".join(_range(what, values) for what, values in angles.items() if any(values))
            title = f"Shift against delta by {name}"
            charts.append(Chart(f"{part}-angles-{name}s", title, f"{finding}.", figure, table))
    facts = (
        ("base shift", percent(_relative(whole.shift, whole)), f"of the old base's norm of {number(whole.base, 2)}"),
        ("delta", percent(_relative(whole.delta, whole)), "how far tuning had moved it, the same way"),
        ("cosine", number(whole.cosine), "of shift and delta: 0 is neither with nor against"),
        ("equal signs", percent(whole.signs), "entries that both move the same way"),
        ("overlap", number(whole.overlap), "of leading subspaces: mean squared cosine"),
    )
    lead = (
        "The base shift is new base minus old base, the delta is tuned minus old base; both relative to the old base."
    )
    measured = tuple(fact for fact in facts if fact[1] != NONE)
    blocks = (Facts(measured), Charts(tuple(charts))) if charts else (Facts(measured),)
    return [Section("distance", "Distance", lead, blocks)]


def _relative(norm: float, group: GroupShift) -> float:
    return norm / group.base if group.base else 0.0


def _cells(group: GroupShift) -> tuple[str, ...]:
    moved = (percent(_relative(norm, group), 2) for norm in (group.shift, group.delta))
    return (*moved, number(group.cosine), percent(group.signs), number(group.overlap))


def _range(name: str, values: list[float | None]) -> str:
    measured = [value for value in values if value is not None]
    return f"{name} from {number(min(measured))} to {number(max(measured))}"
