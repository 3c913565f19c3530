"""The report's charts: one function per chart, which returns a matplotlib figure and changes no global state.

Figure sizes are in inches; sizes of texts, lines and markers are in points. All are set by eye.
"""

from regraft.report.charts.bars import draw_group_shifts, draw_method_scores, draw_retention
from regraft.report.charts.curves import (
    draw_cka,
    draw_compatibility,
    draw_knowledge,
    draw_learning_curves,
    draw_scatter,
    draw_segment,
    draw_shift_angles,
)
from regraft.report.charts.maps import draw_attention, draw_heads, draw_plane
from regraft.report.charts.style import chart_style, save_figure

__all__ = [
    "chart_style",
    "draw_attention",
    "draw_cka",
    "draw_compatibility",
    "draw_group_shifts",
    "draw_heads",
    "draw_knowledge",
    "draw_learning_curves",
    "draw_method_scores",
    "draw_plane",
    "draw_retention",
    "draw_scatter",
    "draw_segment",
    "draw_shift_angles",
    "save_figure",
]
