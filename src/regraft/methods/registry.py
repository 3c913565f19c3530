"""The methods there are: every module of this package that defines `METHOD`."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    from regraft.methods.method import Method

ORDER = ("scratch", "direct", "init", "distill", "init+distill")


@functools.cache
def methods() -> dict[str, Method]:
    """Find every method.

    Returns:
        The methods by name: the paper's in their usual order, then others by name.
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
