"""Label values of every kind of file as label names, and the order of the names."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_WHOLE = re.compile(r"([+-]?\d+)\.0+")


def label_name(value: object) -> str | None:
    """Give the name of a label, the same one whichever format the value was stored in.

    A whole number is named without its `.0` and a truth value in lower case, as text too: CSV files have only text,
    and pandas writes whole numbers as `1.0` where a value is missing, and truth values as `True`.

    Args:
        value: What the file holds.

    Returns:
        The name, or None where the label is missing.

    Raises:
        TypeError: The value is neither text, a number nor a truth value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str):
        if not value.strip():
            return None
        if whole := _WHOLE.fullmatch(value):
            return whole[1]
        return value.lower() if value in ("True", "False") else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


def label_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort label names: by number if all are whole numbers, else by alphabet.

    Args:
        names: The names, in any order, repeated or not.

    Returns:
        Each name once.
    """
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?\d+", name) for name in distinct):
        distinct.sort(key=int)
    return tuple(distinct)
