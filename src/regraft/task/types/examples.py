"""Tokenised examples, and the rows at which a model makes predictions for them."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    from regraft.task.split import Integers

ROW_TENSORS = ("targets", "row", "example", "token")
"""The tensors of a batch that describe its rows; all other tensors are inputs of the model."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised examples, ready to be batched.

    A model makes predictions at certain tokens of an example. Each such token is a *row* and has a target. Rows are
    numbered from 0 over all examples.

    Args:
        columns: For each input of the model (`input_ids`, `token_type_ids`), one list of ids per example.
        targets: The target of each row.
        pad: The id that batches are padded with, for each column.
        tokens: The token indices of each example's rows; None if each example has a single row, at the token that the
            model's head reads.
        words: The index of the word that each row stands for, by example; None if rows do not stand for words.
        are_targets_tokens: Whether targets are token ids, which differ between vocabularies.
    """

    columns: dict[str, list[list[int]]]
    targets: np.ndarray[Any, Any]
    pad: dict[str, int]
    tokens: list[list[int]] | None = None
    words: list[list[int]] | None = None
    are_targets_tokens: bool = False

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @property
    def lengths(self) -> Integers:
        """The number of tokens of each example."""
        import numpy as np

        return np.array([len(ids) for ids in self.columns["input_ids"]], dtype=np.int64)

    @functools.cached_property
    def _row_ends(self) -> Integers:
        """The index after each example's last row; cached because every batch needs it."""
        import numpy as np

        return np.cumsum([len(tokens) for tokens in self.tokens or ()])

    def rows(self, indices: Sequence[int]) -> Integers:
        """Return the indices of all rows of some examples.

        Args:
            indices: The indices of the examples.

        Returns:
            The row indices, in the order of `indices`.
        """
        import numpy as np

        if self.tokens is None:
            return np.array(list(indices), dtype=np.int64)
        ends = self._row_ends
        ranges = [np.arange(ends[i] - len(self.tokens[i]), ends[i]) for i in indices]
        return np.concatenate([np.empty(0), *ranges]).astype(np.int64)

    def take(self, indices: Sequence[int]) -> Examples:
        """Select examples.

        Args:
            indices: The indices of the examples, in the order of the result.

        Returns:
            The examples, with their rows renumbered.
        """
        columns = {name: [column[i] for i in indices] for name, column in self.columns.items()}
        tokens = None if self.tokens is None else [self.tokens[i] for i in indices]
        words = None if self.words is None else [self.words[i] for i in indices]
        targets = self.targets[self.rows(indices)]
        return dataclasses.replace(self, columns=columns, targets=targets, tokens=tokens, words=words)

    def with_ids(self, new_ids: Integers) -> Examples:
        """Replace the ids of tokens by those of another vocabulary.

        Args:
            new_ids: The new id of each token.
        """
        columns = {**self.columns, "input_ids": [new_ids[ids].tolist() for ids in self.columns["input_ids"]]}
        targets = new_ids[self.targets] if self.are_targets_tokens else self.targets
        return dataclasses.replace(self, columns=columns, targets=targets)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Collate examples, padded on the right to the longest of them.

        Args:
            indices: The indices of the examples.

        Returns:
            The model's inputs, each examples × tokens, with `attention_mask`. For each row, the target (`targets`) and
            the row index (`row`). If `tokens` is not None, also the indices of each row's example and token in the
            batch (`example`, `token`).
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
        batch["targets"] = torch.as_tensor(self.targets[rows])
        batch["row"] = torch.as_tensor(rows)
        if self.tokens is not None:
            positions = [(example, token) for example, i in enumerate(indices) for token in self.tokens[i]]
            batch["example"] = torch.tensor([example for example, _ in positions], dtype=torch.long)
            batch["token"] = torch.tensor([token for _, token in positions], dtype=torch.long)
        return batch
