"""The style of the charts: sizes, fonts, and Okabe and Ito's colours, which are safe for the colour-blind."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regraft.task import Metric

# Okabe & Ito (2008), jfly.uni-koeln.de/color
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
INK, SOFT, LINE, PAPER = "#1b1f24", "#5b636d", "#dfe2e6", "#fefefe"
# The variable of the page's style sheet that replaces each colour.
THEMED = {
    INK: "ink",
    SOFT: "soft",
    LINE: "line",
    PAPER: "card",
    BLUE: "blue",
    VERMILLION: "vermillion",
    GREEN: "green",
    PURPLE: "purple",
    ORANGE: "orange",
    SKY: "sky",
}
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
NARROW, MIDDLE, WIDE = 4.1, 5.0, 6.4  # inches; the page scales charts to its columns
_RC_PARAMS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regraft",
    "text.parse_math": False,  # a dollar sign in an example is a dollar sign
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.titlesize": 9,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8.5,
    "axes.edgecolor": LINE,
    "axes.facecolor": PAPER,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "image.cmap": "cividis",
}


@contextlib.contextmanager
def chart_style() -> Iterator[None]:
    """Apply the charts' style to matplotlib while they are drawn and saved; restore its settings afterwards."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a user's own matplotlibrc would change the pages
        matplotlib.rcParams.update(cast("Any", _RC_PARAMS))  # the stubs ask for literal keys
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the page's own fonts have more glyphs
        warnings.filterwarnings("ignore", "Matplotlib currently does not support .* natively", UserWarning)
        yield


def new_figure(
    width: float = NARROW, height: float = 2.9, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    """Create an empty figure.

    Args:
        width: The width in inches.
        height: The height in inches.
        layout: The layout engine; `compressed` for axes of a fixed aspect ratio.

    Returns:
        A figure without axes, which pyplot does not know and so does not keep open.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def cap_score_axis(axes: Axes, metric: Metric | None = None, axis: Literal["x", "y"] = "y") -> None:
    """End the axis of a score just above 1, if it would go further and no score can.

    Args:
        axes: The chart's axes.
        metric: The metric of the score; None for a bounded metric.
        axis: The axis of the score.
    """
    low, high = getattr(axes, f"get_{axis}lim")()
    if (metric is None or metric.is_bounded) and high > 1 > low:
        getattr(axes, f"set_{axis}lim")(low, 1 + 0.02 * (1 - low))


def add_legend(axes: Axes, columns: int = 2) -> None:
    """Add a legend below a chart, outside its axes.

    Args:
        axes: The chart's axes.
        columns: The number of entries side by side.
    """
    figure: Any = axes.figure
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.4)


def save_figure(figure: Figure, file_format: str) -> bytes:
    """Save a figure to bytes; equal figures give equal bytes.

    Args:
        figure: A finished figure, drawn inside `chart_style`.
        file_format: `svg` or `png`.

    Returns:
        The bytes of the file.
    """
    stream = io.BytesIO()
    # None removes the fields that change with the time or with matplotlib's version.
    metadata = {"Date": None, "Creator": None} if file_format == "svg" else {"Software": None}
    figure.savefig(stream, format=file_format, dpi=200, metadata=metadata)
    return stream.getvalue()
