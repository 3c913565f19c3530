"""Parsing, checks and descriptions of the options of methods."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError, did_you_mean
from regraft.methods.method import declared_type
from regraft.methods.registry import find_method, methods

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from regraft.methods.method import Method

SCALAR_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str}
"""The types of single values by their names in source, as in `OPTION_TYPE`."""


def describe_methods() -> list[tuple[str, str, str, str]]:
    """Describe every listed method, for a table.

    Returns:
        One row per method: the name, the summary, the needs except training, and the options with their defaults.
    """
    rows = []
    for method in methods().values():
        fields = option_fields(method)
        options = ", ".join(f"{name}={_format_default(field.default)}" for name, field in fields.items())
        needs = ", ".join(need for need in method.needs() if need != "training") or "nothing"
        rows.append((method.name, method.summary, needs, options))
    return rows


def option_fields(method: Method) -> dict[str, dataclasses.Field[Any]]:
    """List the fields of the options of a method's parts.

    Args:
        method: A start, an objective on top of one, or a method of a single part.

    Returns:
        The dataclass fields by name; by PART.NAME where two parts have an option of that name.
    """
    part_fields = list(_part_fields(method))
    names = [field.name for _, field in part_fields]
    fields = {}
    for part_name, field in part_fields:
        is_unique = names.count(field.name) == 1
        fields[field.name if is_unique else f"{part_name}.{field.name}"] = field
    return fields


def parse_options(method: str, assignments: Sequence[str]) -> Any:
    """Parse a method's options as they are written on a command line.

    Args:
        method: The method's name.
        assignments: Options as `NAME=VALUE` or, of a certain part, `PART.NAME=VALUE`; values as in YAML.

    Returns:
        The options; a tuple if both start and objective have options; None if the method has none.

    Raises:
        RecipeError: There is no such method, an assignment has no `=`, the method has no such option, two of its parts
            have an option of that name, or the value is of the wrong type or out of range.
    """
    import yaml

    chosen = find_method(method)
    part_fields = list(_part_fields(chosen))
    values: dict[str, dict[str, Any]] = {part.name: {} for part in chosen.parts if part.options}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        matches = [(part, field) for part, field in part_fields if name in (field.name, f"{part}.{field.name}")]
        if not equals:
            raise RecipeError(f"an option is written NAME=VALUE, found {assignment!r}.")
        if not matches:
            names = list(option_fields(chosen))
            raise RecipeError(
                f"method {method} has no option {name!r}; its options are {', '.join(names) or 'none'}."
                f"{did_you_mean(name, names)}"
            )
        if len(matches) > 1:
            qualified = " or ".join(f"{part}.{name}" for part, _ in matches)
            raise RecipeError(f"both parts of {method} have an option {name}: use {qualified}.")
        ((part, field),) = matches
        try:
            values[part][field.name] = _convert_value(yaml.safe_load(value), field)
        except (ValueError, TypeError, OverflowError, RecursionError, yaml.YAMLError) as error:
            declared = declared_type(field)
            expected = "true or false" if declared == "bool" else f"of type {declared}"
            raise RecipeError(f"option {name} of {method} must be {expected}, found {value!r}.") from error
    options = tuple(part.options(**values[part.name]) for part in chosen.parts if part.options)
    if len(options) > 1:
        return options
    return options[0] if options else None


def check_options(method: str, options: Iterable[Any]) -> None:
    """Refuse options that are infinite or NaN.

    Args:
        method: The method's name.
        options: One dataclass per part; None for a part without options.

    Raises:
        RecipeError: An option is infinite or NaN.
    """
    for part_options in options:
        if part_options is None:
            continue
        for name, value in dataclasses.asdict(part_options).items():
            entries = value if isinstance(value, tuple) else (value,)
            if any(isinstance(entry, float) and not math.isfinite(entry) for entry in entries):
                raise RecipeError(f"option {name} of {method} must not be infinite or NaN, found {value}.")


def _part_fields(method: Method) -> Iterable[tuple[str, dataclasses.Field[Any]]]:
    """Yield the part's name and the field for each option of a method."""
    for part in method.parts:
        for field in dataclasses.fields(part.options) if part.options else ():
            yield part.name, field


def _format_default(default: Any) -> str:
    """Format a default as it is written on a command line."""
    if isinstance(default, tuple):
        return f"[{','.join(map(_format_default, default))}]"
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _convert_value(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Convert a value to the option's type.

    A single value may stand for a list, an integer for a float, and a string for a number: YAML reads 1e-9 as a string,
    since it has no point.
    """
    declared = declared_type(field)
    type_name = declared.removesuffix(" | None")
    if value is None and type_name != declared:
        return None
    if not type_name.startswith("tuple["):
        return _convert_scalar(value, SCALAR_TYPES[type_name])
    entry_type = SCALAR_TYPES[re.split(r"[,\]]", type_name.removeprefix("tuple["))[0]]
    entries = value if isinstance(value, list) else [value]
    return tuple(_convert_scalar(entry, entry_type) for entry in entries)


def _convert_scalar(value: Any, scalar_type: type) -> Any:
    """Convert a scalar to a type without loss, or raise an error that `parse_options` turns into a RecipeError."""
    if isinstance(value, bool) != (scalar_type is bool):
        raise TypeError
    converted = scalar_type(value)
    if scalar_type is int and converted != float(value):
        raise ValueError  # int() would silently truncate a fraction
    return converted
