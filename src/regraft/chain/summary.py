"""The summary of a chain: mean scores over seeds, recoveries, and the change of the score per hop."""

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
        task: The name of the task.
        kind: The kind of the adaptation.
        method: The name of the method.
        route: `hop by hop` or `at once`; None for scratch, and in a chain of two bases, where the routes are the same.
        scores: The mean score on each base, in the order of the chain; None on a base without results.
        deviations: The standard deviation over seeds on each base; None on a base with fewer than two scores.
        recoveries: On each base, the mean of (score − chance) / (scratch's score − chance) over seeds; None on the
            first base, on a base without scores, and where a seed has no recovery (see `regraft.task.recovery`).
        decay: The loss of score per hop, positive if the score gets worse: the slope of a least-squares line through
            the mean scores. None for scratch, and for fewer than two bases with scores.
        seeds: The number of seeds.
        refused: The reason of the first refused run; None if no run was refused.
        metric: The name of the metric of the scores.
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
        bases: The names of the bases, in the order of the chain.
        rows: The result of each hop, as `read_chain` and `run_chain` return them.

    Returns:
        For each task and kind: scratch, then each method, one summary per route.
    """
    summaries = []
    for task, kind in dict.fromkeys((row.task, row.kind) for row in rows):
        task_rows = [row for row in rows if (row.task, row.kind) == (task, kind)]
        tuned_rows = [row for row in task_rows if row.base == 0]
        scratch_rows = {(row.base, row.seed): row for row in task_rows if row.method == "scratch"}
        for method in dict.fromkeys(row.method for row in task_rows if row.base):
            method_rows = [row for row in task_rows if row.method == method]
            first_rows = [] if method == "scratch" else tuned_rows
            routes: list[str | None] = list(dict.fromkeys(row.route for row in method_rows if row.route))
            for route in routes or [None]:
                route_rows = [row for row in method_rows if row.route in (None, route)]
                summaries.append(_summarise(method, route, [*first_rows, *route_rows], scratch_rows, len(bases)))
    return summaries


def _summarise(
    method: str,
    route: str | None,
    rows: list[ChainRow],
    scratch_rows: dict[tuple[int, int], ChainRow],
    num_bases: int,
) -> RouteSummary:
    """Average the rows of one task, kind, method and route over seeds; `scratch_rows` are by base and seed."""
    rows_by_base: list[list[ChainRow]] = [[] for _ in range(num_bases)]
    scores_by_base: list[list[float]] = [[] for _ in range(num_bases)]
    for row in rows:
        if row.score is not None and row.base < num_bases:
            rows_by_base[row.base].append(row)
            scores_by_base[row.base].append(row.score)
    means = [statistics.fmean(scores) if scores else None for scores in scores_by_base]
    metric = find_metric(rows[0].metric)
    scored_bases = [base for base, mean in enumerate(means) if mean is not None]
    scored_means = [mean for mean in means if mean is not None]
    decay = None
    if method != "scratch" and len(scored_means) > 1:
        slope = statistics.linear_regression(scored_bases, scored_means).slope
        decay = 0.0 - metric.merit(slope)  # not -merit, which would be -0.0 for equal scores
    later_recoveries = [_mean_recovery(base_rows, scratch_rows) for base_rows in rows_by_base[1:]]
    return RouteSummary(
        task=rows[0].task,
        kind=rows[0].kind,
        method=method,
        route=route,
        scores=tuple(means),
        deviations=tuple(deviation(scores) for scores in scores_by_base),
        recoveries=(None, *later_recoveries),
        decay=decay,
        seeds=len({row.seed for row in rows}),
        refused=next((row.refused for row in rows if row.refused), None),
        metric=metric.name,
    )


def _mean_recovery(rows: list[ChainRow], scratch_rows: dict[tuple[int, int], ChainRow]) -> float | None:
    """Average the recoveries on one base over seeds; return None if a seed has no recovery."""
    recoveries = []
    for row in rows:
        reference = scratch_rows.get((row.base, row.seed))
        if row.score is None or reference is None or reference.score is None or reference.majority is None:
            return None
        seed_recovery = recovery(row.score, reference.majority, reference.score, find_metric(row.metric))
        if seed_recovery is None:
            return None
        recoveries.append(seed_recovery)
    return statistics.fmean(recoveries) if recoveries else None
