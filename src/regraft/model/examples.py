"""Tokenising a task's examples for a base."""

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
        base: The base.
        data: The task; inputs are truncated to its `max_length`, or to the longest input that the base takes.
        split: The examples.

    Returns:
        The tokenised examples, in the order of the split.

    Raises:
        DataError: The tokenizer returns no token for an input.
    """
    tokenizer = base.tokenizer
    examples = data.task.encode(split, tokenizer, base.pad_id, min(data.max_length, base.max_input_length))
    input_ids = examples.columns["input_ids"]
    for row, ids in zip(split.row_numbers.tolist(), input_ids, strict=True):
        if not ids:
            raise DataError(
                f"{split.source}, row {row}: the tokenizer of {base.path} makes no token of the text, so a model "
                "has nothing to read. Remove the row."
            )
    base.check_tokens(tokenizer, {token for ids in input_ids for token in ids})
    return examples


def encode_aligned(upgrade: Upgrade, data: TaskData, split: Split) -> tuple[Examples, Examples]:
    """Tokenise a split for both bases of an upgrade, keeping the examples whose tokens are the same in both.

    Args:
        upgrade: The two bases, each with its own tokenizer.
        data: The task.
        split: The examples.

    Returns:
        The tokenised examples for the old and for the new base.

    Raises:
        KindError: Fewer than half of the examples have the same tokens.
    """
    bases = (upgrade.old, upgrade.new)
    encoded = [encode(base, data, split) for base in bases]
    old_tokens, new_tokens = (
        [base.tokenizer.convert_ids_to_tokens(ids) for ids in examples.columns["input_ids"]]
        for base, examples in zip(bases, encoded, strict=True)
    )
    aligned = [i for i, (old, new) in enumerate(zip(old_tokens, new_tokens, strict=True)) if old == new]
    if 2 * len(aligned) < len(split):
        raise KindError(
            f"the tokenizers of {upgrade.old.path} and {upgrade.new.path} divide only {len(aligned)} of {len(split)} "
            "examples into the same tokens, but this method compares the two models token by token. Use direct, init "
            "or distill."
        )
    old_examples, new_examples = (examples.take(aligned) for examples in encoded)
    return old_examples, new_examples
