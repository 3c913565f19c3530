"""Draw the charts that the experiments share, in the style of the reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.report.charts import chart_style, save_figure
from regraft.report.charts.style import DASHES, MARKERS, SERIES, SOFT, WIDE, add_legend, cap_score_axis, new_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEIGHT = 3.4
"""Inches; arbitrary."""
BAR_GROUP_WIDTH = 0.8
"""The width of a group of bars as a share of the distance between the centres of two groups; arbitrary, below 1 so that
groups stay apart."""
BAR_WIDTH = 0.92
"""The width of a bar as a share of its part of the group; arbitrary, below 1 so that bars stay apart."""
MAX_UNROTATED_CHARACTERS = 80
"""The total length of the group labels, in characters, above which they would overlap and are rotated."""
LABEL_ROTATION = 20
"""Degrees; arbitrary."""

HATCH = {"hatch": "////", "edgecolor": "white"}
"""Distinguishes series that reuse a colour, because there are more series than colours."""


def draw_lines(
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    x_label: str,
    y_label: str,
    *,
    levels: Mapping[str, float] | None = None,
    marks: Sequence[float] = (),
    ticks: Sequence[float] = (),
    is_score: bool = True,
) -> bytes:
    """Draw means as lines, with their standard deviations as bands.

    Args:
        series: Points by series name, each of x, mean and standard deviation.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        levels: Values of y to mark with a horizontal line, by name.
        marks: Values of x to mark with a vertical line, such as the ends of hops.
        ticks: All values that x can have, to be drawn at equal distances; empty for a linear axis.
        is_score: Whether y is a score, which ends at 1.

    Returns:
        An SVG file.
    """
    with chart_style():
        figure = new_figure(WIDE, HEIGHT)
        axes = figure.add_subplot()
        for index, (name, points) in enumerate(series.items()):
            x, means, deviations = zip(*points, strict=True)
            positions = [ticks.index(value) for value in x] if ticks else list(x)
            line_style = _line_style(index)
            axes.plot(positions, means, label=name, **line_style)
            low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
            high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
            axes.fill_between(positions, low, high, color=line_style["color"], alpha=0.15, linewidth=0)
        for index, (name, height) in enumerate((levels or {}).items()):
            axes.axhline(height, color=SOFT, linewidth=1, linestyle=DASHES[(index + 1) % len(DASHES)], label=name)
        for mark in marks:
            axes.axvline(mark, color=SOFT, linewidth=0.7, linestyle=(0, (1, 3)))
        if ticks:
            axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(y=0.1)
        if is_score:
            cap_score_axis(axes)
        add_legend(axes, 3)
        return save_figure(figure, "svg")


def draw_bars(groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float]]], y_label: str) -> bytes:
    """Draw means as bars side by side in groups, with their standard deviations.

    Args:
        groups: The labels of the groups along the axis.
        series: Mean and standard deviation for each group, by series name; NaN for a group without a bar.
        y_label: The label of the y axis.

    Returns:
        An SVG file.
    """
    with chart_style():
        figure = new_figure(WIDE, HEIGHT)
        axes = figure.add_subplot()
        width = BAR_GROUP_WIDTH / max(1, len(series))
        for index, (name, bars) in enumerate(series.items()):
            means, deviations = zip(*bars, strict=True)
            axes.bar(
                [group - BAR_GROUP_WIDTH / 2 + (index + 0.5) * width for group in range(len(groups))],
                means,
                BAR_WIDTH * width,
                yerr=deviations,
                color=SERIES[index % len(SERIES)],
                label=name,
                error_kw={"ecolor": SOFT, "elinewidth": 1},
                **({} if index < len(SERIES) else HATCH),
            )
        is_crowded = sum(map(len, groups)) > MAX_UNROTATED_CHARACTERS
        axes.set_xticks(range(len(groups)), groups, rotation=LABEL_ROTATION if is_crowded else 0)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(y_label)
        add_legend(axes, 3)
        return save_figure(figure, "svg")


def _line_style(index: int) -> dict[str, Any]:
    """Return a colour and a marker by the index of the series, and a dash for series that reuse a colour."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(SERIES) % len(DASHES)],
        "markersize": 3.5,
    }
