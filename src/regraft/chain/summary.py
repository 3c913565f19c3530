"""Summarises a chain: mean scores over seeds, recoveries, and the loss with each hop."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING

from regraft.task import deviation, find_metric, recovery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.chain.record import ChainRow


@dataclasses.dataclass(frozen=True)
class RouteSummary:
    """One method and route for one task and kind, averaged over seeds.

    Args:
        task: The task's name.
        kind: The adaptation's kind.
        method: The method.
        route: The route; None for a method that has none.
        scores: The mean score on each base, in order; None where there is none yet.
        deviations: The standard deviation over seeds on each base; None for one seed.
        recoveries: On each base, the mean of (score − guessing) / (scratch's score − guessing); None on the first base
            and where scratch is less than 3 points above guessing.
        decay: By how much the score gets worse with each hop: the slope of a straight line through the scores; None for
            fewer than two bases.
        seeds: The number of seeds.
        refused: Why there are no scores, if a run was refused.
        metric: The metric of the scores.
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
    """Average the results of a chain over seeds.

    Args:
        bases: The names of the bases.
        rows: The result of each hop.

    Returns:
        For each task and kind: scratch, then each method by its routes.
    """
    summaries = []
    for task, kind in dict.fromkeys((row.task, row.kind) for row in rows):
        task_rows = [row for row in rows if (row.task, row.kind) == (task, kind)]
        tuned = [row for row in task_rows if row.base == 0]
        scratch = {(row.base, row.seed): row for row in task_rows if row.method == "scratch"}
        for method in dict.fromkeys(row.method for row in task_rows if row.base):
            method_rows = [row for row in task_rows if row.method == method]
            start = [] if method == "scratch" else tuned
            routes: list[str | None] = [route for route in dict.fromkeys(row.route for row in method_rows) if route]
            for route in routes or [None]:
                route_rows = [row for row in method_rows if row.route in (None, route)]
                summaries.append(_summarise(method, route, [*start, *route_rows], scratch, len(bases)))
    return summaries


def _summarise(
    method: str,
    route: str | None,
    rows: list[ChainRow],
    scratch: dict[tuple[int, int], ChainRow],
    bases: int,
) -> RouteSummary:
    """Average the rows of one task, kind, method and route over seeds; `scratch` is by base and seed."""
    measured = [[row for row in rows if row.base == number and row.score is not None] for number in range(bases)]
    scores_by_base = [[row.score for row in base_rows if row.score is not None] for base_rows in measured]
    means = [statistics.fmean(scores) if scores else None for scores in scores_by_base]
    points = [(number, mean) for number, mean in enumerate(means) if mean is not None]
    slope = None
    if method != "scratch" and len(points) > 1:
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
    metric = find_metric(rows[0].metric)
    return RouteSummary(
        task=rows[0].task,
        kind=rows[0].kind,
        method=method,
        route=route,
        scores=tuple(means),
        deviations=tuple(deviation(scores) for scores in scores_by_base),
        recoveries=tuple(
            _mean_recovery(base_rows, scratch) if number else None for number, base_rows in enumerate(measured)
        ),
        decay=None if slope is None else -metric.merit(slope),
        seeds=len({row.seed for row in rows}),
        refused=next((row.refused for row in rows if row.refused), None),
        metric=metric.name,
    )


def _mean_recovery(rows: list[ChainRow], scratch: dict[tuple[int, int], ChainRow]) -> float | None:
    """Average the recoveries on one base; None if a seed has no recovery."""
    recoveries = []
    for row in rows:
        reference = scratch.get((row.base, row.seed))
        if row.score is None or reference is None or reference.score is None or reference.majority is None:
            return None
        share = recovery(row.score, reference.majority, reference.score, find_metric(row.metric))
        if share is None:
            return None
        recoveries.append(share)
    return statistics.fmean(recoveries) if recoveries else None
