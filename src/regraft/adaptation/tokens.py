"""The tokens of an adaptation against those of the bases: rows matched, and both bases with the tokens it alone has."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from regraft.adaptation.fit import config_of
from regraft.adaptation.head import model_name
from regraft.architecture import named
from regraft.checkpoint import shape_of
from regraft.errors import CheckpointError, MismatchError
from regraft.transformers_folder import read_tokenizer
from regraft.upgrade import Upgrade
from regraft.vocabulary import has_tokenizer, merged_tokenizer
from regraft.weights import match_rows

if TYPE_CHECKING:
    from regraft.adaptation.adaptation import Adaptation
    from regraft.upgrade import Base
    from regraft.weights import RowMatch

logger = logging.getLogger(__name__)


def tuned_rows(adaptation: Adaptation, upgrade: Upgrade) -> RowMatch | None:
    """Match the rows of an adaptation's embeddings with those of both bases, by token.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.

    Returns:
        The match; None where all three have the same tokens in the same rows.

    Raises:
        CheckpointError: It has other rows than the old base and no tokenizer to match them by.
        MismatchError: A tokenizer has more tokens than there are rows.
    """
    count = stored_rows(adaptation, upgrade.old)
    if count is None:
        return upgrade.rows
    if not has_tokenizer(adaptation.path):
        if count != upgrade.old.embedding_rows:
            raise CheckpointError(
                f"{adaptation.path}: its embeddings have {count:,} rows, those of {upgrade.old.path} "
                f"{upgrade.old.embedding_rows:,}, and it holds no tokenizer to match them by. Copy the one it was "
                "tuned with into it."
            )
        return upgrade.rows
    vocabulary = read_tokenizer(adaptation.path).get_vocab()
    if vocabulary == upgrade.old.vocabulary and count == upgrade.old.embedding_rows:
        return upgrade.rows
    sides = upgrade.old.vocabulary, upgrade.new.vocabulary, upgrade.old.embedding_rows, upgrade.new.embedding_rows
    try:
        match = match_rows(*sides, vocabulary, count)
    except MismatchError as error:
        raise MismatchError(f"{adaptation.path}: {error}") from error
    return None if match.is_same else match


def stored_rows(adaptation: Adaptation, old: Base) -> int | None:
    """Count the rows of the embeddings that an adaptation stores.

    Args:
        adaptation: The tuned weights.
        old: A base of its architecture.

    Returns:
        Their number; None for an adapter that stores none.
    """
    if adaptation.kind == "full":
        tensors = named(adaptation.checkpoint, config_of(adaptation))
        return shape_of(tensors, str(tensors.embeddings))[0] if tensors.embeddings in tensors else None
    ends = (f"{old.prefix}.{old.architecture.embeddings}", str(old.architecture.embeddings))
    for name, info in adaptation.checkpoint.tensors.items():
        plain = model_name(name).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if plain in ends and info.shape:
            return info.shape[0]
        if name.endswith(".lora_embedding_A") and f"{plain.removesuffix('.lora_embedding_A')}.weight" in ends:
            return info.shape[-1]
    return None


def with_own_tokens(adaptation: Adaptation, upgrade: Upgrade) -> Upgrade:
    """Have both bases read texts as the adaptation does: with the tokens that it alone has.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.

    Returns:
        The upgrade; the same where the adaptation has the old base's tokens, or stores no rows for its own.
    """
    if not has_tokenizer(adaptation.path):
        return upgrade
    tokenizer = read_tokenizer(adaptation.path)
    vocabulary = tokenizer.get_vocab()
    count = stored_rows(adaptation, upgrade.old)
    if vocabulary == upgrade.old.vocabulary and count in (None, upgrade.old.embedding_rows):
        return upgrade
    rows = tuned_rows(adaptation, upgrade) if count is not None else None
    if count is None or rows is None:
        own = sorted(vocabulary.keys() - upgrade.old.vocabulary.keys())
        logger.warning(
            "%s: its tokenizer has tokens that %s has not (%s), and it stores no rows for them: it is read without.",
            adaptation.path, upgrade.old.path, ", ".join(own[:4]),
        )  # fmt: skip
        return upgrade
    old = dataclasses.replace(upgrade.old, own_tokenizer=tokenizer, own_rows=count)
    merged = merged_tokenizer(upgrade.new.path, adaptation.path, rows)
    return Upgrade(old, dataclasses.replace(upgrade.new, own_tokenizer=merged, own_rows=len(rows.new_row)))
