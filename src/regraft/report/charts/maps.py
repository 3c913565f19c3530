"""Charts of a value over two things: heat maps and planes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.report.charts.style import INK, MARKERS, PAPER, WIDE, new_figure
from regraft.report.wording import clip, finite, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from regraft.diagnosis import AttentionMap, Plane

_DARK, _LIGHT = "#000001", "#fffffe"  # on the colours of a map, which are the same in both themes
_MOST_CELLS = 10


def draw_heads(rows: Sequence[Sequence[float]], best: Sequence[Sequence[int]] | None, top: float) -> Figure:
    """Draw how far apart matched heads attend, layer by head.

    Args:
        rows: Layers x heads: the mean divergence in bits.
        best: Layers x heads: the nearest head of the other model's same layer; where it is another, a ring says so.
        top: The end of the colour scale, to share it with a second chart.

    Returns:
        The figure.
    """
    import numpy as np

    values = np.array(rows, dtype=float)
    layers, heads = values.shape
    figure = new_figure(height=min(6.0, 1.35 + max(1.3, 3.1 * layers / max(heads, 4))))
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(
        np.arange(heads + 1) - 0.5, np.arange(layers + 1) - 0.5, values, vmin=0, vmax=top, edgecolors=PAPER,
        linewidth=1.2 if heads <= _MOST_CELLS else 0.5,
    )  # fmt: skip
    for layer in range(layers):
        for head in range(heads):
            value = values[layer, head]
            ink = _LIGHT if value < 0.55 * top or np.isnan(value) else _DARK
            if heads <= _MOST_CELLS and layers <= 2 * _MOST_CELLS:
                size = 7 if heads <= 8 else 6
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=size, color=ink)
            if best and best[layer][head] != head:
                axes.plot(head + 0.34, layer - 0.34, marker="o", markersize=3, color=ink, markerfacecolor="none")
    _ticks(axes.xaxis, heads)
    _ticks(axes.yaxis, layers)
    axes.invert_yaxis()
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _bar(figure, mesh, axes, "Jensen-Shannon divergence (bits)")
    return figure


def draw_attention(attention: AttentionMap) -> Figure:
    """Draw where one head attends on a text, in the old model and in the new one.

    Args:
        attention: The head, its text, and where it attends.

    Returns:
        The figure.
    """
    import numpy as np

    tokens = [clip(token, 11) for token in attention.tokens]
    count, every = len(tokens), max(1, len(tokens) // 28)
    figure = new_figure(WIDE, 4.0 if count <= 16 else 4.4, layout="compressed")
    both = figure.subplots(1, 2, sharey=True)
    sides = {"old": attention.old, "new": attention.new}
    top = max(finite(value for rows in sides.values() for row in rows for value in row), default=0.0) or 1.0
    for axes, (side, rows) in zip(both, sides.items(), strict=True):
        mesh = axes.imshow(np.array(rows, dtype=float), vmin=0, vmax=top, interpolation="nearest")
        axes.set_title(f"{side} model", color=INK)
        size = 7.5 if count <= 16 else 5.5
        axes.set_xticks(range(0, count, every), tokens[::every], rotation=90, fontsize=size)
        axes.set_yticks(range(0, count, every), tokens[::every], fontsize=size)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    both[0].set_ylabel("token that attends")
    _bar(figure, mesh, both, "attention")
    return figure


def draw_plane(plane: Plane) -> Figure:
    """Draw the loss on the plane through three models.

    Args:
        plane: The plane.

    Returns:
        The figure.
    """
    import numpy as np

    loss = np.ma.masked_invalid(np.array(plane.loss, dtype=float))
    figure = new_figure(5.4, 3.9)
    axes = figure.add_subplot()
    filled = axes.contourf(plane.x, plane.y, loss, levels=14, cmap="cividis_r")
    axes.contour(plane.x, plane.y, loss, levels=14, colors=_LIGHT, linewidths=0.35, alpha=0.7)
    for place, (name, (x, y)) in enumerate(zip(plane.names, plane.places, strict=True)):
        axes.plot(x, y, marker=MARKERS[place], markersize=8, color=_LIGHT, markeredgecolor=_DARK, linestyle="none")
        axes.annotate(
            clip(name, 24), (x, y), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=8, color=_DARK,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": _LIGHT, "edgecolor": "none", "alpha": 0.85},
        )  # fmt: skip
    if 0.4 < (plane.x[-1] - plane.x[0]) / ((plane.y[-1] - plane.y[0]) or 1) < 2.5:
        axes.set_aspect("equal")
    axes.set_xlabel("distance along the first side")
    axes.set_ylabel("distance across it")
    axes.grid(visible=False)
    bar = figure.colorbar(filled, ax=axes, fraction=0.046, pad=0.03, format=lambda value, _: number(value, 2))
    bar.set_label(f"loss on {plane.split}")
    bar.outline.set_visible(False)
    return figure


def _ticks(axis: Any, count: int) -> None:
    every = max(1, count // 12)
    axis.set_ticks(range(0, count, every), [str(i) for i in range(0, count, every)])


def _bar(figure: Figure, mesh: Any, axes: Any, label: str) -> None:
    side = {"location": "bottom", "fraction": 0.05, "pad": 0.03, "aspect": 32}
    bar = figure.colorbar(mesh, ax=axes, label=label, **side)  # type: ignore[arg-type]
    bar.outline.set_visible(False)
