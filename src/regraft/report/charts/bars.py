"""Charts of amounts: bars and dots."""

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
from regraft.report.wording import clip, number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from regraft.report.summaries import Setting


def draw_methods(setting: Setting) -> Figure:
    """Draw the score of each method, with its spread, against scratch, the old deployment and a guess.

    Args:
        setting: The methods.

    Returns:
        The figure.
    """
    shown = [one for one in setting.standings if one.test is not None]
    figure = new_figure(MIDDLE, 1.2 + 0.27 * len(shown))
    axes = figure.add_subplot()
    for place, one in enumerate(shown):
        spread = one.deviation or 0.0
        colour = INK if one.method == "scratch" else BLUE
        axes.errorbar(
            one.test or 0.0, place, xerr=spread or None, color=colour, marker="s" if colour == INK else "o",
            markersize=6, capsize=3, linewidth=1.4,
        )  # fmt: skip
        axes.annotate(
            number(one.test), ((one.test or 0.0) + spread, place), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=8, color=INK, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.2},
        )  # fmt: skip
    values = [one.test or 0.0 for one in shown]
    levels = ((setting.floor, "guessing", (0, (1, 2))), (setting.old, "old deployment", (0, (5, 2))))
    for value, name, dashes in levels:
        if value is not None and min(values) - value < max(values) - min(values):  # far off, it would squeeze the rest
            axes.axvline(value, color=SOFT, linewidth=1.1, linestyle=dashes, label=f"{name} {number(value)}")
    axes.set_yticks(range(len(shown)), [clip(one.method, 28) for one in shown], color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.6 / max(1, len(shown)))
    cap_score_axis(axes, "x")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{setting.metric} on {setting.split}")
    add_legend(axes)
    return figure


def draw_moved(names: Sequence[str], shift: Sequence[float], delta: Sequence[float]) -> Figure:
    """Draw how far the upgrade and the tuning moved each part, relative to its norm.

    Args:
        names: The parts.
        shift: The base shift of each, in %.
        delta: The delta of each, in %.

    Returns:
        The figure.
    """
    figure = new_figure(height=max(2.6, 1.3 + 0.2 * len(names)))
    axes = figure.add_subplot()
    rows = range(len(names))
    axes.barh([row - 0.19 for row in rows], shift, 0.36, color=BLUE, label="base shift")
    axes.barh(
        [row + 0.19 for row in rows], delta, 0.36, facecolor="none", edgecolor=VERMILLION, hatch="//////", label="delta"
    )
    axes.set_yticks(rows, [clip(name, 18) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("% of the old base's norm")
    axes.margins(y=0.03)
    add_legend(axes)
    return figure


def draw_kept(loss: Mapping[str, float]) -> Figure:
    """Draw the language-modelling loss of bases and deployments.

    Args:
        loss: By model, in nats a token.

    Returns:
        The figure.
    """
    figure = new_figure(MIDDLE, 0.8 + 0.3 * len(loss))
    axes = figure.add_subplot()
    for place, (name, value) in enumerate(loss.items()):
        colour = BLUE if name.startswith("new") else VERMILLION
        axes.plot(value, place, marker="o" if "base" in name else "s", markersize=8, color=colour, linestyle="none")
        axes.annotate(number(value), (value, place), xytext=(9, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(loss)), [clip(name, 24) for name in loss], color=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("language-modelling loss (nats a token), lower is better")
    axes.margins(x=0.14, y=0.2)
    return figure
