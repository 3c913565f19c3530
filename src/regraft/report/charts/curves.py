"""Line charts and scatter plots."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from regraft.report.charts.style import (
    BLUE,
    DASHES,
    GREEN,
    INK,
    LINE,
    MARKERS,
    SERIES,
    SOFT,
    VERMILLION,
    WIDE,
    add_legend,
    cap_score_axis,
    new_figure,
)
from regraft.report.wording import base_name, finite_values, number, score_axis_label, score_text, shorten
from regraft.task import find_metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regraft.diagnosis import CompatibilityPoint, Knowledge
    from regraft.task import Metric
    from regraft.task.types import Scatter


def draw_learning_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], scratch_dev: float | None, metric: str
) -> Figure:
    """Draw learning curves, and scratch's last score.

    Args:
        curves: The steps and dev scores of each method, by the method's name.
        scratch_dev: Scratch's last dev score; None without scratch.
        metric: The name of the metric.

    Returns:
        The figure, one line per method.
    """
    figure = new_figure(WIDE, 3.5)
    axes = figure.add_subplot()
    for index, (method, curve) in enumerate(curves.items()):
        steps, scores = zip(*curve, strict=True)
        axes.plot(steps, scores, label=shorten(method, 28), **_line_style(index))
    score_metric = find_metric(metric)
    if scratch_dev is not None:
        label = f"scratch ends at {score_text(scratch_dev, score_metric)}"
        axes.axhline(scratch_dev, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1, label=label)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(score_axis_label(score_metric, "dev"))
    axes.margins(y=0.12)
    cap_score_axis(axes, score_metric)
    add_legend(axes, min(4, len(curves) + 1))
    return figure


def draw_segment(
    mu: Sequence[float], curves: Mapping[str, Sequence[float]], measure: str | Metric, ends: Sequence[str]
) -> Figure:
    """Draw loss or score along the straight line between two models.

    Args:
        mu: The points on the line, from 0 to 1.
        curves: The loss or score at each point, by split.
        measure: The metric of a score; or the name of a loss, whose largest excess over the line between the end values
            is then marked.
        ends: The names of the models at 0 and 1.

    Returns:
        The figure, one line per split.
    """
    figure = new_figure(height=3.15)
    axes = figure.add_subplot()
    for index, (split, curve) in enumerate(curves.items()):
        if isinstance(measure, str):
            _draw_barrier(axes, mu, curve, split, index)
        else:
            axes.plot(mu, curve, label=split, **_line_style(index))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel(f"μ   (0 = {shorten(ends[0], 20)}, 1 = {shorten(ends[1], 20)})")
    axes.set_ylabel(measure if isinstance(measure, str) else measure.name)
    axes.margins(y=0.16)
    if not isinstance(measure, str):
        cap_score_axis(axes, measure)
    add_legend(axes)
    return figure


def _draw_barrier(axes: Axes, mu: Sequence[float], curve: Sequence[float], split: str, index: int) -> None:
    """Draw the curve of one split, the line between its end values, and its largest excess over this line."""
    style = _line_style(index)
    chord = [curve[0] + point * (curve[-1] - curve[0]) for point in mu]
    excesses = [height - chord_height for height, chord_height in zip(curve, chord, strict=True)]
    excess, top = max((excess, i) for i, excess in enumerate(excesses))
    axes.plot(mu, curve, label=f"{split}, barrier {number(max(0.0, excess))}", **style)
    axes.plot((mu[0], mu[-1]), (curve[0], curve[-1]), color=style["color"], linewidth=0.9, linestyle=(0, (2, 2)))
    if excess > 0:
        x = mu[top] + 0.012 * (2 * index - 1)  # side by side if the barriers of both splits are at the same point
        axes.plot((x, x), (chord[top], curve[top]), color=INK, linewidth=1.3, marker="_", zorder=4)


def draw_compatibility(
    points: Sequence[CompatibilityPoint], metric: str, chance: float | None, floor: str = "guessing"
) -> Figure:
    """Draw the score and, if the metric is bounded, the agreement of the old adaptation on checkpoints of its base.

    Args:
        points: The old base, then the checkpoints of a diagnosis, in order of pre-training.
        metric: The name of the metric.
        chance: The chance score; None to draw none.
        floor: The name of what has the chance score.

    Returns:
        The figure; its horizontal axis shows pre-training steps if all points have them, else checkpoints.
    """
    figure = new_figure(WIDE, 3.1)
    axes = figure.add_subplot()
    steps = [point.steps for point in points if point.steps is not None]
    has_steps = len(steps) == len(points)
    x = steps if has_steps else list(range(len(points)))
    axes.plot(x, [point.score for point in points], label=f"{metric} of the old weights", **_line_style(0))
    score_metric = find_metric(metric)
    if score_metric.is_bounded:  # else the two have no common scale
        agreement = [math.nan if point.agreement is None else point.agreement for point in points]
        axes.plot(x, agreement, label="agreement with the old deployment", **_line_style(1))
    if chance is not None:
        label = floor.removeprefix("the ")
        axes.axhline(chance, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), label=label)
    if has_steps:
        axes.set_xlabel("pre-training steps since the old base")
    else:
        names = [shorten(base_name(point.name), 14) for point in points]
        axes.set_xticks(x, names, rotation=30 if len(points) > 6 else 0)
        axes.set_xlabel("checkpoint")
    axes.set_ylabel("share of examples" if metric == "accuracy" else metric)
    axes.margins(y=0.12)
    cap_score_axis(axes, score_metric)
    add_legend(axes, 3)
    return figure


def draw_scatter(view: Scatter) -> Figure:
    """Draw series of points; larger markers mean more examples.

    If all coordinates are from 0 to 1, the vertical axis shows this range.

    Args:
        view: The series of points; series after the third have the style of the third.

    Returns:
        The figure.
    """
    figure = new_figure(height=3.4)
    axes = figure.add_subplot()
    coordinates = finite_values(coordinate for series in view.series for coordinate in (*series.x, *series.y))
    low = min(coordinates, default=0.0)
    high = max(coordinates, default=1.0)
    are_shares = low >= 0 and high <= 1
    ends = (0, 1) if are_shares else (low, high)
    if view.diagonal:
        axes.plot(ends, ends, color=SOFT, linewidth=1, linestyle=(0, (2, 2)), label=view.diagonal)
    styles: tuple[tuple[str, str, Any], ...] = ((VERMILLION, "s", (0, (5, 2))), (BLUE, "o", "-"), (INK, "^", "-"))
    max_size = max((size for series in view.series for size in series.sizes), default=1) or 1
    for index, series in enumerate(view.series):
        colour, marker, dashes = styles[min(index, len(styles) - 1)]
        if view.joined:
            axes.plot(series.x, series.y, color=colour, linestyle=dashes, label=series.name)
        axes.scatter(
            series.x,
            series.y,
            s=[14 + 60 * size / max_size for size in series.sizes],
            color=colour,
            marker=marker,
            edgecolors=LINE,
            linewidths=0.5,
            zorder=3,
            label=None if view.joined else series.name,
        )
    axes.set_xlabel(view.x)
    axes.set_ylabel(view.y)
    if are_shares:
        axes.set_ylim(-0.03, 1.05)
    add_legend(axes, 1)
    return figure


def draw_knowledge(knowledge: Knowledge, behaviour: Metric) -> Figure:
    """Draw the new knowledge of models against their old behaviour; the better, the further up and to the right.

    Args:
        knowledge: The two figures of each model; those without an old behaviour are left out.
        behaviour: The metric of the old behaviour.

    Returns:
        The figure, with a circle for each base and a square for each deployment, blue on the new base.
    """
    metric = find_metric(knowledge.metric)
    figure = new_figure(WIDE, 3.3)
    axes = figure.add_subplot()
    merits = [behaviour.merit(model.old_behaviour) for model in knowledge.models if model.old_behaviour is not None]
    middle = (min(merits) + max(merits)) / 2
    for model in knowledge.models:
        if model.old_behaviour is None:
            continue
        point = (model.old_behaviour, model.new_knowledge)
        is_old = model.model.startswith("old")
        colour = VERMILLION if is_old else BLUE
        axes.plot(*point, marker="o" if "base" in model.model else "s", markersize=7, color=colour, linestyle="none")
        is_right = behaviour.merit(model.old_behaviour) > middle
        axes.annotate(
            shorten(model.model, 30),
            point,
            xytext=(-8 if is_right else 8, 5 if is_old else -12),  # old and new are often close together
            textcoords="offset points",
            ha="right" if is_right else "left",
            fontsize=8,
            color=INK,
        )
    axes.margins(x=0.08, y=0.25)
    cap_score_axis(axes, behaviour, "x")
    for axis, axis_metric in ((axes.xaxis, behaviour), (axes.yaxis, metric)):
        axis.set_inverted(not axis_metric.higher_is_better)
    axes.set_xlabel(f"old behaviour: {score_axis_label(behaviour, 'the task')}")
    axes.set_ylabel(f"new knowledge: {metric.name}" + ("" if metric.higher_is_better else ", lower is better"))
    return figure


def draw_cka(cka: Sequence[float], control: Sequence[float] | None, control_name: str) -> Figure:
    """Draw the similarity of two models' hidden states, layer by layer.

    Args:
        cka: Linear CKA of the embeddings, then of each layer.
        control: Linear CKA of the first model and an unrelated one, in the same order; None without a control.
        control_name: The name of the unrelated model.

    Returns:
        The figure.
    """
    figure = new_figure(WIDE, 2.8)
    axes = figure.add_subplot()
    axes.plot(range(len(cka)), cka, label="old and new model", **_line_style(0))
    if control:
        axes.plot(range(len(control)), control, label=f"control: {shorten(control_name, 40)}", **_line_style(1))
    names = ["embed."] + [str(layer) for layer in range(len(cka) - 1)]
    tick_step = max(1, len(cka) // 16)
    axes.set_xticks(range(0, len(cka), tick_step), names[::tick_step])
    axes.set_xlabel("layer")
    axes.set_ylabel("linear CKA")
    low = min(finite_values([*cka, *(control or ())]), default=0.0)
    # If all layers are much alike, an axis from 0 would hide their differences.
    axis_start = min(0.0, low) if low < 0.5 else low - 0.1 * (1.02 - low) - 0.02
    axes.set_ylim(axis_start, 1.02)
    add_legend(axes, 2)
    return figure


def draw_shift_angles(names: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> Figure:
    """Draw the agreement in direction of base shift and delta for each group of tensors.

    Args:
        names: The names of the groups.
        series: Cosine, share of equal signs and subspace overlap of each group, by label; None leaves a gap.

    Returns:
        The figure, one row per group.
    """
    figure = new_figure(height=max(2.6, 1.3 + 0.2 * len(names)))
    axes = figure.add_subplot()
    y = range(len(names))
    for (label, measures), colour, marker in zip(series.items(), (BLUE, VERMILLION, GREEN), MARKERS, strict=False):
        if any(measure is not None for measure in measures):
            x = [math.nan if measure is None else measure for measure in measures]
            axes.plot(x, y, color=colour, marker=marker, linestyle="none", label=label)
    axes.axvline(0, color=SOFT, linewidth=0.9)
    axes.set_yticks(y, [shorten(name, 18) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("shift against delta")
    axes.margins(x=0.08, y=0.08)
    add_legend(axes, 3)
    return figure


def _line_style(index: int) -> dict[str, Any]:
    """Return the colour, marker and dashes of a line by its index on the chart."""
    dash_index = index % 2  # alternate while the colours differ
    if index >= len(SERIES):  # the colours repeat, so the dashes change with each repetition
        dash_index = index // len(SERIES) % len(DASHES)
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[dash_index],
    }
