"""The head of a model: which task type it is for, and the names of its outputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regraft.task.types.type import Task


@dataclasses.dataclass(frozen=True)
class Head:
    """What turns a body's states into outputs.

    Args:
        type: The task type it is for.
        labels: The names of its outputs, in their order.
    """

    type: type[Task]
    labels: tuple[str, ...]
