"""Heat maps and contour plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.report.charts.style import INK, MARKERS, PAPER, WIDE, new_figure
from regraft.report.wording import finite_values, number, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from regraft.diagnosis import AttentionMap, Plane

# Ink on a colour map, which is the same in both themes: close to black and white, but not among the themed colours.
_DARK = "#000001"
_LIGHT = "#fffffe"
_MAX_LABELLED = 10  # more heads per row leave no room for the value in each cell


def draw_heads(divergence: Sequence[Sequence[float]], best: Sequence[Sequence[int]] | None, top: float) -> Figure:
    """Draw the divergence of matched heads, layer by head.

    Args:
        divergence: The mean divergence in bits, layers × heads.
        best: The nearest head of the other model's same layer, layers × heads; a ring marks heads whose nearest head
            has a different index. None for no rings.
        top: The end of the colour scale in bits, which may be shared with a second chart.

    Returns:
        The figure.
    """
    import numpy as np

    divergences = np.array(divergence, dtype=float)
    layers, heads = divergences.shape
    figure = new_figure(height=min(6.0, 1.35 + max(1.3, 3.1 * layers / max(heads, 4))))
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(
        np.arange(heads + 1) - 0.5,
        np.arange(layers + 1) - 0.5,
        divergences,
        vmin=0,
        vmax=top,
        edgecolors=PAPER,
        linewidth=1.2 if heads <= _MAX_LABELLED else 0.5,
    )
    are_labelled = heads <= _MAX_LABELLED and layers <= 2 * _MAX_LABELLED
    font_size = 7 if heads <= 8 else 6
    for layer in range(layers):
        for head in range(heads):
            bits = divergences[layer, head]
            ink = _LIGHT if bits < 0.55 * top or np.isnan(bits) else _DARK  # the colour map is dark at its start
            if are_labelled:
                axes.text(head, layer, f"{bits:.2f}", ha="center", va="center", fontsize=font_size, color=ink)
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
        attention: The attention maps of both models for one head.

    Returns:
        The figure, with one map per model on a common colour scale.
    """
    import numpy as np

    tokens = [shorten(token, 11) for token in attention.tokens]
    is_short = len(tokens) <= 16
    font_size = 7.5 if is_short else 5.5
    tick_step = max(1, len(tokens) // 28)
    ticks = range(0, len(tokens), tick_step)
    figure = new_figure(WIDE, 4.0 if is_short else 4.4, layout="compressed")
    subplots = figure.subplots(1, 2, sharey=True)
    maps = {"old": attention.old, "new": attention.new}
    weights = finite_values(weight for rows in maps.values() for row in rows for weight in row)
    top = max(weights, default=0.0) or 1.0
    for axes, (name, rows) in zip(subplots, maps.items(), strict=True):
        mesh = axes.imshow(np.array(rows, dtype=float), vmin=0, vmax=top, interpolation="nearest")
        axes.set_title(f"{name} model", color=INK)
        axes.set_xticks(ticks, tokens[::tick_step], rotation=90, fontsize=font_size)
        axes.set_yticks(ticks, tokens[::tick_step], fontsize=font_size)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    subplots[0].set_ylabel("token that attends")
    _add_colour_bar(figure, mesh, subplots, "attention")
    return figure


def draw_plane(plane: Plane) -> Figure:
    """Draw the loss on the plane through three models.

    Args:
        plane: The losses on the grid, at least one of them neither infinite nor NaN.

    Returns:
        The figure, with a marker at each model.
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
    aspect_ratio = (plane.x[-1] - plane.x[0]) / ((plane.y[-1] - plane.y[0]) or 1)
    if 0.4 < aspect_ratio < 2.5:  # equal scales would leave a narrow strip of any other plane
        axes.set_aspect("equal")
    axes.set_xlabel("distance along the first side")
    axes.set_ylabel("distance across it")
    axes.grid(visible=False)
    colour_bar = figure.colorbar(filled, ax=axes, fraction=0.046, pad=0.03, format=_format_tick)
    colour_bar.set_label(f"loss on {plane.split}")
    colour_bar.outline.set_visible(False)
    return figure


def _format_tick(loss: float, _position: int) -> str:
    return number(loss, 2)


def _set_ticks(axis: Any, num_indices: int) -> None:
    """Label the indices from 0 at equal distances: all of up to 23, and 12 to 18 of more."""
    ticks = range(0, num_indices, max(1, num_indices // 12))
    axis.set_ticks(ticks, [str(i) for i in ticks])


def _add_colour_bar(figure: Figure, mesh: Any, axes: Any, label: str) -> None:
    layout = {"location": "bottom", "fraction": 0.05, "pad": 0.03, "aspect": 32}
    colour_bar = figure.colorbar(mesh, ax=axes, label=label, **layout)  # type: ignore[arg-type]
    colour_bar.outline.set_visible(False)
