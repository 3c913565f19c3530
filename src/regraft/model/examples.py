"""Texts as token ids."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError, KindError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    from regraft.base import Base
    from regraft.task import Split
    from regraft.upgrade import Upgrade


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised texts with their labels.

    Args:
        columns: For each of the model's inputs (`input_ids`, `token_type_ids`), a list of ids an example.
        labels: The class of each example.
        pad: The id that fills up a batch, for each column.
    """

    columns: dict[str, list[list[int]]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    pad: dict[str, int]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number of tokens of each example."""
        import numpy as np

        return np.array([len(ids) for ids in self.columns["input_ids"]], dtype=np.int64)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Pad some examples to the longest of them, on the right.

        Args:
            indices: Which examples.

        Returns:
            The model's inputs (each examples × tokens), `attention_mask`, `labels` and `index`.
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
        batch["labels"] = torch.as_tensor(self.labels[list(indices)])
        batch["index"] = torch.tensor(list(indices))
        return batch


def encode(base: Base, split: Split, max_length: int) -> Examples:
    """Tokenise a split with a base's tokenizer.

    Args:
        base: Whose tokenizer.
        split: Texts, single or in pairs.
        max_length: Longer inputs are cut to so many tokens, or to what the base takes.

    Returns:
        The examples, in the order of the split.

    Raises:
        DataError: The tokenizer makes no token of a text.
    """
    tokenizer = base.tokenizer
    first = [texts[0] for texts in split.texts]
    second = [texts[1] for texts in split.texts] if len(split.texts[0]) == 2 else None
    encoded = tokenizer(
        first, second, truncation=True, max_length=min(max_length, base.longest), return_attention_mask=False
    )
    for row, ids in zip(split.rows.tolist(), encoded["input_ids"], strict=True):
        if not ids:
            raise DataError(
                f"{split.source}, row {row}: the tokenizer of {base.path} makes no token of the text, so there is "
                "nothing for a model to read. Remove the row."
            )
    base.check_tokens(tokenizer, {token for ids in encoded["input_ids"] for token in ids})
    pad = {name: 0 for name in encoded}
    pad["input_ids"] = base.pad_id
    return Examples({name: list(encoded[name]) for name in encoded}, split.labels, pad)


def encode_alike(upgrade: Upgrade, split: Split, max_length: int) -> tuple[Examples, Examples]:
    """Tokenise texts for two models of which each token of the one is held against one of the other.

    Args:
        upgrade: The two bases, each with a tokenizer of its own.
        split: Texts, single or in pairs.
        max_length: As in `encode`.

    Returns:
        The examples for the old and the new base: the texts that both tokenizers divide into the same tokens.

    Raises:
        KindError: Those are fewer than half.
    """
    sides = [encode(base, split, max_length) for base in (upgrade.old, upgrade.new)]
    tokens = [
        [base.tokenizer.convert_ids_to_tokens(ids) for ids in side.columns["input_ids"]]
        for base, side in zip((upgrade.old, upgrade.new), sides, strict=True)
    ]
    alike = [row for row, pair in enumerate(zip(*tokens, strict=True)) if pair[0] == pair[1]]
    if 2 * len(alike) < len(split):
        raise KindError(
            f"the tokenizers of {upgrade.old.path} and {upgrade.new.path} divide only {len(alike)} of {len(split)} "
            "texts into the same tokens, and this holds the two models against each other token by token. Take direct, "
            "init or distill."
        )
    if len(alike) == len(split):
        return sides[0], sides[1]
    old, new = (encode(base, split.take(alike), max_length) for base in (upgrade.old, upgrade.new))
    return old, new
