"""Charts of something over something: lines."""

from __future__ import annotations

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
from regraft.report.wording import base_name, clip, finite, number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from regraft.diagnosis import CompatibilityPoint
    from regraft.task.types import Scatter


def draw_learning(curves: Mapping[str, Sequence[tuple[float, float]]], level: float | None, metric: str) -> Figure:
    """Draw learning curves, and the level that scratch ends at.

    Args:
        curves: By method, step and score on dev.
        level: Scratch's last score.
        metric: What the score is.

    Returns:
        The figure.
    """
    figure = new_figure(WIDE, 3.5)
    axes = figure.add_subplot()
    for place, (method, curve) in enumerate(curves.items()):
        steps, scores = zip(*curve, strict=True)
        axes.plot(steps, scores, label=clip(method, 28), **_look(place))
    if level is not None:
        axes.axhline(
            level, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1, label=f"scratch ends at {number(level)}"
        )
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(f"{metric} on dev")
    axes.margins(y=0.12)
    cap_score_axis(axes)
    add_legend(axes, min(4, len(curves) + 1))
    return figure


def draw_segment(
    mu: Sequence[float], values: Mapping[str, Sequence[float]], what: str, ends: Sequence[str], *, barrier: bool
) -> Figure:
    """Draw loss or score along the straight line between two models.

    Args:
        mu: Where on the line, 0 to 1.
        values: By split, the value there.
        what: What the value is.
        ends: What the models at 0 and 1 are called.
        barrier: Whether to mark the largest excess over the line between the ends.

    Returns:
        The figure.
    """
    figure = new_figure(height=3.15)
    axes = figure.add_subplot()
    for place, (split, along) in enumerate(values.items()):
        look = _look(place)
        if not barrier:
            axes.plot(mu, along, label=split, **look)
            continue
        straight = [along[0] + point * (along[-1] - along[0]) for point in mu]
        excess, top = max((value - line, i) for i, (value, line) in enumerate(zip(along, straight, strict=True)))
        axes.plot(mu, along, label=f"{split}, barrier {number(max(0.0, excess))}", **look)
        axes.plot((mu[0], mu[-1]), (along[0], along[-1]), color=look["color"], linewidth=0.9, linestyle=(0, (2, 2)))
        if excess > 0:
            at = mu[top] + 0.012 * (2 * place - 1)  # beside each other where both are at one place
            axes.plot((at, at), (straight[top], along[top]), color=INK, linewidth=1.3, marker="_", zorder=4)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel(f"μ   (0 = {clip(ends[0], 20)}, 1 = {clip(ends[1], 20)})")
    axes.set_ylabel(what)
    axes.margins(y=0.16)
    if not barrier:
        cap_score_axis(axes)
    add_legend(axes)
    return figure


def draw_compatibility(points: Sequence[CompatibilityPoint], metric: str, floor: float) -> Figure:
    """Draw how the old weights fare on later and later checkpoints of the base.

    Args:
        points: The points of a diagnosis, in their order.
        metric: What the score is.
        floor: The score of guessing.

    Returns:
        The figure.
    """
    figure = new_figure(WIDE, 3.1)
    axes = figure.add_subplot()
    steps = [point.steps for point in points if point.steps is not None]
    at = steps if len(steps) == len(points) else list(range(len(points)))
    axes.plot(at, [point.score for point in points], label=f"{metric} of the old weights", **_look(0))
    axes.plot(at, [point.agreement for point in points], label="agreement with the old deployment", **_look(1))
    axes.axhline(floor, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), label="guessing")
    if len(steps) == len(points):
        axes.set_xlabel("pre-training steps since the old base")
    else:
        axes.set_xticks(
            at, [clip(base_name(point.name), 14) for point in points], rotation=30 if len(points) > 6 else 0
        )
        axes.set_xlabel("checkpoint")
    axes.set_ylabel("share of examples" if metric == "accuracy" else metric)
    axes.margins(y=0.12)
    cap_score_axis(axes)
    add_legend(axes, 3)
    return figure


