"""Tasks that were tuned on both bases: pairs of adaptations."""

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


def read_pairs(pairs: Sequence[str], like: Vector, upgrade: Upgrade) -> list[tuple[Vector, Vector]]:
    """Open pairs of adaptations, and compare them with what is carried over.

    Args:
        pairs: `OLD=NEW` each: the folders of what was tuned on the old and on the new base.
        like: The vector of what is carried over.
        upgrade: The two bases.

    Returns:
        The vectors on the old and on the new base.

    Raises:
        CheckpointError: A folder holds no adaptation.
        MismatchError: One was tuned on another base, or is of another kind, shape or setting.
        RecipeError: A pair is not written as a pair.
    """
    vectors = []
    for pair in pairs:
        old, new = split_pair(pair)
        vectors.append((open_alike(old, upgrade.old, like)[1], open_alike(new, upgrade.new, like)[1]))
    return vectors


def open_alike(folder: str, base: Base, like: Vector) -> tuple[Adaptation, Vector]:
    """Open what was tuned for another task, and compare it with what is carried over.

    Args:
        folder: The other adaptation's.
        base: The base that it was tuned on.
        like: The vector of what is carried over.

    Returns:
        The other adaptation and its vector.

    Raises:
        CheckpointError: The folder holds no adaptation.
        MismatchError: It was tuned on another base, or is of another kind, shape or setting.
    """
    other = load_adaptation(folder)
    other.check_base(base)
    vector = other.family.vector(other, base)
    check_same_layout(vector, like)
    return other, vector


def split_pair(pair: str) -> tuple[str, str]:
    """Read what stands for a pair.

    Args:
        pair: As in `old/adaptation=new/adaptation`.

    Returns:
        What is before and after the first `=`.

    Raises:
        RecipeError: There is no `=`, or nothing on one side of it.
    """
    first, _, second = str(pair).partition("=")
    if not first.strip() or not second.strip():
        raise RecipeError(f"a pair is written OLD=NEW, two folders or a folder and a task file; found {pair!r}.")
    return first.strip(), second.strip()
