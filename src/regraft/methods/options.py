"""The options of methods: parsed from names and values, checked, and described."""

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

TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str}


def describe_methods() -> list[tuple[str, str, str, str]]:
    """Describe every listed method, for a table.

    Returns:
        One row per method: the name, the summary, the needs, and the options with their defaults.
    """
    rows = []
    for method in methods().values():
        options = ", ".join(f"{name}={_format_default(field.default)}" for name, field in fields_of(method).items())
        needs = ", ".join(need for need in method.needs() if need != "training") or "nothing"
        rows.append((method.name, method.summary, needs, options))
    return rows


def fields_of(method: Method) -> dict[str, dataclasses.Field[Any]]:
    """List a method's options.

    Args:
        method: The method.

    Returns:
        The fields of its parts' dataclasses by name; by PART.NAME where two parts have an option of that name.
    """
    pairs = list(_all_fields(method))
    names = [field.name for _, field in pairs]
    return {f.name if names.count(f.name) == 1 else f"{part}.{f.name}": f for part, f in pairs}


def parse_options(method: str, texts: Sequence[str]) -> Any:
    """Parse a method's options from names and values of a command line.

    Args:
        method: The method's name.
        texts: Options as `NAME=VALUE`, or `PART.NAME=VALUE` for a start or an objective; values as in YAML.

    Returns:
        The options; a tuple if both start and objective have options; None if the method has none.

    Raises:
        RecipeError: The method has no such option, two of its parts have it, or the value is of another type.
    """
    import yaml

    chosen = find_method(method)
    pairs = list(_all_fields(chosen))
    values: dict[str, dict[str, Any]] = {part.name: {} for part in chosen.parts if part.options}
    for text in texts:
        name, equals, value = text.partition("=")
        matches = [(part, field) for part, field in pairs if name in (field.name, f"{part}.{field.name}")]
        if not equals:
            raise RecipeError(f"an option is written NAME=VALUE, found {text!r}.")
        if not matches:
            names = list(fields_of(chosen))
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
            kind = "true or false" if declared == "bool" else f"of type {declared}"
            raise RecipeError(f"option {name} of {method} must be {kind}, found {value!r}.") from error
    options = tuple(part.options(**values[part.name]) for part in chosen.parts if part.options)
    return options if len(options) > 1 else options[0] if options else None


def check_options(method: str, options: Iterable[Any]) -> None:
    """Refuse options that are infinite or not a number.

    Args:
        method: The method's name.
        options: The options of each part, or None.

    Raises:
        RecipeError: An option is infinite or not a number.
    """
    for part_options in options:
        for name, value in dataclasses.asdict(part_options).items() if part_options is not None else ():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise RecipeError(f"option {name} of {method} must be a finite number, found {value}.")


def _all_fields(method: Method) -> Iterable[tuple[str, dataclasses.Field[Any]]]:
    for part in method.parts:
        for field in dataclasses.fields(part.options) if part.options else ():
            yield part.name, field


def _format_default(default: Any) -> str:
    if isinstance(default, tuple):
        return f"[{','.join(map(_format_default, default))}]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _convert_value(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Convert a value to the option's type.

    A single value may stand for a list, an integer for a float, and a string for a number: YAML reads 1e-9 as a string,
    since it has no point.
    """
    declared = declared_type(field)
    declared, optional = declared.removesuffix(" | None"), declared.endswith(" | None")
    if value is None and optional:
        return None
    if not declared.startswith("tuple["):
        return _convert_scalar(value, TYPES[declared])
    entry_type = TYPES[re.split(r"[,\]]", declared.removeprefix("tuple["))[0]]
    return tuple(_convert_scalar(entry, entry_type) for entry in (value if isinstance(value, list) else [value]))


def _convert_scalar(value: Any, scalar_type: type) -> Any:
    if isinstance(value, bool) != (scalar_type is bool):
        raise TypeError
    converted = scalar_type(value)
    if scalar_type is int and converted != float(value):
        raise ValueError  # int() would silently truncate a fraction
    return converted