def draw_scatter(view: Scatter) -> Figure:
    """Draw series of points; larger marks stand for more examples, and shares have an axis from 0 to 1.

    Args:
        view: The points.

    Returns:
        The figure.
    """
    figure = new_figure(height=3.4)
    axes = figure.add_subplot()
    values = finite(value for series in view.series for value in (*series.x, *series.y))
    low, high = min(values, default=0.0), max(values, default=1.0)
    are_shares = low >= 0 and high <= 1
    ends = (0, 1) if are_shares else (low, high)
    if view.diagonal:
        axes.plot(ends, ends, color=SOFT, linewidth=1, linestyle=(0, (2, 2)), label=view.diagonal)
    looks: tuple[tuple[str, str, Any], ...] = ((VERMILLION, "s", (0, (5, 2))), (BLUE, "o", "-"), (INK, "^", "-"))
    most = max((size for series in view.series for size in series.sizes), default=1) or 1
    for place, series in enumerate(view.series):
        colour, marker, dashes = looks[min(place, len(looks) - 1)]
        if view.joined:
            axes.plot(series.x, series.y, color=colour, linestyle=dashes, label=series.name)
        sizes = [14 + 60 * size / most for size in series.sizes]
        axes.scatter(
            series.x, series.y, s=sizes, color=colour, marker=marker, edgecolors=LINE, linewidths=0.5, zorder=3,
            label=None if view.joined else series.name,
        )  # fmt: skip
    axes.set_xlabel(view.x)
    axes.set_ylabel(view.y)
    if are_shares:
        axes.set_ylim(-0.03, 1.05)
    add_legend(axes, 1)
    return figure


def draw_cka(cka: Sequence[float], control: Sequence[float] | None, control_name: str) -> Figure:
    """Draw how alike the hidden states are, layer by layer.

    Args:
        cka: Linear CKA: embeddings, then each layer.
        control: The same of a control pair.
        control_name: What that is.

    Returns:
        The figure.
    """
    figure = new_figure(WIDE, 2.8)
    axes = figure.add_subplot()
    axes.plot(range(len(cka)), cka, label="old and new model", **_look(0))
    if control:
        axes.plot(range(len(control)), control, label=f"control: {clip(control_name, 40)}", **_look(1))
    names = ["embed."] + [str(layer) for layer in range(len(cka) - 1)]
    every = max(1, len(cka) // 16)
    axes.set_xticks(range(0, len(cka), every), names[::every])
    axes.set_xlabel("layer")
    axes.set_ylabel("linear CKA")
    low = min(finite([*cka, *(control or ())]), default=0.0)
    axes.set_ylim(min(0.0, low) if low < 0.5 else low - 0.1 * (1.02 - low) - 0.02, 1.02)
    add_legend(axes, 2)
    return figure


def draw_angles(names: Sequence[str], cosine: Sequence[Any], signs: Sequence[Any], overlap: Sequence[Any]) -> Figure:
    """Draw how base shift and delta point, part by part.

    Args:
        names: The parts.
        cosine: Of shift and delta.
        signs: Share of entries with equal sign.
        overlap: Mean squared cosine of principal angles.

    Returns:
        The figure; None leaves a gap.
    """
    figure = new_figure(height=max(2.6, 1.3 + 0.2 * len(names)))
    axes = figure.add_subplot()
    rows = range(len(names))
    series = (("cosine", cosine, BLUE), ("equal signs", signs, VERMILLION), ("subspace overlap", overlap, GREEN))
    for place, (name, values, colour) in enumerate(series):
        if any(value is not None for value in values):
            known = [float("nan") if value is None else value for value in values]
            axes.plot(known, rows, color=colour, marker=MARKERS[place], linestyle="none", label=name)
    axes.axvline(0, color=SOFT, linewidth=0.9)
    axes.set_yticks(rows, [clip(name, 18) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("shift against delta")
    axes.margins(x=0.08, y=0.08)
    add_legend(axes, 3)
    return figure


def _look(place: int) -> dict[str, Any]:
    return {
        "color": SERIES[place % len(SERIES)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place // len(SERIES) % len(DASHES)] if place >= len(SERIES) else DASHES[place % 2],
    }
