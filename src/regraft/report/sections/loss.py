"""Where the two models lie in the loss: the line between them, the plane through three, and later checkpoints."""

from __future__ import annotations

import math
from typing import Any

from regraft.report.charts import draw_compatibility, draw_plane, draw_segment
from regraft.report.page import Chart, Charts, Section, Table
from regraft.report.wording import base_name, listing, number, percent, whole


def loss_sections(diagnosis: dict[str, Any], part: str) -> list[Section]:
    """Show connectivity, the loss plane and compatibility over checkpoints.

    Args:
        diagnosis: Its content.
        part: The part's name, for those of the charts.

    Returns:
        A section for each that was asked.
    """
    sections = []
    if (segment := diagnosis["connectivity"]) and segment["mu"] and segment["loss"]:
        sections.append(_connectivity(segment, diagnosis["metric"], part))
    plane = diagnosis["plane"]
    if plane and len(plane["x"]) > 1 < len(plane["y"]) and _finite(plane):
        sections.append(_plane(plane, diagnosis["metric"], part))
    if diagnosis["compatibility"]:
        sections.append(_compatibility(diagnosis, part))
    return sections


def _connectivity(segment: dict[str, Any], metric: str, part: str) -> Section:
    ends = segment["ends"]
    barriers = listing(f"{number(height)} on {split}" for split, height in segment["barrier"].items())
    verdict = "are linearly connected" if segment["connected"] else "are not linearly connected"
    between = f"{ends[0]} (μ = 0) and {ends[1]} (μ = 1)"
    charts = []
    for what, values in (("loss", segment["loss"]), ("score", segment["score"])):
        if not values:
            continue
        told = "cross-entropy loss" if what == "loss" else metric
        finding = f"Between {between} the {told} "
        finding += listing(
            f"on {split} goes from {number(along[0])} to {number(along[-1])}, at {_worst(what)} "
            f"{number(max(along) if what == 'loss' else min(along))}"
            for split, along in values.items()
        )
        finding += f"; the barrier is {barriers}." if what == "loss" and barriers else "."
        columns = tuple(zip(segment["mu"], *values.values(), strict=True))
        rows = tuple((number(at, 2), *(number(value, 4) for value in rest)) for at, *rest in columns)
        table = Table(f"{told} along the segment", ("μ", *values), rows)
        figure = draw_segment(segment["mu"], values, told, ends, barrier=what == "loss")
        title = f"{'Loss' if what == 'loss' else f'Score ({metric})'} along the segment"
        charts.append(Chart(f"{part}-connectivity-{what}", title, finding, figure, table))
    lead = (
        f"{_upper(ends[0])} and {ends[1]} {verdict}: walking straight from one to the other, the loss rises above the "
        f"line between its ends by at most {barriers}."
    )
    return Section("connectivity", "Linear mode connectivity", lead, (Charts(tuple(charts)),))


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _worst(what: str) -> str:
    return "most" if what == "loss" else "least"


def _plane(plane: dict[str, Any], metric: str, part: str) -> Section:
    values = _finite(plane)
    finding = (
        f"On the plane through {listing(plane['names'])} the loss on {plane['split']} runs from {number(min(values))} "
        f"to {number(max(values))}; the three lie at {listing(_places(plane))}."
    )
    rows = tuple(
        (number(x, 2), number(y, 2), number(loss, 4), number(score, 4))
        for y, losses, scores in zip(plane["y"], plane["loss"], plane["score"], strict=True)
        for x, loss, score in zip(plane["x"], losses, scores, strict=True)
    )
    table = Table("Loss on the plane", ("along", "across", "loss", metric), rows)
    chart = Chart(
        f"{part}-plane", "Loss on the plane through three models", finding, draw_plane(plane), table, wide=True
    )
    lead = "Dark is a high loss. Models in one basin have no ridge between them."
    return Section("plane", "Loss plane", lead, (Charts((chart,)),))


def _finite(plane: dict[str, Any]) -> list[float]:
    return [value for row in plane["loss"] for value in row if math.isfinite(value)]


def _places(plane: dict[str, Any]) -> list[str]:
    return [f"({number(x, 2)}, {number(y, 2)})" for x, y in plane["places"]]


def _compatibility(diagnosis: dict[str, Any], part: str) -> Section:
    points, metric = diagnosis["compatibility"], diagnosis["metric"]
    first, last = points[0], points[-1]
    finding = (
        f"Over {len(points)} checkpoints the {metric} of the old weights goes from {number(first['score'])} "
        f"({base_name(first['name'])}) to {number(last['score'])} ({base_name(last['name'])}), with "
        f"{percent(last['agreement'])} of predictions unchanged at the end."
    )
    rows = tuple(
        (
            point["name"], whole(point["steps"]), number(point["distance"], 2), number(point["score"]),
            number(point["loss"]), percent(point["agreement"]),
        )
        for point in points
    )  # fmt: skip
    head = ("checkpoint", "steps", "distance from the old base", metric, "loss", "agreement")
    figure = draw_compatibility(points, metric, diagnosis["check"]["floor"])
    table = Table("Old weights on later checkpoints", head, rows)
    chart = Chart(f"{part}-compatibility", "Old weights on later checkpoints", finding, figure, table, wide=True)
    lead = "How the outdated weights, as they are, fare on checkpoints of the base further and further on."
    return Section("compatibility", "Compatibility over checkpoints", lead, (Charts((chart,)),))
