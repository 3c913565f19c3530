"""How far the upgrade moved the base, against what tuning had moved; and whether its gain is kept."""

from __future__ import annotations

from typing import Any

from regraft.report.charts import draw_angles, draw_kept, draw_moved
from regraft.report.page import Chart, Charts, Facts, Section, Table
from regraft.report.wording import NONE, number, percent


def distance_sections(diagnosis: dict[str, Any], part: str) -> list[Section]:
    """Show distances and what is kept of the upgrade.

    Args:
        diagnosis: Its content.
        part: The part's name, for those of the charts.

    Returns:
        A section for each that was asked.
    """
    sections = []
    if diagnosis["shift"]:
        sections.append(_distance(diagnosis["shift"], part))
    if (kept := diagnosis["kept"]) and kept["loss"]:
        sections.append(_kept(kept, part))
    return sections


def _distance(shift: dict[str, Any], part: str) -> Section:
    whole = shift["whole"]
    charts = []
    for by in ("layers", "kinds"):
        moved, name = shift[by], by[:-1]
        if not moved:
            continue
        names = [one["name"] for one in moved]
        shifts, deltas = ([100 * _relative(one, what) for one in moved] for what in ("shift", "delta"))
        top = max(range(len(moved)), key=shifts.__getitem__)
        finding = (
            f"By {name}: the upgrade moved {names[top]} most, by {number(shifts[top], 1)} % of its norm, where tuning "
            f"moved it by {number(deltas[top], 1)} %."
        )
        rows = tuple((one["name"], number(one["base"], 2), *_cells(one)) for one in moved)
        head = (name, "norm of the base", "base shift", "delta", "cosine", "equal signs", "subspace overlap")
        table = Table(f"Distance by {name}", head, rows)
        figure = draw_moved(names, shifts, deltas)
        charts.append(Chart(f"{part}-distance-{by}", f"Distance by {name}", finding, figure, table))
        angles = {what: [one[what] for one in moved] for what in ("cosine", "signs", "overlap")}
        if any(value is not None for values in angles.values() for value in values):
            figure = draw_angles(names, angles["cosine"], angles["signs"], angles["overlap"])
            finding = f"By {name}: " + "; ".join(_range(what, values) for what, values in angles.items() if any(values))
            title = f"Shift against delta by {name}"
            charts.append(Chart(f"{part}-angles-{by}", title, f"{finding}.", figure, table))
    facts = (
        ("base shift", percent(_relative(whole, "shift")), f"of the old base's norm of {number(whole['base'], 2)}"),
        ("delta", percent(_relative(whole, "delta")), "how far tuning had moved it, the same way"),
        ("cosine", number(whole["cosine"]), "of shift and delta: 0 is neither with nor against"),
        ("equal signs", percent(whole["signs"]), "entries that both move the same way"),
        ("overlap", number(whole["overlap"]), "of leading subspaces: mean squared cosine"),
    )
    lead = (
        "The base shift is new base minus old base, the delta is tuned minus old base; both relative to the old base."
    )
    known = tuple(fact for fact in facts if fact[1] != NONE)
    blocks = (Facts(known), Charts(tuple(charts))) if charts else (Facts(known),)
    return Section("distance", "Distance", lead, blocks)


def _relative(one: dict[str, Any], what: str) -> float:
    return one[what] / one["base"] if one["base"] else 0.0


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    moved = (percent(_relative(one, what), 2) for what in ("shift", "delta"))
    return (*moved, number(one["cosine"]), percent(one["signs"]), number(one["overlap"]))


def _range(what: str, values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    name = {"signs": "share of equal signs", "overlap": "subspace overlap"}.get(what, what)
    return f"{name} from {number(min(known))} to {number(max(known))}"


def _kept(kept: dict[str, Any], part: str) -> Section:
    share = kept["share"]
    told = _named(kept["loss"])
    finding = f"Language-modelling loss: {told}"
    finding += f"; the recycled model keeps {number(share, 0)} % of the new base's gain." if share is not None else "."
    rows = tuple((name, number(value, 4)) for name, value in kept["loss"].items())
    table = Table("Language-modelling loss", ("model", "nats a token"), rows)
    chart = Chart(f"{part}-kept", "Language-modelling loss", finding, draw_kept(kept["loss"]), table, wide=True)
    lead = f"Whether what the new base learnt survives in the deployment, measured on {kept['text']}."
    facts = () if share is None else (("kept", f"{number(share, 0)} %", "of the new base's gain"),)
    return Section(
        "kept", "Keeps the upgrade", lead, (Facts(facts), Charts((chart,))) if facts else (Charts((chart,)),)
    )


def _named(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in values.items())
