"""Label values of every kind of file as label names, the order of the names, and names that are written alike."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LISTED = 20
"""So many labels a message lists; a task may have thousands."""
_WHOLE = re.compile(r"([+-]?\d+)\.0+")
_MISSING = frozenset(("na", "n/a", "#n/a", "nan", "none", "null", "nil", "<na>", "-", "?"))
"""What spreadsheets, pandas and databases write where a value is missing, in lower case."""


def label_name(value: object) -> str | None:
    """Return the name of a label, the same one whichever format the value was stored in.

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
        distinct.sort(key=Decimal)  # int refuses more than 4,300 digits
    return tuple(distinct)


def matching(names: Sequence[str], others: Sequence[str]) -> dict[str, str] | None:
    """Pair labels with the same labels as another tool wrote them.

    Names that are equal are paired if all are; else those that are equal once truth values and whole numbers are
    named as `label_name` does; else those that differ in case, blanks or invisible characters alone.

    Args:
        names: The labels, each once.
        others: The labels to pair them with.

    Returns:
        The other name of each label; None where not all have a partner, or one of them could have several.
    """

    def as_data(name: str) -> str:
        return label_name(name) or name

    for key in (str, as_data, lambda name: folded(as_data(name))):
        left, right = ({key(name): name for name in side} for side in (names, others))
        if len(left) == len(names) and len(right) == len(others) and left.keys() == right.keys():
            return {name: right[written] for written, name in left.items()}
    return None


def folded(name: str) -> str:
    """Reduce a name to what a reader sees of it: composed, in one case, blanks joined, nothing invisible.

    Args:
        name: A label.

    Returns:
        The same text for names that look alike.
    """
    composed = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join("".join(letter for letter in composed if unicodedata.category(letter) != "Cf").split())


def lookalikes(names: Sequence[str]) -> list[list[str]]:
    """Group labels that look alike and are different.

    Args:
        names: The labels, each once.

    Returns:
        The groups of two names or more.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(folded(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def reads_as_missing(name: str) -> bool:
    """Whether a label is what other tools write where a value is missing, as `NaN` or `N/A`."""
    return folded(name) in _MISSING


def listing(names: Sequence[str]) -> str:
    """List labels for a message, the first ones of many.

    Args:
        names: The labels.

    Returns:
        Their names in quotes; `none` where there are none.
    """
    return ", ".join(f"{name!r:.100}" for name in names[:LISTED]) + (" …" if len(names) > LISTED else "") or "none"
