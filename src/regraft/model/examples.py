"""Tokenisation of a task's examples for one base, or for both bases of an upgrade."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError, KindError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.base import Base
    from regraft.task import Split, TaskData
    from regraft.task.types import Examples
    from regraft.upgrade import Upgrade

MIN_ALIGNED_SHARE = 0.5
"""The lowest share of examples with the same tokens for both bases at which a comparison token by token is made,
arbitrary: below a half, it would leave most of the data out."""


def encode(base: Base, data: TaskData, split: Split) -> Examples:
    """Tokenise a split with a base's tokenizer.

    Args:
        base: The base, for its tokenizer and its maximum input length.
        data: The task's data. Inputs are truncated to its `max_length`, or to the base's maximum if that is lower.
        split: The split of the data to tokenise.

    Returns:
        The tokenised examples, in the order of the split.

    Raises:
        CheckpointError: The base has no valid tokenizer, a token has no embedding in the base, or the base's maximum
            input length leaves no room for text.
        DataError: The tokenizer returns no token for an input; the message names the row.
    """
    tokenizer = base.text_tokenizer or base.tokenizer
    examples = data.task.encode(split, tokenizer, base.pad_id, min(data.max_length, base.max_input_length))
    input_ids = examples.columns["input_ids"]
    for row_number, ids in zip(split.row_numbers.tolist(), input_ids, strict=True):
        if not ids:
            raise DataError(
                f"{split.source}, row {row_number}: the tokenizer of {base.path} makes no token of the text, so a "
                "model has nothing to read. Remove the row."
            )
    if base.text_tokenizer is not None:
        check_known(base, input_ids, split)
        return examples.with_ids(base.text_ids)
    base.check_tokens(tokenizer, {token for ids in input_ids for token in ids})
    return examples


def check_known(base: Base, sequences: Sequence[Sequence[int]], split: Split) -> None:
    """Refuse a split with a token that the base lacks.

    Args:
        base: The base, with a `text_tokenizer`.
        sequences: The ids of that tokenizer for each example.
        split: The split, for the message.

    Raises:
        MismatchError: An example has a token that the base lacks; the message names the row and the token.
    """
    new_ids = base.text_ids
    for row_number, ids in zip(split.row_numbers.tolist(), sequences, strict=True):
        for token in ids:
            if new_ids[token] < 0:
                text = base.text_tokenizer.convert_ids_to_tokens(token) if base.text_tokenizer else token
                raise MismatchError(
                    f"{split.source}, row {row_number}: the token {text!r} of the old deployment is not in the "
                    f"vocabulary of {base.path}. If the chat template has it, name another under `template`; else add "
                    "the token to the new base."
                )


def with_answer_rows(examples: Examples) -> Examples:
    """Return the examples with a row where the answer begins, at the last token, if they have no rows: without labels.

    Args:
        examples: The tokenised examples.
    """
    import numpy as np

    if examples.tokens is None or any(examples.tokens):
        return examples
    tokens = [[len(ids) - 1] for ids in examples.columns["input_ids"]]
    return dataclasses.replace(examples, tokens=tokens, targets=np.zeros(len(tokens), dtype=examples.targets.dtype))


def check_has_rows(examples: Examples, split: Split, max_length: int) -> None:
    """Refuse a split with targets of which no token is left to predict, so that a loss would be of nothing.

    Args:
        examples: The tokenised examples.
        split: The same examples, for their targets and for the message.
        max_length: The number of tokens that examples were truncated to, for the message.

    Raises:
        DataError: The split has targets, but no row.
    """
    has_targets = any(target is not None for target in split.targets.tolist())
    if has_targets and examples.tokens is not None and not any(examples.tokens):
        raise DataError(
            f"{split.source}: no example of {split.name} has a label within {max_length:,} tokens. Raise max_length, "
            "or shorten the examples."
        )


def check_rows(old_examples: Examples, new_examples: Examples, split: Split) -> None:
    """Refuse a split of which two bases have rows for different words, so that their outputs cannot be compared.

    Args:
        old_examples: The split, tokenised for the old base.
        new_examples: The same split, tokenised for the new base.
        split: The split, for the message.

    Raises:
        KindError: The rows stand for different words.
    """
    if old_examples.words == new_examples.words:
        return
    pairs = zip(old_examples.words or (), new_examples.words or (), strict=True)
    index = next(i for i, (old_words, new_words) in enumerate(pairs) if old_words != new_words)
    raise KindError(
        f"{split.source}, row {split.row_numbers[index]}: the tokenizers of the two bases cut off different words, or "
        "make no token of different words, but this method compares the two models word by word. Raise max_length, "
        "divide long sentences, or use direct or init."
    )


def encode_aligned(upgrade: Upgrade, data: TaskData, split: Split) -> tuple[Examples, Examples]:
    """Tokenise a split for both bases of an upgrade, without the examples whose tokens differ between the bases.

    Args:
        upgrade: The two bases, each with its own tokenizer.
        data: The task's data; inputs are truncated as in `encode`.
        split: The split of the data to tokenise.

    Returns:
        The remaining examples, in the order of the split, tokenised for the old and for the new base. Prompts alone
        have a row where an answer begins.

    Raises:
        CheckpointError: A base has no valid tokenizer, a token has no embedding in its base, or a base's maximum input
            length leaves no room for text.
        DataError: A tokenizer returns no token for an input; the message names the row.
        KindError: The share of remaining examples is below `MIN_ALIGNED_SHARE`.
    """
    old_examples = encode(upgrade.old, data, split)
    new_examples = encode(upgrade.new, data, split)
    token_pairs = zip(_tokens(upgrade.old, old_examples), _tokens(upgrade.new, new_examples), strict=True)
    aligned = [index for index, (old_tokens, new_tokens) in enumerate(token_pairs) if old_tokens == new_tokens]
    if len(aligned) < MIN_ALIGNED_SHARE * len(split):
        raise KindError(
            f"the tokenizers of {upgrade.old.path} and {upgrade.new.path} divide only {len(aligned)} of {len(split)} "
            "examples into the same tokens, but this method compares the two models token by token. Use direct, init "
            "or distill."
        )
    old_aligned, new_aligned = (with_answer_rows(examples.take(aligned)) for examples in (old_examples, new_examples))
    return old_aligned, new_aligned


def _tokens(base: Base, examples: Examples) -> list[Any]:
    """Return each example's tokens as strings, because the ids of a token may differ between bases."""
    return [base.tokenizer.convert_ids_to_tokens(ids) for ids in examples.columns["input_ids"]]
