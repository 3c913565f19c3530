"""A split of a task's examples."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    Integers = np.ndarray[Any, np.dtype[np.int64]]
    Targets = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A split of a task's examples.

    Args:
        name: `train`, `dev` or `test`.
        source: The file or data set that the examples were read from.
        inputs: The input of a model per example; for task types of text, a tuple of one or two texts.
        targets: The target of a model per example; in classification, indices of the task's labels. Targets of
            different lengths, such as the tags of a sentence's words, are lists in an array of objects.
        row_numbers: The row number of each example in its source, counted from 1.
    """

    name: str
    source: str
    inputs: list[Any]
    targets: Targets
    row_numbers: Integers

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def texts(self) -> list[Any]:
        """The inputs, under the name that they have in tasks of text."""
        return self.inputs

    @property
    def labels(self) -> Targets:
        """The targets, under the name that they have in classification."""
        return self.targets

    def take(self, indices: Sequence[int] | Integers) -> Split:
        """Select examples.

        Args:
            indices: The indices of the examples, in the order of the result.

        Returns:
            The selected examples, as a split of the same name and source.
        """
        import numpy as np

        selected = np.asarray(indices, dtype=np.int64)
        return dataclasses.replace(
            self,
            inputs=[self.inputs[index] for index in selected.tolist()],
            targets=self.targets[selected],
            row_numbers=self.row_numbers[selected],
        )


def object_array(values: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.object_]]:
    """Return an array of one dimension whose elements are the values, even if these are lists of the same length."""
    import numpy as np

    return np.fromiter(values, dtype=object, count=len(values))
