"""Label names: their conversion from values of any file format, their order, and names that look alike."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# more than `errors.MAX_LISTED`: users look for the correct name in the list; most tables have fewer columns
MAX_CANDIDATES = 20
"""The largest number of names of labels, columns or task types that a message lists."""
_WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0+")
_MISSING_VALUES = frozenset(("na", "n/a", "#n/a", "nan", "none", "null", "nil", "<na>", "-", "?"))
"""The texts that spreadsheets, pandas and databases write for a missing value, in lower case."""


def label_name(value: object) -> str | None:
    """Return the name of a label, the same from every file format.

    Whole numbers lose a trailing `.0`, and booleans are in lower case, even if they are text: CSV files contain only
    text, and pandas writes `1.0` for whole numbers in a column with missing values, and `True` for booleans.

    Args:
        value: The value as read from a file.

    Returns:
        The name; None for a missing value, which may be NaN or whitespace.

    Raises:
        TypeError: The value is neither a text, a number nor a boolean.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str):
        if not value.strip():
            return None
        whole_number = _WHOLE_NUMBER.fullmatch(value)
        if whole_number:
            return whole_number[1]
        return value.lower() if value in ("True", "False") else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    raise TypeError(f"a label must be a text, a number or a boolean, not a {type(value).__name__}")


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sort label names: numerically if all are whole numbers, else alphabetically.

    Args:
        names: The names, in any order, possibly repeated.

    Returns:
        The distinct names, sorted.
    """
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?\d+", name) for name in distinct):
        distinct.sort(key=Decimal)  # int refuses more than 4,300 digits
    return tuple(distinct)


def pair_names(names: Sequence[str], head_names: Sequence[str]) -> dict[str, str] | None:
    """Pair a task's label names with a head's, which another tool may have spelled differently.

    Names are paired by the first of three keys under which the pairing is one to one: the name itself; the name with
    booleans and whole numbers normalised by `label_name`; that normalised name, folded by `fold_name`.

    Args:
        names: The label names of the task.
        head_names: The label names of the head.

    Returns:
        The head's name by the task's name; None if no key pairs all names one to one.
    """

    def normalise(name: str) -> str:
        return label_name(name) or name

    def fold(name: str) -> str:
        return fold_name(normalise(name))

    for make_key in (str, normalise, fold):
        name_by_key = {make_key(name): name for name in names}
        head_name_by_key = {make_key(name): name for name in head_names}
        is_distinct = len(name_by_key) == len(names) and len(head_name_by_key) == len(head_names)
        if is_distinct and name_by_key.keys() == head_name_by_key.keys():
            return {name: head_name_by_key[key] for key, name in name_by_key.items()}
    return None


def fold_name(name: str) -> str:
    """Fold names that look alike to the same text: composed characters, one case, single spaces, nothing invisible."""
    # case folding decomposes some letters, such as ǰ, so that they must be composed again
    composed = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(visible.split())


def group_lookalikes(names: Sequence[str]) -> list[list[str]]:
    """Group different label names that look alike.

    Args:
        names: The label names, each once.

    Returns:
        The groups of two names or more.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fold_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def is_missing_value(name: str) -> bool:
    """Return whether a label name is a text that other tools write for a missing value, such as `NaN` or `N/A`."""
    return fold_name(name) in _MISSING_VALUES


def format_names(names: Sequence[str]) -> str:
    """Format names for a message, cutting a long list short.

    Args:
        names: Names of labels, columns or task types, of any number and length.

    Returns:
        The first `MAX_CANDIDATES` names in quotes; `none` if there are no names.
    """
    if not names:
        return "none"
    listed = ", ".join(f"{name!r:.100}" for name in names[:MAX_CANDIDATES])
    return f"{listed} …" if len(names) > MAX_CANDIDATES else listed
