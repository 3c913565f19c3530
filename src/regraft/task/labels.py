"""Label names: how values of any file format are named, how names are ordered, and which names look alike."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_LISTED = 20
"""The number of names that a message lists; a task may have thousands of labels."""
_WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0+")
_MISSING_VALUES = frozenset(("na", "n/a", "#n/a", "nan", "none", "null", "nil", "<na>", "-", "?"))
"""What spreadsheets, pandas and databases write for a missing value, in lower case."""


def label_name(value: object) -> str | None:
    """Return the name of a label, which is the same whichever file format the value was stored in.

    Whole numbers lose a trailing `.0`, and truth values are in lower case, even where they are text: CSV files contain
    only text, and pandas writes `1.0` for whole numbers in a column with missing values, and `True` for truth values.

    Args:
        value: The value as read from a file.

    Returns:
        The name, or None for a missing value.

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
        if whole_number := _WHOLE_NUMBER.fullmatch(value):
            return whole_number[1]
        return value.lower() if value in ("True", "False") else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sort label names: numerically if all are whole numbers, else alphabetically.

    Args:
        names: The names, in any order, possibly repeated.

    Returns:
        The distinct names.
    """
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?\d+", name) for name in distinct):
        distinct.sort(key=Decimal)  # int refuses more than 4,300 digits
    return tuple(distinct)


def pair_names(names: Sequence[str], head_names: Sequence[str]) -> dict[str, str] | None:
    """Pair a task's label names with those of a head, which another tool may have spelled differently.

    Names are paired by the first of three keys under which the pairing is one to one: the name itself; the name with
    truth values and whole numbers normalised by `label_name`; the name without case, blanks and invisible characters.

    Args:
        names: The distinct label names of the task.
        head_names: The distinct label names of the head.

    Returns:
        The head's name for each of the task's; None if no key pairs all of them one to one.
    """

    def normalise(name: str) -> str:
        return label_name(name) or name

    for key in (str, normalise, lambda name: fold_name(normalise(name))):
        name_by_key = {key(name): name for name in names}
        head_by_key = {key(name): name for name in head_names}
        is_distinct = len(name_by_key) == len(names) and len(head_by_key) == len(head_names)
        if is_distinct and name_by_key.keys() == head_by_key.keys():
            return {name: head_by_key[name_key] for name_key, name in name_by_key.items()}
    return None


def fold_name(name: str) -> str:
    """Reduce a name to what a reader sees: composed characters, one case, single blanks, nothing invisible.

    Args:
        name: A label name.

    Returns:
        A text that is the same for all names that look alike.
    """
    composed = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join("".join(letter for letter in composed if unicodedata.category(letter) != "Cf").split())


def lookalikes(names: Sequence[str]) -> list[list[str]]:
    """Group different label names that look alike.

    Args:
        names: The distinct label names.

    Returns:
        The groups, each of two names or more.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fold_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def is_missing_value(name: str) -> bool:
    """Return whether a label name is what other tools write for a missing value, such as `NaN` or `N/A`."""
    return fold_name(name) in _MISSING_VALUES


def format_names(names: Sequence[str]) -> str:
    """Format names for a message, cutting a long list short.

    Args:
        names: The names.

    Returns:
        The names in quotes, or `none` if there are none.
    """
    return (
        ", ".join(f"{name!r:.100}" for name in names[:MAX_LISTED]) + (" …" if len(names) > MAX_LISTED else "") or "none"
    )
