"""The vocabularies of two checkpoint folders, held against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.checkpoint import shape_of
from regraft.errors import CheckpointError
from regraft.transformers_folder import read_tokenizer
from regraft.weights import Named, RowMatch, has_row_for_each_token, match_rows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from regraft.checkpoint import Checkpoint

FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "added_tokens.json")


def match_vocabularies(
    old: Checkpoint,
    new: Checkpoint,
    old_tensors: Mapping[str, torch.Tensor] | None = None,
    new_tensors: Mapping[str, torch.Tensor] | None = None,
) -> RowMatch | None:
    """Match the rows of two checkpoints' embeddings by the tokens of their tokenizers.

    Args:
        old: The old base.
        new: The upgraded base.
        old_tensors: Its tensors as its class names them, if it has one.
        new_tensors: Those of the new base.

    Returns:
        The match; None where the vocabularies are the same, or a checkpoint has no tokenizer and equally many rows.

    Raises:
        CheckpointError: The embeddings differ in size and there is no tokenizer to match them by.
        MismatchError: A tokenizer has more tokens than its embeddings have rows.
    """
    rows = [_rows(tensors) for tensors in (old_tensors or old, new_tensors or new)]
    texts = [_files(side.path) for side in (old, new)]
    if not all(texts):
        if rows[0] != rows[1]:
            bare = old if not texts[0] else new
            raise CheckpointError(
                f"{old.path} and {new.path} have {rows[0]:,} and {rows[1]:,} embeddings, and {bare.path} holds no "
                "tokenizer to match them by. Copy the base's tokenizer files into it."
            )
        return None
    if texts[0] == texts[1] and rows[0] == rows[1]:
        return None
    match = match_rows(_vocabulary(old.path), _vocabulary(new.path), *rows)
    return None if match.is_same else match


def _rows(tensors: Mapping[str, torch.Tensor]) -> int:
    by_token = tensors.by_token if isinstance(tensors, Named) else filter(has_row_for_each_token, tensors)
    return max((shape_of(tensors, name)[0] for name in by_token), default=0)


def _files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def _vocabulary(folder: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = read_tokenizer(folder).get_vocab()
    return vocabulary
