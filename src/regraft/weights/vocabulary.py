"""Rows of embeddings and language-modelling heads, matched by the token they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.errors import MismatchError
from regraft.weights.delta import graft

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import torch


_BY_TOKEN = re.compile(
    r"(?:^|\.)(?:word_embeddings|embed_tokens|tok_embeddings|embed_in|wte|shared|lm_head|embed_out|decoder)"
    r"\.(?:weight|bias)$|^(?:(?:backbone|model)\.)?embeddings\.weight$"
    r"|predictions\.bias$|lm_head\.bias$|vocab_projector\.(?:weight|bias)$"
)


def has_vocabulary_rows(name: str) -> bool:
    """Return whether a tensor's first dimension is the vocabulary.

    Args:
        name: Its name.

    Returns:
        True for token embeddings and for the output layer of a language-modelling head.
    """
    return bool(_BY_TOKEN.search(name))


@dataclass(frozen=True)
class RowMatch:
    """Which rows of three vocabularies stand for the token of each row of a grafted tensor.

    The grafted rows are those of the new base, and then those of tokens that the fine-tune alone has: in rows that the
    new base has for no token, or appended.

    Args:
        new_row: For each grafted row the new base's, −1 where it has none.
        tuned_row: The fine-tune's.
        old_row: The old base's.
        new_rows: How many rows the new base's tensors have.
        tuned_rows: The fine-tune's.
        old_rows: The old base's.
        only_old: Tokens that the new base no longer has.
        only_new: Tokens that it has and the old one had not.
        own: The grafted row of each token that the fine-tune alone has.
        padding: Grafted rows that stand for no token; they match others of that kind in order.
        both: Tokens that both bases have.
    """

    new_row_indices: tuple[int, ...]
    tuned_row_indices: tuple[int, ...]
    old_row_indices: tuple[int, ...]
    num_new_rows: int
    num_tuned_rows: int
    num_old_rows: int
    removed_tokens: tuple[str, ...]
    added_tokens: tuple[str, ...]
    tuned_only: Mapping[str, int]
    num_padding_rows: int
    both: int

    @property
    def is_identity(self) -> bool:
        """Whether every row stands for what it stood for."""
        sides = (
            (self.new_row_indices, self.num_new_rows),
            (self.tuned_row_indices, self.num_tuned_rows),
            (self.old_row_indices, self.num_old_rows),
        )
        return all(rows == tuple(range(count)) for rows, count in sides)

    def shape(self, tuned: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a grafted tensor.

        Args:
            tuned: The shape of the fine-tune's: the vocabulary comes first, or second after a 1.

        Returns:
            The same with a row for each grafted one.
        """
        count = len(self.new_row_indices)
        return (1, count) if self.is_row(tuned) else (count, *tuned[1:])

    def is_row(self, tuned: tuple[int, ...]) -> bool:
        """Return whether a tensor holds a number for each token in a single row, as BART's `final_logits_bias`.

        Args:
            tuned: The shape of the fine-tune's.

        Returns:
            False for a row for each token.
        """
        return len(tuned) == 2 and tuned[0] == 1 != self.num_tuned_rows

    def summary(self) -> str:
        """Say it in a line.

        Returns:
            How many rows are kept, new, lost, the fine-tune's own and padding.
        """
        own = f", {len(self.tuned_only):,} of the fine-tune alone{_some(self.tuned_only)}" if self.tuned_only else ""
        return (
            f"{len(self.new_row_indices):,} rows: {self.both:,} tokens in both, {len(self.added_tokens):,} only in the new "
            f"vocabulary, {len(self.removed_tokens):,} only in the old{_some(self.removed_tokens)}{own}, {self.num_padding_rows:,} rows of "
            "padding"
        )


def _some(tokens: Collection[str]) -> str:
    first = sorted(tokens)[:4]
    return f" ({', '.join(map(repr, first))}{' …' * (len(tokens) > len(first))})" if tokens else ""


