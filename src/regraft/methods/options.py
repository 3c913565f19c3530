"""The options of methods: read from names and values, checked, and described."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.methods.registry import find_method, methods

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from regraft.methods.method import Method

TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str}


def describe_methods() -> list[tuple[str, str, str, str]]:
    """Describe every listed method, for a table.

    Returns:
        Its name, what it does, what it needs, and its options with their defaults.
    """
    rows = []
    for method in methods().values():
        options = ", ".join(f"{name}={_write(field.default)}" for name, field in fields_of(method).items())
        needs = ", ".join(need for need in method.needs() if need != "training") or "nothing"
        rows.append((method.name, method.summary, needs, options))
    return rows


def fields_of(method: Method) -> dict[str, dataclasses.Field[Any]]:
    """List a method's options.

    Args:
        method: The method.

    Returns:
        The fields of its parts' dataclasses by name; as PART.NAME where two parts have one of that name.
    """
    pairs = list(_all_fields(method))
    names = [field.name for _, field in pairs]
    return {f.name if names.count(f.name) == 1 else f"{part}.{f.name}": f for part, f in pairs}


def parse_options(method: str, texts: Sequence[str]) -> Any:
    """Make a method's options from names and values as they are written on a command line.

    Args:
        method: The method's name.
        texts: Options as `NAME=VALUE`, or `PART.NAME=VALUE` of a start or an objective; values as in YAML.

    Returns:
        The options; a tuple where both start and objective have some; None if the method has none.

    Raises:
        RecipeError: The method has no such option, two of its parts have it, or the value is of another type.
    """
    import yaml

    chosen = find_method(method)
    pairs = list(_all_fields(chosen))
    values: dict[str, dict[str, Any]] = {part.name: {} for part in chosen.parts if part.options}
    for text in texts:
        name, equals, value = text.partition("=")
        fits = [(part, field) for part, field in pairs if name in (field.name, f"{part}.{field.name}")]
        if not equals or not fits:
            names = list(fields_of(chosen))
            close = difflib.get_close_matches(name, names, n=1)
            raise RecipeError(
                f"method {method} has no option {name}{f' (did you mean {close[0]}?)' if close else ''}; "
                f"there are {', '.join(names) or 'none'}. Give NAME=VALUE."
            )
        if len(fits) > 1:
            qualified = " or ".join(f"{part}.{name}" for part, _ in fits)
            raise RecipeError(f"option {name} of {method} is of both its parts: take {qualified}.")
        ((part, field),) = fits
        try:
            values[part][field.name] = _as_type(yaml.safe_load(value), field)
        except (ValueError, TypeError, OverflowError, RecursionError, yaml.YAMLError) as error:
            declared = _declared(field)
            kind = "true or false" if declared == "bool" else f"of type {declared}"
            raise RecipeError(f"option {name} of {method} is {kind}, found {value!r}.") from error
    options = tuple(part.options(**values[part.name]) for part in chosen.parts if part.options)
    return options if len(options) > 1 else options[0] if options else None


def check_options(method: str, options: Iterable[Any]) -> None:
    """Refuse options that are infinite or not a number, whatever the method.

    Args:
        method: The method's name.
        options: Those of its parts, or None.

    Raises:
        RecipeError: There is such a number.
    """
    for own in options:
        for name, value in dataclasses.asdict(own).items() if own is not None else ():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise RecipeError(f"option {name} of {method} is a finite number, found {value}.")


def _all_fields(method: Method) -> Iterable[tuple[str, dataclasses.Field[Any]]]:
    for part in method.parts:
        for field in dataclasses.fields(part.options) if part.options else ():
            yield part.name, field


def _write(default: Any) -> str:
    if isinstance(default, tuple):
        return f"[{','.join(map(_write, default))}]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _declared(field: dataclasses.Field[Any]) -> str:
    return field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)


def _as_type(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Read a value as the option is declared; a list may be a single value, a number a whole one or a text of YAML's.

    YAML takes 1e-9 for a text, as it has no point.
    """
    declared = _declared(field)
    declared, optional = declared.removesuffix(" | None"), declared.endswith(" | None")
    if value is None and optional:
        return None
    if declared.startswith("tuple["):
        read = TYPES[declared.removeprefix("tuple[").partition(",")[0]]
        return tuple(read(entry) for entry in (value if isinstance(value, list) else [value]))
    if isinstance(value, bool) != (declared == "bool"):
        raise TypeError
    return TYPES[declared](value)
