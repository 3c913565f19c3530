"""How figures are written, the same everywhere on the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number.

    Args:
        value: The number, None where it is lacking.
        digits: Behind the point.

    Returns:
        As in 0.912; a minus is a minus sign.
    """
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not finite"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share of one as a percentage.

    Args:
        share: From 0 to 1.
        digits: Behind the point.

    Returns:
        As in 4.2 %.
    """
    return NONE if share is None else f"{number(100 * share, digits)} %"


def whole(value: float | None) -> str:
    """Write a count.

    Args:
        value: The count; a mean of counts is rounded.

    Returns:
        As in 1,200.
    """
    return NONE if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Write a time.

    Args:
        value: In seconds.

    Returns:
        As in 0.4 s, 35 s, 2 min 10 s or 1 h 5 min.
    """
    if value is None or not math.isfinite(value):
        return NONE
    if value < 10:
        return f"{value:.1f} s"
    rest = round(value)
    if rest < 60:
        return f"{rest} s"
    if rest < 3600:
        return f"{rest // 60} min {rest % 60} s"
    return f"{rest // 3600} h {rest % 3600 // 60} min"


def finite(values: Iterable[float | None]) -> list[float]:
    """Keep the values that can be compared: what diverged is not finite, and what was not measured is None.

    Args:
        values: The values.

    Returns:
        Those that are numbers.
    """
    return [value for value in values if value is not None and math.isfinite(value)]


def clip(text: str, length: int) -> str:
    """Shorten a text to fit a chart, on one line.

    Args:
        text: The text.
        length: How many characters fit.

    Returns:
        The text, with an ellipsis if it was longer.
    """
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def base_name(name: str) -> str:
    """Return the last part of a base's name, which is what people call it.

    Args:
        name: A folder or a hub id.

    Returns:
        Its last part.
    """
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or name


def listing(words: Iterable[str]) -> str:
    """Join words as prose does.

    Args:
        words: The words.

    Returns:
        As in a, b and c.
    """
    several = list(words)
    return " and ".join([", ".join(several[:-1]), several[-1]]) if len(several) > 1 else "".join(several)
