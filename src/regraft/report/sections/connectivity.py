"""The section on loss and score on the straight line between the two deployments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_segment
from regraft.report.page import Chart, Charts, Section, Table
from regraft.report.wording import join_words, number, score_text
from regraft.task import find_metric

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis, Segment
    from regraft.task import Metric

ORDER = 30


def show(segment: Segment, diagnosis: Diagnosis, prefix: str) -> list[Section]:
    """Show loss and score along the segment.

    Args:
        segment: The losses and scores along the segment.
        diagnosis: The diagnosis that the answer belongs to.
        prefix: The prefix of the charts' names.

    Returns:
        A single section; none if the segment has no points.
    """
    if not segment.mu or not segment.loss:
        return []
    barriers = join_words(f"{number(height)} on {split}" for split, height in segment.barrier.items())
    charts = [_loss_chart(segment, barriers, prefix)]
    if segment.score:
        charts.append(_score_chart(segment, find_metric(diagnosis.metric), prefix))
    first, second = segment.ends
    verdict = "are linearly connected" if segment.connected else "are not linearly connected"
    lead = (
        f"{first[:1].upper()}{first[1:]} and {second} {verdict}: on the straight line from one to the other, the loss "
        f"rises above the line between its end values by at most {barriers}."
    )
    return [Section("connectivity", "Linear mode connectivity", lead, (Charts(tuple(charts)),))]


def _loss_chart(segment: Segment, barriers: str, prefix: str) -> Chart:
    """Draw the loss along the segment; `barriers` says the barrier of each split in words."""
    measure = "loss (nats)"
    courses = join_words(
        f"on {split} goes from {number(losses[0])} to {number(losses[-1])}, at most {number(max(losses))}"
        for split, losses in segment.loss.items()
    )
    finding = f"{_describe_ends(segment)} the {measure} {courses}"
    finding += f"; the barrier is {barriers}." if barriers else "."
    return Chart(
        name=f"{prefix}-connectivity-loss",
        title="Loss along the segment",
        finding=finding,
        figure=draw_segment(segment.mu, segment.loss, measure, segment.ends),
        table=_table(segment.mu, segment.loss, measure),
    )


def _score_chart(segment: Segment, metric: Metric, prefix: str) -> Chart:
    limit = "at least" if metric.higher_is_better else "at most"
    courses = join_words(
        f"on {split} goes from {score_text(scores[0], metric)} to {score_text(scores[-1], metric)}, {limit} "
        f"{score_text(min(scores, key=metric.merit), metric)}"
        for split, scores in segment.score.items()
    )
    return Chart(
        name=f"{prefix}-connectivity-score",
        title=f"Score ({metric.name}) along the segment",
        finding=f"{_describe_ends(segment)} the {metric.name} {courses}.",
        figure=draw_segment(segment.mu, segment.score, metric, segment.ends),
        table=_table(segment.mu, segment.score, metric.name),
    )


def _describe_ends(segment: Segment) -> str:
    return f"Between {segment.ends[0]} (μ = 0) and {segment.ends[1]} (μ = 1)"


def _table(mu: tuple[float, ...], curves: dict[str, tuple[float, ...]], measure: str) -> Table:
    rows = tuple(
        (number(point, 2), *(number(height, 4) for height in heights))
        for point, *heights in zip(mu, *curves.values(), strict=True)
    )
    return Table(f"{measure} along the segment", ("μ", *curves), rows)
