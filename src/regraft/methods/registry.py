"""The methods there are: every module of this package that defines `METHOD`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import math
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.methods.method import Method

TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str}
ORDER = (
    *("scratch", "direct", "init", "distill", "init+distill", "project"),  # the paper's
    *("ridge", "scaled", "masked", "aligned", "trimmed", "orthogonal"),
    *("ridge+init", "ridge+distill", "anchored", "interpolation", "label-free", "auto"),
)


@functools.cache
def methods() -> dict[str, Method]:
    """Find every method.

    Returns:
        The methods by name: the paper's, those without training, those with; then others by name.
    """
    found: dict[str, Method] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        method = getattr(importlib.import_module(f"regraft.methods.{module.name}"), "METHOD", None)
        if method:
            found[method.name] = method
    return dict(sorted(found.items(), key=lambda item: (ORDER.index(item[0]) if item[0] in ORDER else 99, item[0])))


def find_method(name: str) -> Method:
    """Look a method up.

    Args:
        name: Its name.

    Returns:
        The method.

    Raises:
        RecipeError: There is none of that name.
    """
    if name not in methods():
        close = difflib.get_close_matches(name, methods(), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise RecipeError(f"there is no method {name!r}; there are {', '.join(methods())}.{hint}")
    return methods()[name]


def describe_methods() -> list[tuple[str, str, str, str]]:
    """Describe every method, for a table.

    Returns:
        Its name, what it does, what it needs, and its options with their defaults.
    """
    rows = []
    for method in methods().values():
        fields = dataclasses.fields(method.options) if method.options else ()
        options = ", ".join(f"{field.name}={_shown(field.default)}" for field in fields)
        needs = ", ".join(need for need in method.needs if need != "training") or "nothing"
        rows.append((method.name, method.summary, needs, options))
    return rows


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return f"[{','.join(map(_shown, default))}]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def parse_options(method: str, given: Sequence[str]) -> Any:
    """Make a method's options from names and values as they are written on a command line.

    Args:
        method: The method's name.
        given: Options as `name=value`; values as in YAML.

    Returns:
        The options, or None if the method has none.

    Raises:
        RecipeError: The method has no such option, or the value is of another type.
    """
    import yaml

    options = find_method(method).options
    known = {field.name: field for field in dataclasses.fields(options)} if options else {}
    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise RecipeError(
                f"method {method} has no option {name}{f' (did you mean {close[0]}?)' if close else ''}; "
                f"there are {', '.join(known) or 'none'}. Give NAME=VALUE."
            )
        try:
            values[name] = _as_type(yaml.safe_load(value), known[name])
        except (ValueError, TypeError, OverflowError, RecursionError, yaml.YAMLError) as error:
            declared = str(known[name].type)
            kind = "true or false" if declared == "bool" else f"of type {declared}"
            raise RecipeError(f"option {name} of {method} is {kind}, found {value!r}.") from error
    return options(**values) if options else None


def check_options(method: str, options: Any) -> None:
    """Refuse options that are infinite or not a number, whatever the method.

    Args:
        method: The method's name.
        options: Its options, or None.

    Raises:
        RecipeError: There is such a number.
    """
    for name, value in dataclasses.asdict(options).items() if options is not None else ():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise RecipeError(f"option {name} of {method} is a finite number, found {value}.")


def _as_type(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Read a value as the option is declared; a list may be a single value, a number a whole one or a text of YAML's.

    YAML takes 1e-9 for a text, as it has no point.
    """
    declared, optional = str(field.type).removesuffix(" | None"), str(field.type).endswith(" | None")
    if value is None and optional:
        return None
    if declared.startswith("tuple["):
        read = TYPES[declared.removeprefix("tuple[").partition(",")[0]]
        return tuple(read(entry) for entry in (value if isinstance(value, list) else [value]))
    if isinstance(value, bool) != (declared == "bool"):
        raise TypeError
    return TYPES[declared](value)
