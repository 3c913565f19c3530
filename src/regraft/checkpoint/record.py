"""Typed records: frozen dataclasses that are written as JSON and read back field by field."""

from __future__ import annotations

import functools
import json
import math
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from regraft.errors import OutcomeError

Record = TypeVar("Record")

LARGEST = 1e100  # no figure comes near it, and sums and charts of larger ones overflow
MOST = 2**53  # above it floating point, and with it JSON in other languages, no longer tells whole numbers apart
Count = Annotated[int, Field(ge=0, le=MOST)]
"""How many there are of something."""
_EXPECTED = {
    "string_type": "a text",
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "dataclass_type": "an object",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "too_long": "at most {max_length} values",
    "string_pattern_mismatch": "a text like {pattern}",
}


def read_record(kind: type[Record], content: Any, where: str, remedy: str) -> Record:
    """Read a record strictly: nothing is converted, and fields that a newer version may have added are passed over.

    Args:
        kind: The dataclass, or a type made of some.
        content: What the file holds, from `read_json`.
        where: The file, and the place in it.
        remedy: The command that writes such a file.

    Returns:
        The record.

    Raises:
        OutcomeError: A field is missing, of another type, out of its range or of another shape; the message names it.
    """
    hashable: Any = kind
    try:
        if (location := _too_large(content)) is not None:
            raise OutcomeError(f"{where}{location}: expected at most {LARGEST:g}. Make it again with `{remedy}`.")
        record: Record = _adapter(hashable).validate_json(plain_text(content), strict=True)
    except RecursionError:
        raise OutcomeError(f"{where}: is nested too deep. Make it again with `{remedy}`.") from None
    except ValidationError as error:
        first, count = error.errors()[0], error.error_count()
        more = f" It is the first of {count:,} fields that are wrong." if count > 1 else ""
        raise OutcomeError(f"{where}{_explain(first)}. Make it again with `{remedy}`.{more}") from None
    return record


def percent_to_share(percent: float | None) -> float | None:
    """Convert a percentage of regraft 0.1, whose records had some, to a share.

    Args:
        percent: The percentage; None where there is none.

    Returns:
        The share of 1.
    """
    return None if percent is None else percent / 100


def plain_text(content: Any) -> str:
    """Write JSON that every parser reads.

    Args:
        content: Any JSON; halves of surrogate pairs, as of a path that is no UTF-8, become question marks.

    Returns:
        The text.
    """
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _too_large(value: Any) -> str | None:
    """Locate the first finite number that is larger than any figure; None if there is none."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if (location := _too_large(entry)) is not None:
                return f": {name}{location}"
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            if (location := _too_large(entry)) is not None:
                return f"[{number}]{location}"
    elif isinstance(value, (int, float)) and LARGEST < abs(value) < math.inf:
        return ""
    return None


def _explain(error: Any) -> str:
    location = "".join(f"[{part}]" if isinstance(part, int) else f": {part}" for part in error["loc"])
    if error["type"] == "missing":
        return f"{location}: is missing"
    if error["type"] == "value_error":  # from `__post_init__`, which says where in the record
        return f"{location}: {error['ctx']['error']}"
    expected = _EXPECTED.get(error["type"])
    if expected is None:
        return f"{location}: {error['msg']}"
    return f"{location}: expected {expected.format(**error.get('ctx', {}))}, found {error['input']!r:.80}"


def require_length(values: Any, length: int, name: str) -> None:
    """Check how many values a field of a record has.

    Args:
        values: The field.
        length: How many there are to be.
        name: The field's, for the message.

    Raises:
        ValueError: There are more or fewer.
    """
    if len(values) != length:
        raise ValueError(f"{name}: expected {length} values, found {len(values)} values")


def require_shape(matrix: Any, rows: int, columns: int, name: str) -> None:
    """Check the shape of a matrix in a record.

    Args:
        matrix: Rows of values.
        rows: How many rows there are to be.
        columns: How many values are to be in each.
        name: The field's, for the message.

    Raises:
        ValueError: It has another shape.
    """
    require_length(matrix, rows, name)
    for row in matrix:
        require_length(row, columns, name)
