"""A task's examples as token ids of a base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import DataError, KindError

if TYPE_CHECKING:
    from regraft.base import Base
    from regraft.task import Split, TaskData
    from regraft.task.types import Examples
    from regraft.upgrade import Upgrade


def encode(base: Base, data: TaskData, split: Split) -> Examples:
    """Tokenise a split with a base's tokenizer.

    Args:
        base: Whose tokenizer.
        data: The task; inputs are cut to its `max_length`, or to what the base takes.
        split: Some of its examples.

    Returns:
        The examples, in the order of the split.

    Raises:
        DataError: The tokenizer makes no token of an input.
    """
    tokenizer = base.tokenizer
    examples = data.task.encode(split, tokenizer, base.pad_id, min(data.max_length, base.longest))
    encoded = examples.columns["input_ids"]
    for row, ids in zip(split.rows.tolist(), encoded, strict=True):
        if not ids:
            raise DataError(
                f"{split.source}, row {row}: the tokenizer of {base.path} makes no token of the text, so there is "
                "nothing for a model to read. Remove the row."
            )
    base.check_tokens(tokenizer, {token for ids in encoded for token in ids})
    return examples


def encode_aligned(upgrade: Upgrade, data: TaskData, split: Split) -> tuple[Examples, Examples]:
    """Tokenise a split for two models of which each token of the one is compared with one of the other.

    Args:
        upgrade: The two bases, each with a tokenizer of its own.
        data: The task.
        split: Some of its examples.

    Returns:
        The examples for the old and the new base that both tokenizers divide into the same tokens.

    Raises:
        KindError: Those are fewer than half.
    """
    sides = [encode(base, data, split) for base in (upgrade.old, upgrade.new)]
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
    old, new = (side.take(alike) for side in sides)
    return old, new
