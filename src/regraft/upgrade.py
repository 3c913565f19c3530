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
    """The step from an old base model to the new one that was pre-trained from it.

    Args:
        old: The base that adaptations were tuned on: a folder, a hub id or a `Base`.
        new: The base that they are carried over to.

    Raises:
        CheckpointError: A base is missing or incomplete.
        MismatchError: They differ in architecture or sizes. Rows of embeddings may differ: they are matched by token.
    """

    old: Base
    new: Base

    def __init__(self, old: Base | str | Path, new: Base | str | Path):
        object.__setattr__(self, "old", old if isinstance(old, Base) else Base.open(old))
        object.__setattr__(self, "new", new if isinstance(new, Base) else Base.open(new))
        self._check_architecture()
        self._check_tensors()
        _ = self.row_match

    @functools.cached_property
    def row_match(self) -> RowMatch | None:
        """How the rows of the vocabularies match by token; None if they are the same."""
        old, new = self.old, self.new
        if old.vocabulary == new.vocabulary and old.embedding_rows == new.embedding_rows:
            return None
        rows = match_rows(old.vocabulary, new.vocabulary, old.embedding_rows, new.embedding_rows)
        logger.warning(
            "%s and %s have different vocabularies, matched by token: %s.", old.path, new.path, rows.summary()
        )
        return rows

    def shared_rows(self, name: str, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a tensor of both bases, reduced to the rows of common tokens if it has a row for each token.

        Args:
            name: The tensor's name inside the body.
            old: The old base's tensor.
            new: The new base's tensor.
        """
        if self.row_match is None or name not in self.old.architecture.token_tensors:
            return old, new
        pairs = [
            (i, j)
            for i, j in zip(self.row_match.old_row_indices, self.row_match.new_row_indices, strict=True)
            if i >= 0 and j >= 0
        ]
        return old[[i for i, _ in pairs]], new[[j for _, j in pairs]]

    def check_finite(self) -> None:
        """Check that the bases have no infinite or NaN values.

        Raises:
            CheckpointError: A body has such values.
        """
        self.old.check_finite()
        self.new.check_finite()

    def distance(self) -> Distance:
        """Return the distance between the bodies of the two bases."""
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
            lines = [f"{self.new.path} is no upgrade of {self.old.path}:"]
            for problem, names in (
                ("of another shape", differing),
                ("only in the old base", only_old),
                ("only in the new base", only_new),
            ):
                if names:
                    lines.append(f"  {len(names)} tensors {problem}: {_first_names(names)}")
            lines.append("Use the base that the weights were tuned on and the one pre-trained further from it.")
            raise MismatchError("\n".join(lines))


def with_current_fingerprints(record: Mapping[str, Any], bases: Iterable[Base]) -> dict[str, Any]:
    """Replace fingerprints of bases that regraft 0.1 recorded by the current ones.

    Args:
        record: A record of inputs.
        bases: The bases that may be among them.
    """
    current = {base.stored_fingerprint: base.fingerprint for base in bases}
    return {key: current.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def _shapes(base: Base) -> dict[str, tuple[int, ...]]:
    return {inner: base.checkpoint.tensors[name].shape for inner, name in base.body.items()}


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
