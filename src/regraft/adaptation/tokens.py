"""Matching the tokens of an adaptation with the tokens of both bases."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING

from regraft.adaptation.lora import TOKEN_ROWS_SUFFIX
from regraft.adaptation.replaced import token_rows, tuned_token_rows
from regraft.errors import MAX_LISTED, CheckpointError, MismatchError
from regraft.upgrade import Upgrade
from regraft.vocabulary import ids_by_token, merged_tokenizer
from regraft.weights import match_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.weights import RowMatch

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)  # recycling an adaptation needs the match several times
def match_token_rows(adaptation: Adaptation, upgrade: Upgrade) -> RowMatch | None:
    """Match the rows of an adaptation's embeddings with those of both bases, by token.

    Args:
        adaptation: An adaptation of `upgrade.old`.
        upgrade: The two bases.

    Returns:
        The match; None if all three have the same tokens in the same rows.

    Raises:
        CheckpointError: The number of rows differs from the old base's, and there is no tokenizer to match them by.
        MismatchError: A tokenizer has more tokens than there are rows.
    """
    old, new = upgrade.old, upgrade.new
    if adaptation.tokenizer is None:
        _check_rows_without_tokenizer(adaptation, old)
        return upgrade.row_match
    vocabulary, num_rows = _stored_tokens(adaptation, old, adaptation.tokenizer)
    if vocabulary == old.vocabulary and num_rows == old.embedding_rows:
        return upgrade.row_match
    try:
        match = match_rows(old.vocabulary, new.vocabulary, old.embedding_rows, new.embedding_rows, vocabulary, num_rows)
    except MismatchError as error:
        raise MismatchError(f"{adaptation.path}: {error}") from error
    return None if match.is_identity else match


def _check_rows_without_tokenizer(adaptation: Adaptation, old: Base) -> None:
    """Check that an adaptation without a tokenizer has the rows of its base, so that they need not be matched."""
    num_rows = adaptation.family.num_embedding_rows(adaptation, old)
    if num_rows in (None, old.embedding_rows):
        num_rows = 1 + max(tuned_token_rows(adaptation), default=-1)
        if num_rows <= old.embedding_rows:
            return
    raise CheckpointError(
        f"{adaptation.path}: its embeddings have {num_rows:,} rows, those of {old.path} have {old.embedding_rows:,}, "
        "and its folder has no tokenizer to match them by. Copy the one that it was tuned with into it."
    )


def _stored_tokens(adaptation: Adaptation, old: Base, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], int]:
    """Return the tokens for which an adaptation or its base stores rows, with their ids, and the number of rows."""
    num_rows = adaptation.family.num_embedding_rows(adaptation, old)
    if num_rows is not None:
        return ids_by_token(tokenizer, num_rows), num_rows
    module = f"{old.prefix}.{old.architecture.embeddings}".removesuffix(".weight")
    is_tuned = any(TOKEN_ROWS_SUFFIX in name for name in adaptation.checkpoint.tensors)
    tuned = set(token_rows(adaptation, module) if is_tuned else ())
    added = {token: row for token, row in tokenizer.get_vocab().items() if row in tuned and token not in old.vocabulary}
    return {**old.vocabulary, **added}, max([old.embedding_rows, *(row + 1 for row in added.values())])


def with_adaptation_tokens(adaptation: Adaptation, upgrade: Upgrade) -> Upgrade:
    """Return an upgrade whose bases read texts as the adaptation does, with the tokens that only it has.

    Args:
        adaptation: An adaptation of `upgrade.old`.
        upgrade: The two bases.

    Returns:
        The upgrade; unchanged if the adaptation has no tokenizer or the old base's tokens, or stores no rows for its
        additional tokens.

    Raises:
        CheckpointError: The adaptation has rows that the old base lacks, and no tokenizer.
    """
    tokenizer = adaptation.tokenizer
    if tokenizer is None:
        _check_rows_without_tokenizer(adaptation, upgrade.old)
        return upgrade
    vocabulary, num_rows = _stored_tokens(adaptation, upgrade.old, tokenizer)
    if rowless := sorted(tokenizer.get_vocab().keys() - vocabulary.keys()):
        logger.warning(
            "%s: its tokenizer has tokens that %s lacks (%s), and it stores no rows for them.",
            adaptation.path,
            upgrade.old.path,
            ", ".join(rowless[:MAX_LISTED]),
        )
    if vocabulary == upgrade.old.vocabulary and num_rows == upgrade.old.embedding_rows:
        return upgrade
    row_match = match_token_rows(adaptation, upgrade)
    if row_match is None:
        return upgrade
    old = dataclasses.replace(upgrade.old, tokenizer_override=tokenizer, rows_override=num_rows)
    merged = merged_tokenizer(upgrade.new.path, adaptation.path, row_match)
    return Upgrade(
        old, dataclasses.replace(upgrade.new, tokenizer_override=merged, rows_override=len(row_match.new_row_indices))
    )
