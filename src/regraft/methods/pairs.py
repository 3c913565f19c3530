"""The pairs that `project` learns from: an adaptation to the old base, and one to the new base or the task's file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.adaptation import load_adaptation
from regraft.adaptation.vector import check_same_layout
from regraft.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.adaptation import Adaptation
    from regraft.adaptation.vector import Vector
    from regraft.base import Base
    from regraft.upgrade import Upgrade


def read_pairs(pairs: Sequence[str], layout: Vector, upgrade: Upgrade) -> list[tuple[Vector, Vector]]:
    """Load the vectors of pairs of adaptations to other tasks.

    Args:
        pairs: `OLD=NEW`, the folders of the adaptations to one task on the old and on the new base.
        layout: A vector whose kind, shapes and settings all adaptations must have.
        upgrade: The old base and the new base.

    Returns:
        For each pair, the vector on the old base and the vector on the new base.

    Raises:
        CheckpointError: A folder has no adaptation.
        MismatchError: An adaptation was tuned on a different base, or differs in kind, shapes or settings.
        RecipeError: A pair is not written OLD=NEW.
    """
    vectors = []
    for pair in pairs:
        old_folder, new_folder = split_pair(pair)
        _, old_vector = load_with_layout(old_folder, upgrade.old, layout)
        _, new_vector = load_with_layout(new_folder, upgrade.new, layout)
        vectors.append((old_vector, new_vector))
    return vectors


def load_with_layout(folder: str, base: Base, layout: Vector) -> tuple[Adaptation, Vector]:
    """Load an adaptation to another task, and refuse one whose vector has a different layout.

    Args:
        folder: The adaptation's folder.
        base: The base that it was tuned on.
        layout: A vector whose kind, shapes and settings the adaptation must have.

    Returns:
        The adaptation and its vector.

    Raises:
        CheckpointError: The folder has no adaptation.
        MismatchError: The adaptation was tuned on a different base, or differs in kind, shapes or settings.
    """
    adaptation = load_adaptation(folder)
    adaptation.check_base(base)
    vector = adaptation.family.vector(adaptation, base)
    check_same_layout(vector, layout)
    return adaptation, vector


def split_pair(pair: str) -> tuple[str, str]:
    """Split a pair at its first `=`.

    Args:
        pair: Two paths, as in `old/adaptation=new/adaptation`.

    Returns:
        The two paths, without surrounding whitespace.

    Raises:
        RecipeError: The pair has no `=`, or a path is empty.
    """
    old, _, new = (path.strip() for path in str(pair).partition("="))
    if not old or not new:
        raise RecipeError(f"a pair is written OLD=NEW, two folders or a folder and a task file; found {pair!r}.")
    return old, new
