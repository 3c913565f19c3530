"""Loss and score on the straight line between the two deployments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_segment
from regraft.report.page import Chart, Charts, Section, Table
from regraft.report.wording import listing, number

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Segment

ORDER = 30


def show(segment: Segment, diagnosis: Diagnosis, part: str) -> list[Section]:
    """Show loss and score along the segment.

    Args:
        segment: The answer.
        diagnosis: The whole diagnosis.
        part: The part's name, for those of the charts.

    Returns:
        The section; none without points.
    """
    if not segment.mu or not segment.loss:
        return []
    ends = segment.ends
    barriers = listing(f"{number(height)} on {split}" for split, height in segment.barrier.items())
    verdict = "are linearly connected" if segment.connected else "are not linearly connected"
    between = f"{ends[0]} (μ = 0) and {ends[1]} (μ = 1)"
    charts = []
    for what, values in (("loss", segment.loss), ("score", segment.score)):
        if not values:
            continue
        measure = "cross-entropy loss" if what == "loss" else diagnosis.metric
        finding = f"Between {between} the {measure} "
        finding += listing(
            f"on {split} goes from {number(along[0])} to {number(along[-1])}, at {_worst(what)} "
            f"{number(max(along) if what == 'loss' else min(along))}"
            for split, along in values.items()
        )
        finding += f"; the barrier is {barriers}." if what == "loss" and barriers else "."
        columns = tuple(zip(segment.mu, *values.values(), strict=True))
        rows = tuple((number(at, 2), *(number(value, 4) for value in rest)) for at, *rest in columns)
        table = Table(f"{measure} along the segment", ("μ", *values), rows)
        figure = draw_segment(segment.mu, values, measure, ends, barrier=what == "loss")
        title = f"{'Loss' if what == 'loss' else f'Score ({diagnosis.metric})'} along the segment"
        charts.append(Chart(f"{part}-connectivity-{what}", title, finding, figure, table))
    lead = (
        f"{_upper(ends[0])} and {ends[1]} {verdict}: walking straight from one to the other, the loss rises above the "
        f"line between its ends by at most {barriers}."
    )
    return [Section("connectivity", "Linear mode connectivity", lead, (Charts(tuple(charts)),))]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _worst(what: str) -> str:
    return "most" if what == "loss" else "least"
