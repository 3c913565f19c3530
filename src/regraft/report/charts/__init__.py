"""One function a chart; each gives a matplotlib figure and touches no global state."""

from regraft.report.charts.bars import draw_kept, draw_methods, draw_moved
from regraft.report.charts.curves import (
    draw_angles,
    draw_cka,
    draw_compatibility,
    draw_learning,
    draw_scatter,
    draw_segment,
)
from regraft.report.charts.maps import draw_attention, draw_heads, draw_plane
from regraft.report.charts.style import chart_style, save_figure

__all__ = [
    "chart_style",
    "draw_angles",
    "draw_attention",
    "draw_cka",
    "draw_compatibility",
    "draw_heads",
    "draw_kept",
    "draw_learning",
    "draw_methods",
    "draw_moved",
    "draw_plane",
    "draw_scatter",
    "draw_segment",
    "save_figure",
]
