"""Typed records: frozen dataclasses that are written as JSON and validated when they are read."""

from __future__ import annotations

import functools
import json
import math
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from regraft.errors import OutcomeError

Record = TypeVar("Record")

MAX_FIGURE = 1e100  # far above any result; sums and charts of larger numbers overflow
"""The largest magnitude of a finite number in a record."""
MAX_COUNT = 2**53  # larger whole numbers are not exact in floating point, which JSON in other languages uses
"""The largest `Count`."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""A number of items."""
# Descriptions of the expected values, by the types of pydantic's errors.
_EXPECTED = {
    "finite_number": "a finite number",
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


def read_record(record_type: type[Record], content: Any, origin: str, remedy: str) -> Record:
    """Read a record strictly: values are not converted; unknown fields, which a newer version may write, are ignored.

    Args:
        record_type: The dataclass, or a type that is composed of dataclasses.
        content: The parsed JSON, such as the result of `read_json`.
        origin: The file, and the position in it, for error messages.
        remedy: The command that writes such a file.

    Raises:
        OutcomeError: A field is missing, out of range or nested too deeply, or has a different type or shape.
    """
    hashable: Any = record_type
    try:
        location = _location_of_too_large(content)
        if location is not None:
            raise OutcomeError(f"{origin}{location}: expected at most {MAX_FIGURE:g}. Make it again with `{remedy}`.")
        record: Record = _adapter(hashable).validate_json(plain_text(content), strict=True)
    except RecursionError:
        raise OutcomeError(f"{origin}: is nested too deeply. Make it again with `{remedy}`.") from None
    except ValidationError as error:
        num_further = error.error_count() - 1
        further = f" {num_further:,} more fields are wrong." if num_further else ""
        message = f"{origin}{_explain(error.errors()[0])}. Make it again with `{remedy}`.{further}"
        raise OutcomeError(message) from None
    return record


def percent_to_share(percent: float | None) -> float | None:
    """Convert a percentage, as in records of regraft 0.1, to a share.

    Args:
        percent: The percentage, or None.
    """
    return None if percent is None else percent / 100


def plain_text(content: Any) -> str:
    """Format a value as JSON that can be encoded in UTF-8.

    Args:
        content: Any value that JSON can represent. Lone surrogates, as in paths that are not UTF-8, become question
            marks.
    """
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _adapter(record_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(record_type)


def _location_of_too_large(value: Any) -> str | None:
    """Return the location of the first finite number beyond ±`MAX_FIGURE`, such as `: scores[0]`; None without any."""
    if isinstance(value, dict):
        for name, entry in value.items():
            location = _location_of_too_large(entry)
            if location is not None:
                return f": {name}{location}"
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            location = _location_of_too_large(entry)
            if location is not None:
                return f"[{index}]{location}"
    elif isinstance(value, (int, float)) and MAX_FIGURE < abs(value) < math.inf:
        return ""
    return None


def _explain(error: Any) -> str:
    """Return the location and the problem that an error of pydantic describes."""
    location = "".join(f"[{part}]" if isinstance(part, int) else f": {part}" for part in error["loc"])
    if error["type"] == "missing":
        return f"{location}: is missing"
    if error["type"] == "value_error":  # raised in `__post_init__`, with the location in the record
        return f"{location}: {error['ctx']['error']}"
    expected = _EXPECTED.get(error["type"])
    if expected is None:
        return f"{location}: {error['msg']}"
    return f"{location}: expected {expected.format(**error.get('ctx', {}))}, found {error['input']!r:.80}"


def require_length(values: Any, length: int, name: str) -> None:
    """Check the length of a record's field.

    Args:
        values: The field's value: a sequence or a mapping.
        length: The expected length.
        name: The field's name, for the message.

    Raises:
        ValueError: The field has a different length.
    """
    if len(values) != length:
        raise ValueError(f"{name}: expected {length} values, found {len(values)}")


def require_shape(matrix: Any, rows: int, columns: int, name: str) -> None:
    """Check the shape of a matrix in a record.

    Args:
        matrix: The field's value: a sequence of rows.
        rows: The expected number of rows.
        columns: The expected number of columns.
        name: The field's name, for the message.

    Raises:
        ValueError: The matrix has a different shape.
    """
    require_length(matrix, rows, name)
    for row in matrix:
        require_length(row, columns, name)