def match_rows(
    old_vocabulary: Mapping[str, int],
    new_vocabulary: Mapping[str, int],
    old_rows: int,
    new_rows: int,
    tuned_vocabulary: Mapping[str, int] | None = None,
    tuned_rows: int | None = None,
) -> RowMatch:
    """Match the rows of the vocabularies of two bases and a fine-tune by token.

    Rows that no token has, as those that round the size up to a multiple of 64, match their like in order.

    Args:
        old_vocabulary: The old tokenizer's ids by token.
        new_vocabulary: The new tokenizer's.
        old_rows: Rows of the old embeddings, at least its ids.
        new_rows: Rows of the new embeddings.
        tuned_vocabulary: The fine-tune's; None for the old base's.
        tuned_rows: Rows of its embeddings; None for as many as the old base's.

    Returns:
        The match.

    Raises:
        MismatchError: A token's id is beyond the rows.
    """
    tuned_vocabulary = old_vocabulary if tuned_vocabulary is None else tuned_vocabulary
    tuned_rows = old_rows if tuned_rows is None else tuned_rows
    sides = {
        "old": (old_vocabulary, old_rows), "new": (new_vocabulary, new_rows), "tuned": (tuned_vocabulary, tuned_rows),
    }  # fmt: skip
    for which, (vocabulary, rows) in sides.items():
        beyond = next(((token, i) for token, i in vocabulary.items() if not 0 <= i < rows), None)
        if beyond:
            raise MismatchError(
                f"the {which} vocabulary has token {beyond[0]!r} with id {beyond[1]}, and its embeddings have {rows:,} "
                "rows. Give the tokenizer that belongs to the weights."
            )
    added = tuned_vocabulary.keys() - old_vocabulary.keys() - new_vocabulary.keys()
    first = max(new_vocabulary.values(), default=-1) + 1  # where a tokenizer puts what is added to it
    own = {token: first + i for i, token in enumerate(sorted(added, key=tuned_vocabulary.__getitem__))}
    vocabulary = {**new_vocabulary, **own}
    count = max(new_rows, first + len(own))
    matched = {which: [-1] * count for which in sides}
    for token, row in vocabulary.items():
        for which, (ids, _) in sides.items():
            matched[which][row] = max(matched[which][row], ids.get(token, -1))
    empty = sorted(set(range(new_rows)) - set(vocabulary.values()))
    for row in empty:
        matched["new"][row] = row
    for which in ("old", "tuned"):
        ids, rows = sides[which]
        for row, other in zip(empty, sorted(set(range(rows)) - set(ids.values())), strict=False):
            matched[which][row] = other
    return RowMatch(
        new_row_indices=tuple(matched["new"]),
        tuned_row_indices=tuple(matched["tuned"]),
        old_row_indices=tuple(matched["old"]),
        num_new_rows=new_rows,
        num_tuned_rows=tuned_rows,
        num_old_rows=old_rows,
        removed_tokens=tuple(sorted(old_vocabulary.keys() - new_vocabulary.keys())),
        added_tokens=tuple(sorted(new_vocabulary.keys() - old_vocabulary.keys())),
        tuned_only=own,
        num_padding_rows=len(empty),
        both=len(old_vocabulary.keys() & new_vocabulary.keys()),
    )


def graft_rows(
    new: torch.Tensor,
    tuned: torch.Tensor,
    old: torch.Tensor,
    match: RowMatch,
    rule: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = graft,
) -> torch.Tensor:
    """Graft a tensor with a row for each token: a rule's new + (tuned − old) where all three have the token.

    Args:
        new: The upgraded base's tensor, [new rows, …] or, of biases that are laid out so, [1, new rows].
        tuned: The tuned tensor, [tuned rows, …].
        old: The old base's, [old rows, …].
        match: From `match_rows`.
        rule: Makes rows from those of the new base, the tuned and the old ones.

    Returns:
        [grafted rows, …], or [1, grafted rows], in the dtype of `tuned`. The row of a token that the fine-tune alone
        has is the fine-tune's; one that the new base has and the old one had not is the new base's, though the
        fine-tune had added it too: what tuning changed in it cannot be known.

    Raises:
        MismatchError: The tensors have not the rows of the match.
    """
    import torch

    if match.is_row(tuple(tuned.shape)):
        return graft_rows(new.T, tuned.T, old.T, match, rule).T.contiguous()
    for side, tensor, rows in (
        ("new", new, match.num_new_rows), ("tuned", tuned, match.num_tuned_rows), ("old", old, match.num_old_rows),
    ):  # fmt: skip
        if tensor.shape[0] != rows:
            raise MismatchError(
                f"the {side} tensor has {tensor.shape[0]:,} rows, its vocabulary {rows:,}: they do not belong together."
            )
    of_new, of_tuned, of_old = (
        torch.tensor(rows) for rows in (match.new_row_indices, match.tuned_row_indices, match.old_row_indices)
    )
    grafted = torch.zeros((len(of_new), *tuned.shape[1:]), dtype=tuned.dtype)
    everywhere = (of_new >= 0) & (of_tuned >= 0) & (of_old >= 0)
    own = (of_new < 0) & (of_tuned >= 0)
    rest = (of_new >= 0) & ~everywhere
    grafted[rest] = new[of_new[rest]].to(grafted.dtype)
    grafted[own] = tuned[of_tuned[own]]
    if everywhere.any():
        changed = rule(new[of_new[everywhere]], tuned[of_tuned[everywhere]], old[of_old[everywhere]])
        grafted[everywhere] = changed.to(grafted.dtype)
    return grafted
