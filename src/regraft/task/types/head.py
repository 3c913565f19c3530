"""The head of a model: the task type that it is for, and the names of its outputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import MAX_LISTED

if TYPE_CHECKING:
    from regraft.task.types.type import Task

ANY_PROBLEM_TYPE = (None, "single_label_classification", "multi_label_classification", "regression")
"""All values of `problem_type` in transformers, for types whose classes in transformers do not read it: the value may
be left from the base's config."""


@dataclasses.dataclass(frozen=True)
class Head:
    """A description of the layers that turn a model's hidden states into outputs for a task.

    Args:
        type: The task type that the head is for.
        labels: The label names, in the order of the outputs; empty if the outputs are numbers without names.
    """

    type: type[Task]
    labels: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of a model's config that describe the head, with their values."""
        return self.type.head_settings(self.labels)

    @property
    def num_outputs(self) -> int:
        """The number of outputs, which is the width of the last layer; 0 for a head of the base, whose width varies."""
        return int(self.settings.get("num_labels", 0))

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the outputs in a model's config: the labels, unless the task type names them otherwise."""
        return tuple(self.settings.get("id2label", {}).values())

    def __str__(self) -> str:
        if self.type.head_in_base:
            return "the base's own head"
        if not self.labels:
            noun = "outputs" if self.num_outputs > 1 else "output"
            return f"{self.num_outputs} {noun} without labels"
        listed = ", ".join(self.labels[:MAX_LISTED]) + (" …" if len(self.labels) > MAX_LISTED else "")
        outputs = "" if self.num_outputs == len(self.labels) else f"{self.num_outputs} outputs for "
        return f"{outputs}{len(self.labels)} labels ({listed})"
