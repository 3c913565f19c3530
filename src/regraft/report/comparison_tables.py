"""Tables of a comparison beyond the task's own metric: what the upgrade brought, and lm-evaluation-harness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.page import Table
from regraft.report.wording import number, score_text
from regraft.task import find_metric

if TYPE_CHECKING:
    from regraft.methods import Comparison
    from regraft.task import Metric

KEEP_MEANING = "New knowledge is measured on what the task names in `keep`, old behaviour on the task itself."
"""How to read the table of `keep`."""


def keep_table(comparison: Comparison) -> Table | None:
    """Return new knowledge × old behaviour: the scores on `keep` beside those on the task.

    Args:
        comparison: A comparison of methods.

    Returns:
        The table, with a row for each base, the old deployment and each method; None without `keep`.
    """
    keep = comparison.keep
    if keep is None:
        return None
    keep_metric, metric = find_metric(keep.metric), find_metric(comparison.metric)
    figures = [
        ("old base", keep.old_base, None),
        ("new base", keep.new_base, comparison.majority),
        ("old deployment", keep.old, comparison.old),
        *((row.method, row.keep, row.test) for row in comparison.rows),
    ]
    columns = ("model", f"new knowledge: {_describe(keep_metric)}", f"old behaviour: {_describe(metric)}")
    rows = [(name, score_text(new, keep_metric), score_text(old, metric)) for name, new, old in figures]
    return Table("New knowledge × old behaviour", columns, tuple(rows))


def harness_table(comparison: Comparison) -> Table | None:
    """Return the scores by lm-evaluation-harness of the old deployment and each method; None without.

    Args:
        comparison: A comparison of methods.
    """
    scores = comparison.lm_eval
    if not scores:
        return None
    names = list(dict.fromkeys((task, metric) for tasks in scores.values() for task in tasks for metric in tasks[task]))
    rows = tuple(
        (model, *(number(tasks.get(task, {}).get(metric)) for task, metric in names)) for model, tasks in scores.items()
    )
    return Table("lm-evaluation-harness, first seed", ("model", *(f"{task} {metric}" for task, metric in names)), rows)


def _describe(metric: Metric) -> str:
    """Return a metric's name, which says so if lower is better."""
    return metric.name if metric.higher_is_better else f"{metric.name} (lower is better)"
