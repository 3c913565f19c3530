"""Heat maps and contour plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.report.charts.style import INK, MARKERS, PAPER, WIDE, new_figure
from regraft.report.wording import finite_values, number, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from regraft.diagnosis import AttentionMap, Plane

_DARK, _LIGHT = "#000001", "#fffffe"  # on a colour map, which is the same in both themes
_MAX_LABELLED = 10  # heads a row that leave room for the value in each cell


def draw_heads(rows: Sequence[Sequence[float]], best: Sequence[Sequence[int]] | None, top: float) -> Figure:
    """Draw the divergence of matched heads, layer by head.

    Args:
        rows: The mean divergence in bits, layers × heads.
        best: The nearest head of the other model's same layer, layers × heads; a ring marks heads whose nearest is
            another one. None for no rings.
        top: The end of the colour scale, which may be shared with a second chart.

    Returns:
        The figure.
    """
    import numpy as np

    values = np.array(rows, dtype=float)
    layers, heads = values.shape
    figure = new_figure(height=min(6.0, 1.35 + max(1.3, 3.1 * layers / max(heads, 4))))
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(
        np.arange(heads + 1) - 0.5,
        np.arange(layers + 1) - 0.5,
        values,
        vmin=0,
        vmax=top,
        edgecolors=PAPER,
        linewidth=1.2 if heads <= _MAX_LABELLED else 0.5,
    )
    for layer in range(layers):
        for head in range(heads):
            value = values[layer, head]
            ink = _LIGHT if value < 0.55 * top or np.isnan(value) else _DARK
            if heads <= _MAX_LABELLED and layers <= 2 * _MAX_LABELLED:
                size = 7 if heads <= 8 else 6
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=size, color=ink)
            if best and best[layer][head] != head:
                axes.plot(head + 0.34, layer - 0.34, marker="o", markersize=3, color=ink, markerfacecolor="none")
    _set_ticks(axes.xaxis, heads)
    _set_ticks(axes.yaxis, layers)
    axes.invert_yaxis()
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _add_colour_bar(figure, mesh, axes, "Jensen-Shannon divergence (bits)")
    return figure


def draw_attention(attention: AttentionMap) -> Figure:
    """Draw the attention of one head on a text, in the old model and in the new one.

    Args:
        attention: The attention map of both models.

    Returns:
        The figure.
    """
    import numpy as np

    tokens = [shorten(token, 11) for token in attention.tokens]
    count = len(tokens)
    tick_step = max(1, len(tokens) // 28)
    figure = new_figure(WIDE, 4.0 if count <= 16 else 4.4, layout="compressed")
    subplots = figure.subplots(1, 2, sharey=True)
    values = finite_values(value for rows in (attention.old, attention.new) for row in rows for value in row)
    top = max(values, default=0.0) or 1.0
    for axes, name, rows in zip(subplots, ("old", "new"), (attention.old, attention.new), strict=True):
        mesh = axes.imshow(np.array(rows, dtype=float), vmin=0, vmax=top, interpolation="nearest")
        axes.set_title(f"{name} model", color=INK)
        size = 7.5 if count <= 16 else 5.5
        axes.set_xticks(range(0, count, tick_step), tokens[::tick_step], rotation=90, fontsize=size)
        axes.set_yticks(range(0, count, tick_step), tokens[::tick_step], fontsize=size)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    subplots[0].set_ylabel("token that attends")
    _add_colour_bar(figure, mesh, subplots, "attention")
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
    for name, (x, y), marker in zip(plane.names, plane.places, MARKERS, strict=False):
        axes.plot(x, y, marker=marker, markersize=8, color=_LIGHT, markeredgecolor=_DARK, linestyle="none")
        axes.annotate(
            shorten(name, 24),
            (x, y),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_DARK,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": _LIGHT, "edgecolor": "none", "alpha": 0.85},
        )
    if 0.4 < (plane.x[-1] - plane.x[0]) / ((plane.y[-1] - plane.y[0]) or 1) < 2.5:
        axes.set_aspect("equal")
    axes.set_xlabel("distance along the first side")
    axes.set_ylabel("distance across it")
    axes.grid(visible=False)
    colour_bar = figure.colorbar(filled, ax=axes, fraction=0.046, pad=0.03, format=lambda value, _: number(value, 2))
    colour_bar.set_label(f"loss on {plane.split}")
    colour_bar.outline.set_visible(False)
    return figure


def _set_ticks(axis: Any, count: int) -> None:
    ticks = range(0, count, max(1, count // 12))
    axis.set_ticks(ticks, [str(i) for i in ticks])


def _add_colour_bar(figure: Figure, mesh: Any, axes: Any, label: str) -> None:
    layout = {"location": "bottom", "fraction": 0.05, "pad": 0.03, "aspect": 32}
    colour_bar = figure.colorbar(mesh, ax=axes, label=label, **layout)  # type: ignore[arg-type]
    colour_bar.outline.set_visible(False)
