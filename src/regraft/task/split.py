"""Some examples of a task."""

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
    """Some examples of a task.

    Args:
        name: `train`, `dev` or `test`.
        source: The file or data set they were read from.
        inputs: What a model reads of each example; in most types of task a tuple of one or two texts.
        targets: What it is to predict, an entry an example; in classification an index into the task's labels.
        rows: The row of each example in its source, from 1.
    """

    name: str
    source: str
    inputs: list[Any]
    targets: Targets
    rows: Integers

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def texts(self) -> list[Any]:
        """The inputs, where they are texts."""
        return self.inputs

    @property
    def labels(self) -> Targets:
        """The targets, where they are classes."""
        return self.targets

    def take(self, indices: Sequence[int] | Integers) -> Split:
        """Keep some of the examples.

        Args:
            indices: Their positions, from 0, in the order wanted.

        Returns:
            A split of the same name and source.
        """
        import numpy as np

        chosen = np.asarray(indices, dtype=np.int64)
        inputs = [self.inputs[i] for i in chosen.tolist()]
        return dataclasses.replace(self, inputs=inputs, targets=self.targets[chosen], rows=self.rows[chosen])
