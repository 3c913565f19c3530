"""The head of a model: which task type it is for, and the names of its outputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.task.types.type import Task


@dataclasses.dataclass(frozen=True)
class Head:
    """What turns a body's states into outputs.

    Args:
        type: The task type it is for.
        labels: The names of its outputs, in their order; none of a number.
    """

    type: type[Task]
    labels: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What the config of a model says of it."""
        return self.type.head_settings(self.labels)

    @property
    def num_outputs(self) -> int:
        """How many outputs it has."""
        return int(self.settings["num_labels"])

    def __str__(self) -> str:
        if not self.labels:
            return f"{self.num_outputs} output{'s' if self.num_outputs > 1 else ''} without labels"
        return f"{self.num_outputs} labels ({', '.join(self.labels[:8])})"
