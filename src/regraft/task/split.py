"""Some examples of a task."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Some examples of a task.

    Args:
        name: `train`, `dev` or `test`.
        source: The file or data set they were read from.
        texts: One or two texts an example.
        labels: The class of each example, as an index into the task's labels.
        rows: The row of each example in its source, from 1.
    """

    name: str
    source: str
    texts: list[tuple[str, ...]]
    labels: Integers
    rows: Integers

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | Integers) -> Split:
        """Keep some of the examples.

        Args:
            indices: Their positions, from 0, in the order wanted.

        Returns:
            A split of the same name and source.
        """
        import numpy as np

        chosen = np.asarray(indices, dtype=np.int64)
        texts = [self.texts[i] for i in chosen.tolist()]
        return dataclasses.replace(self, texts=texts, labels=self.labels[chosen], rows=self.rows[chosen])
