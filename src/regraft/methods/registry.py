"""The methods there are: every module of this package that defines `METHOD`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.methods.method import Method

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
            values[name] = _as_type(yaml.safe_load(value), known[name].default)
        except (ValueError, TypeError, yaml.YAMLError) as error:
            default = known[name].default
            kind = {bool: "true or false", tuple: "a list"}.get(type(default), f"of type {type(default).__name__}")
            raise RecipeError(f"option {name} of {method} is {kind}, found {value!r}.") from error
    return options(**values) if options else None


def _as_type(value: Any, default: Any) -> Any:
    """Read a value as the type of the option's default; a list may be a single value, a number a whole one."""
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    if isinstance(default, bool) or isinstance(value, bool):
        if isinstance(default, bool) and isinstance(value, bool):
            return value
        raise TypeError
    return type(default)(value) if default is not None and value is not None else value
