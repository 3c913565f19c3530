"""The upgrade from one base model to the next."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING, Any

from regraft.base import Base
from regraft.errors import MismatchError
from regraft.weights import is_optional, match_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from regraft.weights import Distance, RowMatch

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Upgrade:
    """The step from an old base model to the new one that came from it.

    Args:
        old: The base that was tuned on, a folder, a hub id or an opened `Base`.
        new: The base to carry over to.

    Raises:
        CheckpointError: One of the two is missing or not whole.
        MismatchError: They differ in architecture or sizes, but for rows of tokens, which are matched by token.
    """

    old: Base
    new: Base

    def __init__(self, old: Base | str | Path, new: Base | str | Path):
        object.__setattr__(self, "old", old if isinstance(old, Base) else Base.open(old))
        object.__setattr__(self, "new", new if isinstance(new, Base) else Base.open(new))
        self._check_architecture()
        self._check_tensors()
        _ = self.rows

    @functools.cached_property
    def rows(self) -> RowMatch | None:
        """How the rows of the vocabularies match by token; None where they are the same."""
        old, new = self.old, self.new
        if old.vocabulary == new.vocabulary and old.embedding_rows == new.embedding_rows:
            return None
        rows = match_rows(old.vocabulary, new.vocabulary, old.embedding_rows, new.embedding_rows)
        logger.warning("%s and %s have other vocabularies, matched by token: %s.", old.path, new.path, rows.summary())
        return rows

    def shared_rows(self, name: str, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tensors of the two bases such that rows of tokens stand for the same tokens.

        Args:
            name: The tensor's name inside the body.
            old: The old base's tensor.
            new: The new base's.

        Returns:
            Both as they are; of embeddings, where the vocabularies differ, the rows of the tokens that both have.
        """
        if self.rows is None or name not in self.old.architecture.token_tensors:
            return old, new
        pairs = [
            (i, j)
            for i, j in zip(self.rows.old_row_indices, self.rows.new_row_indices, strict=True)
            if i >= 0 and j >= 0
        ]
        return old[[i for i, _ in pairs]], new[[j for _, j in pairs]]

    def check_finite(self) -> None:
        """Refuse bases that hold values that are infinite or not a number.

        Raises:
            CheckpointError: A tensor of one of the bodies holds some.
        """
        self.old.check_finite()
        self.new.check_finite()

    def distance(self) -> Distance:
        """Measure how far continual pre-training moved the body.

        Returns:
            L2, cosine and relative distance of all body tensors.
        """
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
                f"the bases are of different kinds: {self.old.path} is a {old.model_type}, {self.new.path} a "
                f"{new.model_type}. An upgrade keeps the architecture."
            )

    def _check_tensors(self) -> None:
        old, new = _shapes(self.old), _shapes(self.new)
        unlike = sorted(n for n in old.keys() & new.keys() if old[n] != new[n])
        by_token = self.old.architecture.token_tensors if unlike else ()
        differing = [f"{n}: {old[n]} and {new[n]}" for n in unlike if n not in by_token or old[n][1:] != new[n][1:]]
        only_old = sorted(n for n in old.keys() - new.keys() if not is_optional(n))
        only_new = sorted(n for n in new.keys() - old.keys() if not is_optional(n))
        if differing or only_old or only_new:
            lines = [f"{self.old.path} and {self.new.path} are not an upgrade of one another:"]
            for what, names in (
                ("of another shape", differing),
                ("only in the old base", only_old),
                ("only in the new base", only_new),
            ):
                if names:
                    lines.append(f"  {len(names)} tensors {what}: {_some(names)}")
            lines.append("Give the base that the weights were tuned on and the one pre-trained further from it.")
            raise MismatchError("\n".join(lines))


def with_current_fingerprints(record: Mapping[str, Any], bases: Iterable[Base]) -> dict[str, Any]:
    """Replace fingerprints of bases by the rule of regraft 0.1 by today's.

    Args:
        record: What something was made from.
        bases: The bases that it may have been made from.

    Returns:
        The record with today's fingerprints.
    """
    today = {base.stored_fingerprint: base.fingerprint for base in bases}
    return {key: today.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def _shapes(base: Base) -> dict[str, tuple[int, ...]]:
    return {inner: base.checkpoint.tensors[name].shape for inner, name in base.body.items()}


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")
