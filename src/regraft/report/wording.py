"""Format figures and words for the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from regraft.task.types import task_types

if TYPE_CHECKING:
    from collections.abc import Iterable

    from regraft.task import Metric
    from regraft.task.types.view import Cell, Column

MISSING = "–"
"""What a cell shows in place of a missing figure."""
CHANGE_WORDS = {
    "negative": "negative flip",
    "positive": "positive flip",
    "changed": "changed answer",
    "same": "same answer",
}
"""What an upgrade did to an answer, in words."""
SMALL_CELL = 5e-4
"""The size below which three decimals would show a cell of a table view as 0."""


def number(value: float | None, digits: int = 3) -> str:
    """Format a number.

    Args:
        value: The number; None if it is missing.
        digits: The number of decimals.

    Returns:
        The number as in 0.912, with the minus sign U+2212 if it is negative; words if it is infinite or NaN.
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # adding 0.0 turns −0 into 0


def score_text(value: float | None, metric: Metric) -> str:
    """Format a score.

    Args:
        value: The score; None if it is missing.
        metric: The metric of the score.

    Returns:
        The score as `number` formats it, or as in 12,345 if the metric is not bounded.
    """
    if value is None or metric.is_bounded or not math.isfinite(value):
        return number(value)
    return metric.format_score(value).replace("-", "−")


def score_axis_label(metric: Metric, split: str) -> str:
    """Return the label of a score's axis, which says so if lower is better.

    Args:
        metric: The metric of the score.
        split: The split that is scored.
    """
    return f"{metric.name} on {split}" + ("" if metric.higher_is_better else ", lower is better")


def chance_name(task_type: str) -> str:
    """Return the name of the model whose score is chance: guessing, or the bare new base where that answers instead.

    Args:
        task_type: The name of the task type.
    """
    return "the bare new base" if task_types()[task_type].head_in_base else "guessing"


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share as a percentage.

    Args:
        share: The share, 1 being 100 %; None if it is missing.
        digits: The number of decimals.

    Returns:
        The percentage as in 4.2 %.
    """
    return MISSING if share is None else f"{number(100 * share, digits)} %"


def integer(value: float | None) -> str:
    """Format a count.

    Args:
        value: The count, or a mean of counts, which is rounded; None if it is missing.

    Returns:
        The count as in 1,200.
    """
    return MISSING if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Format a duration.

    Args:
        seconds: The duration in seconds. None, infinity and NaN count as missing.

    Returns:
        The duration as in 0.4 s, 35 s, 2 min 10 s or 1 h 5 min.
    """
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"


def finite_values(values: Iterable[float | None]) -> list[float]:
    """Drop None, infinity and NaN, which cannot be drawn.

    Args:
        values: Figures, in any order.

    Returns:
        The finite values, in the same order.
    """
    return [value for value in values if value is not None and math.isfinite(value)]


def shorten(text: str, length: int) -> str:
    """Cut a text to fit a chart or a cell, on one line.

    Args:
        text: The text, whose whitespace is collapsed.
        length: The number of characters that fit.

    Returns:
        The text, cut and with an ellipsis if it was longer.
    """
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def base_name(name: str) -> str:
    """Return the last part of a base's path or hub id.

    Args:
        name: A path, with slashes or backslashes, or a hub id.

    Returns:
        The last part, or the whole name if that is empty.
    """
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or name


def join_words(words: Iterable[str]) -> str:
    """Join words as in a sentence.

    Args:
        words: The words; there may be none.

    Returns:
        The words as in “a, b and c”.
    """
    word_list = list(words)
    if len(word_list) < 2:
        return "".join(word_list)
    return f"{', '.join(word_list[:-1])} and {word_list[-1]}"


def format_cell(column: Column, cell: Cell) -> str:
    """Format a cell of a table view by its column's form; `MISSING` for None.

    Args:
        column: The column, whose form determines the format.
        cell: The cell's value.
    """
    if cell is None:
        return MISSING
    if isinstance(cell, str):
        return cell
    if column.form == "count":
        return integer(cell)
    if column.form == "share":
        return percent(cell)
    sign = "+" if column.form == "change" and cell > 0 else ""
    if 0 < abs(cell) < SMALL_CELL:  # such as the error of a regression, whose unit may be small
        return f"{sign}{cell:.3g}".replace("-", "−")
    return sign + number(cell)
