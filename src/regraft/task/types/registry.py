"""The task types that there are: this package's, and those that other distributions add."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from pathlib import Path
from typing import Any

from regraft.errors import DataError


def discovered(base: Any, package: str, group: str) -> dict[str, Any]:
    """Find the subclasses of a class that modules define as `TASK`, and that entry points name.

    Args:
        base: The class.
        package: The package of the modules.
        group: The group of the entry points.

    Returns:
        The classes by their type's name.

    Raises:
        DataError: An entry point cannot be loaded, is no such class, or has a name that is taken.
    """
    types: dict[str, Any] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        own = getattr(importlib.import_module(f"{package}.{module.name}"), "TASK", None)
        if own:
            types[own.type_name()] = own
    for entry in importlib.metadata.entry_points(group=group):
        origin = f"the entry point {entry.name!r} of {entry.dist.name if entry.dist else 'a distribution'}"
        try:
            task_type: Any = entry.load()
        except Exception as error:  # its code may raise anything
            raise DataError(f"{origin} cannot be loaded ({error!r:.300}). Mend or uninstall it.") from error
        is_type = isinstance(task_type, type) and issubclass(task_type, base)
        if not is_type:
            raise DataError(f"{origin} is {task_type!r:.100}, no subclass of regraft.Task. Mend or uninstall it.")
        if task_type.type_name() in types:
            raise DataError(f"{origin} names a task type {task_type.type_name()!r}, which there is already. Rename it.")
        types[task_type.type_name()] = task_type
    return types
