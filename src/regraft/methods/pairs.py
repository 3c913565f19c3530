"""Pairs of adaptations of the same task, tuned on the old base and on the new one."""

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
    """Load pairs of adaptations of other tasks.

    Args:
        pairs: `OLD=NEW`, the folders of the adaptations of one task to the old and to the new base.
        layout: A vector whose kind, shapes and settings all must have.
        upgrade: The two bases.

    Returns:
        The vectors of each pair: on the old base, on the new base.

    Raises:
        CheckpointError: A folder has no adaptation.
        MismatchError: An adaptation was tuned on another base, or differs in kind, shapes or settings.
        RecipeError: A pair is not written OLD=NEW.
    """
    vectors = []
    for pair in pairs:
        old, new = split_pair(pair)
        vectors.append((load_alike(old, upgrade.old, layout)[1], load_alike(new, upgrade.new, layout)[1]))
    return vectors


def load_alike(folder: str, base: Base, layout: Vector) -> tuple[Adaptation, Vector]:
    """Load an adaptation of another task.

    Args:
        folder: The adaptation's folder.
        base: The base that it was tuned on.
        layout: A vector whose kind, shapes and settings it must have.

    Returns:
        The adaptation and its vector.

    Raises:
        CheckpointError: The folder has no adaptation.
        MismatchError: The adaptation was tuned on another base, or differs in kind, shapes or settings.
    """
    adaptation = load_adaptation(folder)
    adaptation.check_base(base)
    vector = adaptation.family.vector(adaptation, base)
    check_same_layout(vector, layout)
    return adaptation, vector


def split_pair(pair: str) -> tuple[str, str]:
    """Split a pair at its first `=`.

    Args:
        pair: A pair, as in `old/adaptation=new/adaptation`.

    Returns:
        The two sides.

    Raises:
        RecipeError: There is no `=`, or one side is empty.
    """
    first, _, second = str(pair).partition("=")
    if not first.strip() or not second.strip():
        raise RecipeError(f"a pair is written OLD=NEW, two folders or a folder and a task file; found {pair!r}.")
    return first.strip(), second.strip()
