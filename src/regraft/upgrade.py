"""The upgrade from an old base model to a new one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from typing import TYPE_CHECKING, Any

from regraft.base import Base
from regraft.errors import MAX_LISTED, MismatchError
from regraft.weights import is_optional, match_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from regraft.weights import Distance, RowMatch

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Upgrade:
    """The step from an old base model to the new one that was pre-trained from it.

    Args:
        old: The base that adaptations were tuned on: a folder, a hub id or a `Base`.
        new: The base that they are carried over to.

    Raises:
        CheckpointError: A base is missing or incomplete.
        MismatchError: The bases differ in architecture or tensor shapes, or a token has no row in the embeddings.
            Embeddings may differ in rows, which are matched by token.
    """

    old: Base
    new: Base

    def __init__(self, old: Base | str | Path, new: Base | str | Path):
        object.__setattr__(self, "old", old if isinstance(old, Base) else Base.open(old))
        object.__setattr__(self, "new", new if isinstance(new, Base) else Base.open(new))
        self._check_architecture()
        self._check_tensors()
        _ = self.row_match  # checks the vocabularies, and logs a difference

    def with_bases(self, old: Base, new: Base) -> Upgrade:
        """Return the upgrade with other tokenizers of the same bases, which are not checked again.

        Args:
            old: The old base, with another tokenizer.
            new: The new base, with another tokenizer.
        """
        replaced = copy.copy(self)
        object.__setattr__(replaced, "old", old)
        object.__setattr__(replaced, "new", new)
        return replaced

    @functools.cached_property
    def row_match(self) -> RowMatch | None:
        """The match of the vocabularies' rows by token; None if they are the same."""
        old, new = self.old, self.new
        if old.vocabulary == new.vocabulary and old.embedding_rows == new.embedding_rows:
            return None
        match = match_rows(old.vocabulary, new.vocabulary, old.embedding_rows, new.embedding_rows)
        logger.warning(
            "%s and %s have different vocabularies, matched by token: %s.", old.path, new.path, match.summary()
        )
        return match

    def shared_rows(self, name: str, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a tensor of both bases; if it has a row per token, only the rows that are matched.

        Args:
            name: The tensor's name inside the body.
            old: The old base's tensor, [old rows, …].
            new: The new base's tensor, [new rows, …].

        Returns:
            The old and the new tensor, with corresponding rows.
        """
        if self.row_match is None or name not in self.old.architecture.token_tensors:
            return old, new
        old_rows = []
        new_rows = []
        for old_row, new_row in zip(self.row_match.old_row_indices, self.row_match.new_row_indices, strict=True):
            if old_row >= 0 and new_row >= 0:
                old_rows.append(old_row)
                new_rows.append(new_row)
        return old[old_rows], new[new_rows]

    def check_finite(self) -> None:
        """Check that the bodies have no infinite or NaN values.

        Raises:
            CheckpointError: A body has infinite or NaN values; the message counts them by tensor.
        """
        self.old.check_finite()
        self.new.check_finite()

    def distance(self) -> Distance:
        """Return the distance between the bodies of the bases, over their common tensors and tokens."""
        from regraft.weights import distance

        shared = sorted(self.old.body.keys() & self.new.body.keys())
        return distance(
            self.shared_rows(name, self.old.checkpoint[self.old.body[name]], self.new.checkpoint[self.new.body[name]])
            for name in shared
        )

    def _check_architecture(self) -> None:
        old, new = self.old.config, self.new.config
        if old.model_type != new.model_type:
            raise MismatchError(
                f"the bases have different architectures: {self.old.path} is a {old.model_type}, {self.new.path} a "
                f"{new.model_type}. Use a base that was pre-trained from the other."
            )

    def _check_tensors(self) -> None:
        """Refuse bases if only one has a tensor, except poolers, or if a shape differs, except in rows of tokens."""
        old, new = _shapes(self.old), _shapes(self.new)
        misshapen = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
        token_tensors = self.old.architecture.token_tensors if misshapen else ()
        differing = [
            f"{name}: {old[name]} and {new[name]}"
            for name in misshapen
            if name not in token_tensors or old[name][1:] != new[name][1:]
        ]
        only_old = sorted(name for name in old.keys() - new.keys() if not is_optional(name))
        only_new = sorted(name for name in new.keys() - old.keys() if not is_optional(name))
        if differing or only_old or only_new:
            lines = [f"{self.new.path} is not an upgrade of {self.old.path}:"]
            for problem, names in (
                ("of different shapes", differing),
                ("only in the old base", only_old),
                ("only in the new base", only_new),
            ):
                if names:
                    lines.append(f"  {len(names)} tensors {problem}: {_first_names(names)}")
            lines.append("Use the base that the weights were tuned on and the one pre-trained further from it.")
            raise MismatchError("\n".join(lines))


def with_current_fingerprints(record: Mapping[str, Any], bases: Iterable[Base]) -> dict[str, Any]:
    """Replace the fingerprints of bases that regraft 0.1 recorded with the current fingerprints.

    Args:
        record: The inputs of a run, as `read_json` returns them.
        bases: The bases whose fingerprints may be among the values.

    Returns:
        A copy of the record with the current fingerprints.
    """
    current = {base.stored_fingerprint: base.fingerprint for base in bases}
    return {key: current.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def _shapes(base: Base) -> dict[str, tuple[int, ...]]:
    return {canonical: base.checkpoint.tensors[stored].shape for canonical, stored in base.body.items()}


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (" …" if len(names) > MAX_LISTED else "")
