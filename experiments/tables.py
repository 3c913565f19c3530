"""Rows of figures: selecting them, averaging them over seeds and writing them as Markdown tables."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Row = dict[str, Any]
"""A JSON object of `results.json`: what was run, and its figures."""
MISSING = "–"
"""Written into a table where there is no figure."""


def select(rows: Iterable[Row], **values: Any) -> list[Row]:
    """Return the rows that have all of these values.

    Args:
        rows: Rows of results.
        values: Expected values by key.

    Returns:
        The matching rows, in their order.
    """
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def distinct_values(rows: Iterable[Row], name: str) -> list[Any]:
    """Return the values of a key, each once, in order of first appearance."""
    return list(dict.fromkeys(row[name] for row in rows))


def distinct_keys(rows: Iterable[Row], *names: str) -> list[tuple[Any, ...]]:
    """Return the combinations of several keys' values, each once, in order of first appearance."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation; a single value deviates by 0, and no value has a mean of NaN."""
    if not values:
        return float("nan"), 0.0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def format_mean(values: Sequence[float | None], digits: int = 3) -> str:
    """Write a mean and a standard deviation over seeds.

    Args:
        values: One value a seed; if one is None, neither is written.
        digits: Decimal places.

    Returns:
        `mean ± deviation`; the mean alone for one seed; a dash for none.
    """
    numbers = [value for value in values if value is not None]
    if not values or len(numbers) < len(values):
        return MISSING
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def format_difference(difference: Row | None) -> str:
    """Write a difference of scores and its 95 % interval in points; a dash for None."""
    if difference is None:
        return MISSING
    low, high = 100 * difference["low"], 100 * difference["high"]
    return f"{100 * difference['estimate']:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table.

    Args:
        head: The column titles.
        rows: The cells of each row, as many as there are columns.

    Returns:
        The lines of the table, without a final line break.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
