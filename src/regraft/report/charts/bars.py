"""Bar charts and dot plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts.style import (
    BLUE,
    INK,
    MIDDLE,
    PAPER,
    SOFT,
    VERMILLION,
    add_legend,
    cap_score_axis,
    new_figure,
)
from regraft.report.wording import number, score_axis_label, score_text, shorten
from regraft.task import find_metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regraft.report.summaries import Setting
    from regraft.task import Metric


def draw_method_scores(setting: Setting) -> Figure:
    """Draw the score of each method with its deviation.

    The chance score and the old deployment's score are lines, unless they are at least as much worse than the worst
    score as that is worse than the best.

    Args:
        setting: The summaries of the methods, at least one of them with a score.

    Returns:
        The figure, one row per method.
    """
    scores = {summary.method: summary.score for summary in setting.summaries if summary.score is not None}
    deviations = {summary.method: summary.deviation or 0.0 for summary in setting.summaries}
    metric = find_metric(setting.metric)
    figure = new_figure(MIDDLE, 1.2 + 0.27 * len(scores))
    axes = figure.add_subplot()
    for y, (method, score) in enumerate(scores.items()):
        _draw_method(axes, y, method, score, deviations[method], metric)
    merits = [metric.merit(score) for score in scores.values()]
    low, high = min(merits), max(merits)
    levels = ((setting.chance, setting.chance_name, (0, (1, 2))), (setting.old_score, "old deployment", (0, (5, 2))))
    for level, name, dashes in levels:
        if level is not None and low - metric.merit(level) < high - low:  # one far away would squeeze the methods
            label = f"{name} {score_text(level, metric)}"
            axes.axvline(level, color=SOFT, linewidth=1.1, linestyle=dashes, label=label)
    axes.set_yticks(range(len(scores)), [shorten(method, 28) for method in scores], color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.6 / max(1, len(scores)))
    cap_score_axis(axes, metric, "x")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(score_axis_label(metric, setting.split))
    add_legend(axes)
    return figure


def _draw_method(axes: Axes, y: int, method: str, score: float, deviation: float, metric: Metric) -> None:
    """Draw the score of one method with its deviation and its value."""
    is_scratch = method == "scratch"
    axes.errorbar(
        score,
        y,
        xerr=deviation or None,
        color=INK if is_scratch else BLUE,
        marker="s" if is_scratch else "o",
        markersize=6,
        capsize=3,
        linewidth=1.4,
    )
    axes.annotate(
        score_text(score, metric),
        (score + deviation, y),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.2},
    )


def draw_group_shifts(names: Sequence[str], shift: Sequence[float], delta: Sequence[float]) -> Figure:
    """Draw the norms of the upgrade's shift and of the adaptation's delta for each group of tensors.

    Args:
        names: The names of the groups.
        shift: The norm of each group's shift, in % of the norm of the group's tensors in the old base.
        delta: The norm of each group's delta, in the same unit.

    Returns:
        The figure, one row per group.
    """
    figure = new_figure(height=max(2.6, 1.3 + 0.2 * len(names)))
    axes = figure.add_subplot()
    centres = range(len(names))
    shift_bars = [y - 0.19 for y in centres]
    delta_bars = [y + 0.19 for y in centres]
    axes.barh(shift_bars, shift, 0.36, color=BLUE, label="base shift")
    axes.barh(delta_bars, delta, 0.36, facecolor="none", edgecolor=VERMILLION, hatch="//////", label="delta")
    axes.set_yticks(centres, [shorten(name, 18) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("% of the old base's norm")
    axes.margins(y=0.03)
    add_legend(axes)
    return figure


def draw_retention(loss: Mapping[str, float]) -> Figure:
    """Draw the language-modelling loss of bases and deployments.

    Args:
        loss: The loss of each model in nats per token, by the model's name as in `Retention.loss`.

    Returns:
        The figure, one row per model.
    """
    figure = new_figure(MIDDLE, 0.8 + 0.3 * len(loss))
    axes = figure.add_subplot()
    for y, (name, nats) in enumerate(loss.items()):
        colour = BLUE if name.startswith("new") else VERMILLION
        axes.plot(nats, y, marker="o" if "base" in name else "s", markersize=8, color=colour, linestyle="none")
        axes.annotate(number(nats), (nats, y), xytext=(9, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(loss)), [shorten(name, 24) for name in loss], color=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("language-modelling loss (nats a token), lower is better")
    axes.margins(x=0.14, y=0.2)
    return figure
