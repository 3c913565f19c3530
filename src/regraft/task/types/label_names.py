"""The names of labels: their normalisation in task files and data, and warnings about doubtful ones."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError
from regraft.task.file import is_unicode
from regraft.task.labels import fold_name, format_names, group_lookalikes, is_missing_value, label_name

if TYPE_CHECKING:
    from collections.abc import Sequence


def normalise_names(labels: Any) -> Any:
    """Normalise the value of the key `labels` in the same way as labels in the data.

    Args:
        labels: The value in a task file; a value that is no list is returned unchanged.
    """
    if not isinstance(labels, list | tuple):
        return labels
    return [label_name(label) if isinstance(label, str | int | float) else label for label in labels]


def validate_names(labels: tuple[str, ...] | None, *, is_required: bool) -> tuple[str, ...] | None:
    """Return the value of the key `labels`, unless it is invalid.

    Args:
        labels: The label names; None if the task file lists none.
        is_required: Whether the label names cannot be read from the data.

    Raises:
        ValueError: A label is repeated, there is a single one, or the required names are missing.
    """
    if labels is None:
        if is_required:
            raise ValueError("is required if there is no column of labels. List the label names of the old head.")
        return None
    repeated = sorted(name for name, count in Counter(labels).items() if count > 1)
    if repeated:
        raise ValueError(f"lists {format_names(repeated)} more than once. List each label once.")
    if len(labels) < 2:
        raise ValueError(f"lists {len(labels)} label. List two or more, or leave the key out.")
    return labels


def require_unicode(labels: Sequence[str], source: str) -> None:
    """Check that label names are valid Unicode, so that they can be stored.

    Args:
        labels: The label names.
        source: The source of the training examples, as messages name it.

    Raises:
        DataError: A name is not valid Unicode.
    """
    invalid = [label for label in labels if not is_unicode(label)]
    if invalid:
        raise DataError(f"{source}: the label {invalid[0]!r} is not valid Unicode. Rename it.")


def decode_label(value: object, classes: Sequence[str] | None) -> str | None:
    """Return the name of a label in the data.

    Args:
        value: The value of a row; an index if it is an integer and the data set names its classes.
        classes: The class names of the data set, if it has any.

    Returns:
        The name; None for a missing value, and for an index of no class: data sets store hidden labels as −1.

    Raises:
        TypeError: The value is neither a text, a number nor a boolean.
    """
    if classes is None or not isinstance(value, int):
        return label_name(value)
    return classes[value] if 0 <= value < len(classes) else None


def unknown_label(name: str, labels: Sequence[str], *, are_listed: bool) -> str:
    """Explain that a label of a row is not among those of the task.

    Args:
        name: The name in the row.
        labels: The label names of the task.
        are_listed: Whether the task file lists the labels, so that they are not those of the training examples.

    Returns:
        The message after the name of the source and the row.
    """
    lookalikes = [label for label in labels if fold_name(label) == fold_name(name)]
    hint = f" It differs from {lookalikes[0]!a} only in case, whitespace or invisible characters." if lookalikes else ""
    origin = "the listed labels" if are_listed else "the training labels"
    remedy = "Add it to `labels`" if are_listed else "List all labels under `labels` in the task file"
    return f"the label {name!r} is not among {origin}: {format_names(labels)}.{hint} {remedy}, or correct the row."


def name_warnings(labels: Sequence[str]) -> list[str]:
    """Describe label names that look alike or like missing values.

    Args:
        labels: The label names, each once.

    Returns:
        One message per group of names that look alike, and one for the first that looks like a missing value.
    """
    warnings = []
    for lookalikes in group_lookalikes(labels):
        names = " and ".join(map(ascii, lookalikes))
        warnings.append(
            f"the labels {names} look alike: they differ only in case, whitespace, invisible characters or the "
            "encoding of accents, but count as different classes. If they are one class, write them alike."
        )
    missing = [name for name in labels if is_missing_value(name)]
    if missing:
        warnings.append(
            f"the label {missing[0]!r} looks like a missing value, but counts as a class. If its rows have no "
            "label, remove them."
        )
    return warnings


def are_fractions(labels: Sequence[Any]) -> bool:
    """Return whether all labels are numbers or the text of numbers, and some of them have decimals.

    Args:
        labels: The values of a column of labels; missing ones do not count.
    """
    try:
        numbers = [float(label) for label in labels if label is not None]
    except (TypeError, ValueError):
        return False
    return any(math.isfinite(number) and number != round(number) for number in numbers)
