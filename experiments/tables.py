"""Select rows of figures, average them over seeds and write them as Markdown tables."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Row = dict[str, Any]
"""A JSON object of `results.json`: the keys of a run, and its figures."""
CELL_KEYS = ("task", "upgrade", "kind")
"""The keys of a row that identify its cell on a page; a `grid.Cell` is one run, with a regime, method and seed."""
DIGITS = 5
"""Decimal places of published figures; further places differ from machine to machine."""
PERCENT_DIGITS = 2
"""Decimal places of published shares in %."""
MISSING = "–"
"""Written into a table in place of a missing figure."""


def select(rows: Iterable[Row], **expected: Any) -> list[Row]:
    """Return the rows that have all expected values.

    Args:
        rows: Rows of results, which have all of these keys.
        expected: Expected values by key.

    Returns:
        The matching rows, in their order.
    """
    return [row for row in rows if all(row[key] == value for key, value in expected.items())]


def distinct_values(rows: Iterable[Row], key: str) -> list[Any]:
    """Return the distinct values of a key, in order of first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def distinct_keys(rows: Iterable[Row], *keys: str) -> list[tuple[Any, ...]]:
    """Return the distinct combinations of several keys' values, in order of first appearance."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation; a single value deviates by 0, and no values have a mean of NaN."""
    if not values:
        return float("nan"), 0.0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def median_steps_share(runs: Sequence[Row]) -> float:
    """Return the median of the runs' `share` of scratch's steps, in %; a None counts as infinite."""
    return statistics.median(float("inf") if run["share"] is None else run["share"] for run in runs)


def format_steps_share(share: float) -> str:
    """Write a share of scratch's steps without its unit, %; an infinite one as "never"."""
    return "never" if share == float("inf") else f"{share:.0f}"


def format_mean(values: Sequence[float | None], digits: int = 3) -> str:
    """Write a mean and a standard deviation over seeds.

    Args:
        values: One value per seed; None for a seed without a value.
        digits: Decimal places.

    Returns:
        `mean ± deviation`; the mean alone for one seed; a dash if there are no values, or if one of them is None.
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
