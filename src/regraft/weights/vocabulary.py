"""Rows of embeddings and language-modelling heads, matched by the token they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.errors import MismatchError
from regraft.weights.delta import graft

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


_BY_TOKEN = re.compile(
    r"(?:^|\.)(?:word_embeddings|embed_tokens|tok_embeddings|wte|shared|lm_head|embed_out|decoder)\.(?:weight|bias)$"
    r"|predictions\.bias$|lm_head\.bias$|vocab_projector\.(?:weight|bias)$"
)


def has_row_for_each_token(name: str) -> bool:
    """Tell whether a tensor's first dimension is the vocabulary.

    Args:
        name: Its name.

    Returns:
        True for token embeddings and for the output layer of a language-modelling head.
    """
    return bool(_BY_TOKEN.search(name))


@dataclass(frozen=True)
class RowMatch:
    """Which row of the old vocabulary stands for the token of each row of the new one.

    Args:
        old_row: For each new row its old row, −1 where there is none.
        old_rows: How many rows the old tensors have.
        only_old: Tokens that the new vocabulary no longer has.
        only_new: Tokens that it has and the old one had not.
        padding: New rows that stand for no token; they match old ones of that kind in order.
        both: Tokens that both have.
    """

    old_row: tuple[int, ...]
    old_rows: int
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    padding: int
    both: int

    @property
    def is_same(self) -> bool:
        """Whether every row stands for what it stood for."""
        return self.old_row == tuple(range(self.old_rows))

    def summary(self) -> str:
        """Say it in a line.

        Returns:
            How many rows are kept, new, lost and padding.
        """
        lost = f" ({', '.join(map(repr, self.only_old[:4]))}{' …' * (len(self.only_old) > 4)})" if self.only_old else ""
        return (
            f"{len(self.old_row):,} rows: {self.both:,} tokens in both, {len(self.only_new):,} only in the new "
            f"vocabulary, {len(self.only_old):,} only in the old{lost}, {self.padding:,} rows of padding"
        )


def match_rows(
    old_vocabulary: Mapping[str, int], new_vocabulary: Mapping[str, int], old_rows: int, new_rows: int
) -> RowMatch:
    """Match the rows of two vocabularies by token.

    Rows that no token has, as those that round the size up to a multiple of 64, match their like in order.

    Args:
        old_vocabulary: The old tokenizer's ids by token.
        new_vocabulary: The new tokenizer's.
        old_rows: Rows of the old embeddings, at least its ids.
        new_rows: Rows of the new embeddings.

    Returns:
        The match.

    Raises:
        MismatchError: A token's id is beyond the rows.
    """
    for which, vocabulary, rows in (("old", old_vocabulary, old_rows), ("new", new_vocabulary, new_rows)):
        beyond = next(((token, i) for token, i in vocabulary.items() if not 0 <= i < rows), None)
        if beyond:
            raise MismatchError(
                f"the {which} vocabulary has token {beyond[0]!r} with id {beyond[1]}, and its embeddings have {rows:,} "
                "rows. Give the tokenizer that belongs to the weights."
            )
    found = [-1] * new_rows
    for token, row in new_vocabulary.items():
        found[row] = max(found[row], old_vocabulary.get(token, -1))
    empty_old = sorted(set(range(old_rows)) - set(old_vocabulary.values()))
    empty_new = sorted(set(range(new_rows)) - set(new_vocabulary.values()))
    for new, old in zip(empty_new, empty_old, strict=False):
        found[new] = old
    return RowMatch(
        old_row=tuple(found),
        old_rows=old_rows,
        only_old=tuple(sorted(old_vocabulary.keys() - new_vocabulary.keys())),
        only_new=tuple(sorted(new_vocabulary.keys() - old_vocabulary.keys())),
        padding=len(empty_new),
        both=len(old_vocabulary.keys() & new_vocabulary.keys()),
    )


def graft_rows(
    new: torch.Tensor, tuned: torch.Tensor, old: torch.Tensor, match: RowMatch, scale: float = 1.0
) -> torch.Tensor:
    """Graft a tensor with a row for each token: new + scale · (tuned − old) where the token is in both.

    Args:
        new: The upgraded base's tensor, [new rows, …].
        tuned: The tuned tensor, [old rows, …].
        old: The old base's, [old rows, …].
        match: From `match_rows`.
        scale: The factor λ on the delta.

    Returns:
        [new rows, …] in the dtype of `tuned`: a row whose token only the new vocabulary has is that of `new`.

    Raises:
        MismatchError: The tensors have not the rows of the match.
    """
    import torch

    if len(new) != len(match.old_row) or not len(tuned) == len(old) == match.old_rows:
        raise MismatchError(
            f"the vocabularies have {match.old_rows:,} and {len(match.old_row):,} rows, the tensors {len(old):,} "
            f"(old), {len(tuned):,} (tuned) and {len(new):,} (new)."
        )
    if match.is_same:
        return graft(new, tuned, old, scale)
    rows = torch.tensor(match.old_row)
    known = rows >= 0
    result = new.to(tuned.dtype, copy=True)
    result[known] = graft(new[known], tuned[rows[known]], old[rows[known]], scale)
    return result
