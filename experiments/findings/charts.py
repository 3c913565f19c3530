"""The charts that the experiments share, in the look of the reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.report.charts import chart_style, save_figure
from regraft.report.charts.style import DASHES, MARKERS, SERIES, SOFT, WIDE, add_legend, cap_score_axis, new_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def lines(
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    x: str,
    y: str,
    *,
    levels: Mapping[str, float] | None = None,
    marks: Sequence[float] = (),
    ticks: Sequence[float] = (),
    score: bool = True,
) -> bytes:
    """Draw several means over something, with their standard deviations as bands.

    Args:
        series: By name, points of x, mean and deviation.
        x: What x is.
        y: What the means are of.
        levels: Values to draw straight across, by name.
        marks: Values of x to mark, such as the ends of hops.
        ticks: All values that x can have, where those are few; they then stand at equal distances.
        score: Whether y is a score that ends at 1.

    Returns:
        An SVG file.
    """
    with chart_style():
        figure = new_figure(WIDE, 3.4)
        axes = figure.add_subplot()
        for place, (name, points) in enumerate(series.items()):
            at, means, spreads = zip(*points, strict=True)
            where, look = [ticks.index(value) if ticks else value for value in at], _look(place)
            axes.plot(where, means, label=name, **look)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(where, low, high, color=look["color"], alpha=0.15, linewidth=0)
        for place, (name, value) in enumerate((levels or {}).items()):
            axes.axhline(value, color=SOFT, linewidth=1, linestyle=DASHES[(place + 1) % len(DASHES)], label=name)
        for mark in marks:
            axes.axvline(mark, color=SOFT, linewidth=0.7, linestyle=(0, (1, 3)))
        if ticks:
            axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.margins(y=0.1)
        if score:
            cap_score_axis(axes)
        add_legend(axes, 3)
        return save_figure(figure, "svg")


def bars(groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float]]], y: str) -> bytes:
    """Draw several means side by side for each of several groups, with their standard deviations.

    Args:
        groups: What stands along the axis.
        series: By name, mean and deviation for each group; NaN where there is none.
        y: What the means are of.

    Returns:
        An SVG file.
    """
    with chart_style():
        figure = new_figure(WIDE, 3.4)
        axes = figure.add_subplot()
        width = 0.8 / max(1, len(series))
        for place, (name, values) in enumerate(series.items()):
            means, spreads = zip(*values, strict=True)
            at = [i - 0.4 + (place + 0.5) * width for i in range(len(groups))]
            again = {"hatch": "////", "edgecolor": "white"} if place >= len(SERIES) else {}
            axes.bar(at, means, 0.92 * width, yerr=spreads, color=SERIES[place % len(SERIES)], label=name,
                     error_kw={"ecolor": SOFT, "elinewidth": 1}, **again)  # fmt: skip
        axes.set_xticks(range(len(groups)), groups, rotation=20 if sum(map(len, groups)) > 80 else 0)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(y)
        add_legend(axes, 3)
        return save_figure(figure, "svg")


def _look(place: int) -> dict[str, Any]:
    return {
        "color": SERIES[place % len(SERIES)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place // len(SERIES) % len(DASHES)],
        "markersize": 3.5,
    }
