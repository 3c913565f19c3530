"""Discovery of the task types of this package and of those that other distributions register."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

from regraft.errors import DataError


def discover_types(base: Any, group: str) -> dict[str, Any]:
    """Find the task types that modules of this package define as `TASK`, or that entry points name.

    Args:
        base: The superclass of all task types.
        group: The entry point group under which other distributions register their task types.

    Returns:
        The classes by type name, first of this package, then of entry points.

    Raises:
        DataError: An entry point cannot be loaded, is not a subclass of `base`, or uses a name that is taken.
    """
    types: dict[str, Any] = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if "\nTASK = " in file.read_text(encoding="utf-8"):  # other modules may import torch, which takes seconds
            built_in: Any = importlib.import_module(f"{__package__}.{file.stem}").TASK
            types[built_in.type_name()] = built_in
    for entry_point in importlib.metadata.entry_points(group=group):
        distribution = entry_point.dist.name if entry_point.dist else "a distribution"
        origin = f"the entry point {entry_point.name!r} of {distribution}"
        try:
            task_type: Any = entry_point.load()
        except Exception as error:  # third-party code may raise anything
            raise DataError(f"{origin} cannot be loaded ({error!r:.300}). Fix or uninstall {distribution}.") from error
        is_task_type = isinstance(task_type, type) and issubclass(task_type, base)
        if not is_task_type:
            raise DataError(
                f"{origin} is {task_type!r:.100}, not a subclass of regraft.Task. Fix or uninstall {distribution}."
            )
        name = task_type.type_name()
        if name in types:
            raise DataError(f"{origin} defines a task type {name!r}, which already exists. Rename it.")
        types[name] = task_type
    return types
