"""Matches between the rows of different vocabularies' embeddings and language-modelling heads, by token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.errors import MAX_LISTED, MismatchError
from regraft.weights.delta import graft

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import torch


# Names of the tensors with a row per token in models of transformers: embeddings, output layers and their biases.
_TOKEN_ROWS = re.compile(
    r"(?:^|\.)(?:word_embeddings|embed_tokens|tok_embeddings|embed_in|wte|shared|lm_head|embed_out|decoder)"
    r"\.(?:weight|bias)$|^(?:(?:backbone|model)\.)?embeddings\.weight$"
    r"|predictions\.bias$|lm_head\.bias$|vocab_projector\.(?:weight|bias)$"
)


def has_vocabulary_rows(name: str) -> bool:
    """Return whether a tensor has a row per token: embeddings, or the output layer of a language-modelling head.

    Args:
        name: The tensor's stored name, with or without a prefix.
    """
    return bool(_TOKEN_ROWS.search(name))


@dataclass(frozen=True)
class RowMatch:
    """The rows of the new base, the fine-tune and the old base that have the token of each row of a grafted tensor.

    A grafted tensor has the rows of the new base. The tokens that only the fine-tune has take rows of the new base
    without a token, or are appended.

    Args:
        new_row_indices: The new base's row for each grafted row; −1 if it has none.
        tuned_row_indices: The fine-tune's row for each grafted row; −1 if it has none.
        old_row_indices: The old base's row for each grafted row; −1 if it has none.
        num_new_rows: The number of rows of the new base's tensors.
        num_tuned_rows: The number of rows of the fine-tune's tensors.
        num_old_rows: The number of rows of the old base's tensors.
        removed_tokens: The old base's tokens that the new base lacks.
        added_tokens: The new base's tokens that the old base lacks.
        tuned_only: The grafted row of each token that only the fine-tune has.
        num_padding_rows: The number of grafted rows without a token, which are matched by index, or else in order.
        num_common_tokens: The number of tokens that both bases have.
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
    num_common_tokens: int

    @property
    def is_identity(self) -> bool:
        """Whether all three vocabularies have the same tokens in the same rows."""
        matches = (
            (self.new_row_indices, self.num_new_rows),
            (self.tuned_row_indices, self.num_tuned_rows),
            (self.old_row_indices, self.num_old_rows),
        )
        return all(row_indices == tuple(range(num_rows)) for row_indices, num_rows in matches)

    def shape(self, tuned: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a grafted tensor.

        Args:
            tuned: The shape of the fine-tune's tensor: [tokens, …] or [1, tokens].
        """
        num_rows = len(self.new_row_indices)
        return (1, num_rows) if self.is_row(tuned) else (num_rows, *tuned[1:])

    def is_row(self, tuned: tuple[int, ...]) -> bool:
        """Return whether a tensor is a single row with an element per token, such as BART's `final_logits_bias`.

        Args:
            tuned: The shape of the fine-tune's tensor, which has an element or a row per token.
        """
        return len(tuned) == 2 and tuned[0] == 1 != self.num_tuned_rows

    def summary(self) -> str:
        """Return a one-line description with the numbers of rows and tokens."""
        tuned_only = ""
        if self.tuned_only:
            tuned_only = f", {len(self.tuned_only):,} only in the fine-tune{_first_tokens(self.tuned_only)}"
        return (
            f"{len(self.new_row_indices):,} rows: {self.num_common_tokens:,} tokens in both, "
            f"{len(self.added_tokens):,} only in the new vocabulary, {len(self.removed_tokens):,} only in the old"
            f"{_first_tokens(self.removed_tokens)}{tuned_only}, "
            f"{self.num_padding_rows:,} rows of padding"
        )


def _first_tokens(tokens: Collection[str]) -> str:
    if not tokens:
        return ""
    listed = ", ".join(map(repr, sorted(tokens)[:MAX_LISTED]))
    return f" ({listed} …)" if len(tokens) > MAX_LISTED else f" ({listed})"


def match_rows(
    old_vocabulary: Mapping[str, int],
    new_vocabulary: Mapping[str, int],
    num_old_rows: int,
    num_new_rows: int,
    tuned_vocabulary: Mapping[str, int] | None = None,
    num_tuned_rows: int | None = None,
) -> RowMatch:
    """Match the rows of the vocabularies of two bases and a fine-tune by token.

    Rows without a token, such as those that pad the size to a multiple of 64, are matched by their index, and the rest
    in order.

    Args:
        old_vocabulary: The old tokenizer's ids by token.
        new_vocabulary: The new tokenizer's ids by token.
        num_old_rows: The number of rows of the old embeddings.
        num_new_rows: The number of rows of the new embeddings.
        tuned_vocabulary: The fine-tune's ids by token; None if they are the old base's.
        num_tuned_rows: The number of rows of the fine-tune's embeddings; None if it is the old base's.

    Raises:
        MismatchError: A token's id is not the index of a row.
    """
    tuned_vocabulary = old_vocabulary if tuned_vocabulary is None else tuned_vocabulary
    num_tuned_rows = num_old_rows if num_tuned_rows is None else num_tuned_rows
    vocabularies = {"old": old_vocabulary, "new": new_vocabulary, "tuned": tuned_vocabulary}
    num_rows = {"old": num_old_rows, "new": num_new_rows, "tuned": num_tuned_rows}
    for role, vocabulary in vocabularies.items():
        _check_ids(vocabulary, num_rows[role], role)
    added = tuned_vocabulary.keys() - old_vocabulary.keys() - new_vocabulary.keys()
    first_added_row = max(new_vocabulary.values(), default=-1) + 1  # tokenizers append tokens after the highest id
    added_in_order = sorted(added, key=tuned_vocabulary.__getitem__)
    tuned_only = {token: row for row, token in enumerate(added_in_order, start=first_added_row)}
    grafted_vocabulary = {**new_vocabulary, **tuned_only}
    num_grafted_rows = max(num_new_rows, first_added_row + len(tuned_only))
    matched = {role: [-1] * num_grafted_rows for role in vocabularies}
    for token, row in grafted_vocabulary.items():
        for role, vocabulary in vocabularies.items():
            matched[role][row] = max(matched[role][row], vocabulary.get(token, -1))
    padding_rows = sorted(set(range(num_new_rows)) - set(grafted_vocabulary.values()))
    for row in padding_rows:
        matched["new"][row] = row
    for role in ("old", "tuned"):
        unused_rows = set(range(num_rows[role])) - set(vocabularies[role].values())
        for row in unused_rows.intersection(padding_rows):
            matched[role][row] = row
        other_rows = [row for row in padding_rows if row not in unused_rows]
        for row, unused_row in zip(other_rows, sorted(unused_rows.difference(padding_rows)), strict=False):
            matched[role][row] = unused_row
    return RowMatch(
        new_row_indices=tuple(matched["new"]),
        tuned_row_indices=tuple(matched["tuned"]),
        old_row_indices=tuple(matched["old"]),
        num_new_rows=num_new_rows,
        num_tuned_rows=num_tuned_rows,
        num_old_rows=num_old_rows,
        removed_tokens=tuple(sorted(old_vocabulary.keys() - new_vocabulary.keys())),
        added_tokens=tuple(sorted(new_vocabulary.keys() - old_vocabulary.keys())),
        tuned_only=tuned_only,
        num_padding_rows=len(padding_rows),
        num_common_tokens=len(old_vocabulary.keys() & new_vocabulary.keys()),
    )


def _check_ids(vocabulary: Mapping[str, int], num_rows: int, role: str) -> None:
    for token, row in vocabulary.items():
        if not 0 <= row < num_rows:
            raise MismatchError(
                f"the {role} vocabulary has token {token!r} with id {row}, but its embeddings have {num_rows:,} rows. "
                "Use the tokenizer that belongs to the weights."
            )


def graft_rows(
    new: torch.Tensor,
    tuned: torch.Tensor,
    old: torch.Tensor,
    match: RowMatch,
    rule: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = graft,
) -> torch.Tensor:
    """Graft a tensor with a row per token: apply the rule to the rows that all three tensors have in the match.

    A token that only the fine-tune has gets the fine-tune's row. Every other row is the new base's, because the
    delta of a token that the old base or the fine-tune lacks is unknown.

    Args:
        new: The new base's tensor, [new rows, …], or [1, new rows].
        tuned: The tuned tensor, [tuned rows, …], or [1, tuned rows].
        old: The old base's tensor, [old rows, …], or [1, old rows].
        match: The result of `match_rows`.
        rule: Computes grafted rows from the new, the tuned and the old rows, each [rows, …].

    Returns:
        [grafted rows, …], or [1, grafted rows], in the dtype of `tuned`.

    Raises:
        MismatchError: A tensor differs from the match in its number of rows.
    """
    import torch

    if match.is_row(tuple(tuned.shape)):
        return graft_rows(new.T, tuned.T, old.T, match, rule).T.contiguous()
    expected = (
        ("new", new, match.num_new_rows),
        ("tuned", tuned, match.num_tuned_rows),
        ("old", old, match.num_old_rows),
    )
    for role, tensor, num_rows in expected:
        if tensor.shape[0] != num_rows:
            raise MismatchError(
                f"the {role} tensor has {tensor.shape[0]:,} rows, but its vocabulary has {num_rows:,}. Use files that "
                "were saved together."
            )
    new_rows, tuned_rows, old_rows = (
        torch.tensor(indices) for indices in (match.new_row_indices, match.tuned_row_indices, match.old_row_indices)
    )
    grafted = torch.zeros((len(new_rows), *tuned.shape[1:]), dtype=tuned.dtype)
    in_all = (new_rows >= 0) & (tuned_rows >= 0) & (old_rows >= 0)
    in_tuned_only = (new_rows < 0) & (tuned_rows >= 0)
    from_new = (new_rows >= 0) & ~in_all
    grafted[from_new] = new[new_rows[from_new]].to(grafted.dtype)
    grafted[in_tuned_only] = tuned[tuned_rows[in_tuned_only]]
    if in_all.any():
        common = rule(new[new_rows[in_all]], tuned[tuned_rows[in_all]], old[old_rows[in_all]])
        grafted[in_all] = common.to(grafted.dtype)
    return grafted
