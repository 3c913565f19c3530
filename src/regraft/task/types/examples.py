"""Examples as token ids, and the rows at which a model speaks of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    Integers = np.ndarray[Any, np.dtype[np.int64]]

ROWS = ("targets", "row", "example", "token")
"""The tensors of a batch that say which rows it has; the others are the model's inputs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples as a model takes them.

    A model speaks at some tokens of an example; each of them is a *row*, which has a target. The rows of all examples
    are numbered through, example by example.

    Args:
        columns: For each of the model's inputs (`input_ids`, `token_type_ids`), a list of ids an example.
        targets: The target of each row.
        pad: The id that fills up a batch, for each column.
        tokens: At which tokens of each example its rows are; None for one row an example, at the token that the
            model's head reads.
    """

    columns: dict[str, list[list[int]]]
    targets: np.ndarray[Any, Any]
    pad: dict[str, int]
    tokens: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @property
    def lengths(self) -> Integers:
        """The number of tokens of each example."""
        import numpy as np

        return np.array([len(ids) for ids in self.columns["input_ids"]], dtype=np.int64)

    @functools.cached_property
    def _ends(self) -> Integers:
        """Past which number the rows of each example are, computed once as every batch asks."""
        import numpy as np

        return np.cumsum([len(tokens) for tokens in self.tokens or ()])

    def rows(self, indices: Sequence[int]) -> Integers:
        """Return the numbers of some examples' rows.

        Args:
            indices: Which examples.

        Returns:
            One an example's row, in the order of the examples.
        """
        import numpy as np

        if self.tokens is None:
            return np.array(list(indices), dtype=np.int64)
        ends = self._ends
        return np.concatenate([np.arange(ends[i] - len(self.tokens[i]), ends[i]) for i in indices]).astype(np.int64)

    def take(self, indices: Sequence[int]) -> Examples:
        """Keep some of the examples.

        Args:
            indices: Which, in the order wanted.

        Returns:
            The examples, whose rows are numbered anew.
        """
        columns = {name: [column[i] for i in indices] for name, column in self.columns.items()}
        tokens = None if self.tokens is None else [self.tokens[i] for i in indices]
        return Examples(columns, self.targets[self.rows(indices)], self.pad, tokens)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Pad some examples to the longest of them, on the right.

        Args:
            indices: Which examples.

        Returns:
            The model's inputs (each examples × tokens) with `attention_mask`; of each row `targets` and `row`, its
            number; and, where the rows are not one an example, `example` and `token`, where it is in the batch.
        """
        import torch

        lengths = [len(self.columns["input_ids"][i]) for i in indices]
        shape = (len(indices), max(lengths))
        mask = torch.arange(shape[1])[None, :] < torch.tensor(lengths)[:, None]
        batch = {"attention_mask": mask.long()}
        for name, column in self.columns.items():
            padded = torch.full(shape, self.pad[name], dtype=torch.long)
            padded[mask] = torch.tensor([token for i in indices for token in column[i]])
            batch[name] = padded
        rows = self.rows(indices)
        batch["targets"], batch["row"] = torch.as_tensor(self.targets[rows]), torch.as_tensor(rows)
        if self.tokens is not None:
            tokens = [self.tokens[i] for i in indices]
            batch["example"] = torch.tensor([place for place, at in enumerate(tokens) for _ in at], dtype=torch.long)
            batch["token"] = torch.tensor([token for at in tokens for token in at], dtype=torch.long)
        return batch
