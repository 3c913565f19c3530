"""How adaptations fare along a chain: means over seeds, and what each hop loses."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from regraft.task import deviation, find_metric, recovery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.chain.record import ChainRow


@dataclasses.dataclass(frozen=True)
class RouteSummary:
    """One method and route for one task and kind, over seeds.

    Args:
        task: The task's name.
        kind: The kind.
        method: The method.
        route: The route; None for what has none.
        scores: The mean score on each base, the first one's first; None where there is none yet.
        deviations: Their standard deviations over seeds; None for one seed.
        recoveries: On each base, the mean of (score − guessing) / (scratch's − guessing); None on the first base and
            where scratch is less than 3 points above guessing.
        decay: By how much the score gets worse a hop: the slope of a straight line through the scores; None
            for fewer than two bases.
        seeds: How many seeds.
        refused: Why there is nothing, if so.
        metric: What the scores are by.
    """

    task: str
    kind: str
    method: str
    route: str | None
    scores: tuple[float | None, ...]
    deviations: tuple[float | None, ...]
    recoveries: tuple[float | None, ...]
    decay: float | None
    seeds: int
    refused: str | None
    metric: str


def summarise_routes(bases: Sequence[str], rows: Sequence[ChainRow]) -> list[RouteSummary]:
    """Average over seeds.

    Args:
        bases: The names of the bases.
        rows: Every hop.

    Returns:
        For each task and kind: scratch, then each method by its routes.
    """
    lines = []
    for task, kind in dict.fromkeys((row.task, row.kind) for row in rows):
        group = [row for row in rows if (row.task, row.kind) == (task, kind)]
        first = [row for row in group if row.base == 0]
        scratch = {(row.base, row.seed): row for row in group if row.method == "scratch"}
        for method in dict.fromkeys(row.method for row in group if row.base):
            of = [row for row in group if row.method == method]
            routes: list[str | None] = [route for route in dict.fromkeys(row.route for row in of) if route]
            for route in routes or [None]:
                along = [row for row in of if row.route in (None, route)]
                start = [] if method == "scratch" else first
                lines.append(_standing(task, kind, method, route, [*start, *along], scratch, len(bases)))
    return lines


def _standing(
    task: str, kind: str, method: str, route: str | None, rows: list[ChainRow],
    scratch: dict[tuple[int, int], ChainRow], count: int,
) -> RouteSummary:  # fmt: skip
    on = [[row for row in rows if row.base == number and row.score is not None] for number in range(count)]
    scores = [statistics.fmean(_scores(several)) if several else None for several in on]
    measured = [(number, score) for number, score in enumerate(scores) if score is not None]
    slope = None
    if method != "scratch" and len(measured) > 1:
        slope = statistics.linear_regression(*zip(*measured, strict=True)).slope
    metric = find_metric(rows[0].metric)
    return RouteSummary(
        task=task,
        kind=kind,
        method=method,
        route=route,
        scores=tuple(scores),
        deviations=tuple(deviation(_scores(several)) for several in on),
        recoveries=tuple(_recovery(several, scratch) if number else None for number, several in enumerate(on)),
        decay=None if slope is None else -metric.merit(slope),
        seeds=len({row.seed for row in rows}),
        refused=next((row.refused for row in rows if row.refused), None),
        metric=metric.name,
    )


def _scores(rows: list[ChainRow]) -> list[float]:
    return [row.score for row in rows if row.score is not None]


def _recovery(rows: list[ChainRow], scratch: dict[tuple[int, int], ChainRow]) -> float | None:
    shares = []
    for row in rows:
        reference: Any = scratch.get((row.base, row.seed))
        if reference is None or reference.score is None:
            return None
        assert row.score is not None
        if (share := recovery(row.score, reference.majority, reference.score, find_metric(row.metric))) is None:
            return None
        shares.append(share)
    return statistics.fmean(shares) if shares else None
