"""Tasks that were tuned on both bases: pairs of adaptations, each as one long vector that is never held whole."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation import load_adaptation, plain_adapter
from regraft.adaptation.head import model_name
from regraft.adaptation.replaced import replaced_parameter
from regraft.base import body_names
from regraft.checkpoint import piece, shape_of
from regraft.errors import KindError, MismatchError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from regraft.adaptation import Adaptation
    from regraft.base import Base
    from regraft.upgrade import Upgrade

PIECE = 1 << 18
# settings that say what an adapter's numbers mean
MEANING = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "num_virtual_tokens", "inner_size", "activation", "placement",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """An adaptation without its head: the deltas of a full fine-tune's body, or an adapter's own tensors.

    Args:
        source: Where it is stored, for messages.
        fingerprint: Which weights these are.
        tensors: The tensors as they are stored; of a LoRA that began in its base, those of the plain one.
        settings: The content of an adapter's config; nothing for a full fine-tune.
        base: What is taken off each tensor, and its name there; None for an adapter.
        names: The stored name of each tensor, by its name in the vector.
    """

    source: str
    fingerprint: str
    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]
    base: tuple[Mapping[str, torch.Tensor], Mapping[str, str]] | None
    names: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(shape_of(self.tensors, stored)) for name, stored in self.names.items()}

    def piece(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return some of its numbers.

        Args:
            name: A tensor's name in the vector.
            start: The first number in that tensor, laid out flat.
            count: How many.

        Returns:
            [count], in float64.
        """
        numbers = piece(self.tensors, self.names[name], start, count).double()
        if self.base is None:
            return numbers
        return numbers - piece(self.base[0], self.base[1][name], start, count).double()


def vector_of(adaptation: Adaptation, base: Base) -> Vector:
    """See an adaptation as a vector.

    Args:
        adaptation: The tuned weights.
        base: The base they were tuned on.

    Returns:
        The vector; nothing has been read of it but where a LoRA's start had to be found. What an adapter stores in
        place of its base's tensors is no part of it.

    Raises:
        KindError: An adapter stores nothing else.
    """
    where, known = str(adaptation.path), adaptation.fingerprint
    if adaptation.kind == "full":
        own = body_names(adaptation.checkpoint, base.architecture)
        names = {inner: stored for inner, stored in own.items() if inner in base.body}
        return Vector(where, known, adaptation.checkpoint, {}, (base.checkpoint, base.body), names)
    tensors, settings = plain_adapter(adaptation, base)
    heads = _heads(base)
    names = {name: name for name in tensors if model_name(name) not in heads and replaced_parameter(name, base) is None}
    if not names:
        raise KindError(
            f"{where}: stores nothing but what takes the place of its base's tensors, which no map is learned for. "
            "Take direct."
        )
    return Vector(where, known, tensors, settings, None, names)


def read_pairs(pairs: Sequence[str], adaptation: Adaptation, upgrade: Upgrade) -> list[tuple[Vector, Vector]]:
    """Open pairs of adaptations, and compare them with the one that is carried over.

    Args:
        pairs: `OLD=NEW` each: the folders of what was tuned on the old and on the new base.
        adaptation: What is carried over.
        upgrade: The two bases.

    Returns:
        The vectors on the old and on the new base.

    Raises:
        CheckpointError: A folder holds no adaptation.
        MismatchError: One was tuned on another base, or is of another kind, shape or setting.
        RecipeError: A pair is not written as a pair.
    """
    like, found = vector_of(adaptation, upgrade.old), []
    for pair in pairs:
        sides = []
        for folder, base in zip(split_pair(pair), (upgrade.old, upgrade.new), strict=True):
            sides.append(open_alike(folder, base, adaptation, like)[1])
        found.append((sides[0], sides[1]))
    return found


def open_alike(folder: str, base: Base, adaptation: Adaptation, like: Vector) -> tuple[Adaptation, Vector]:
    """Open what was tuned for another task, and compare it with what is carried over.

    Args:
        folder: The other adaptation's.
        base: The base that it was tuned on.
        adaptation: What is carried over.
        like: Its vector.

    Returns:
        The other adaptation and its vector.

    Raises:
        CheckpointError: The folder holds no adaptation.
        MismatchError: It was tuned on another base, or is of another kind, shape or setting.
    """
    other = load_adaptation(folder)
    other.check_base(base)
    if other.kind != adaptation.kind:
        raise MismatchError(
            f"{folder}: is a {other.kind}, and {adaptation.path} a {adaptation.kind}: a map is learned from "
            "adaptations of one kind."
        )
    vector = vector_of(other, base)
    check_alike(vector, like)
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


def pieces(vector: Vector) -> Iterator[tuple[str, int, int]]:
    """Cut a vector into pieces.

    Args:
        vector: The vector.

    Yields:
        A tensor's name in the vector, the first number in it, and how many.
    """
    for name, shape in vector.shapes.items():
        count = math.prod(shape)
        for start in range(0, count, PIECE):
            yield name, start, min(PIECE, count - start)


def check_alike(vector: Vector, like: Vector) -> None:
    """Refuse a vector whose numbers stand for something else.

    Args:
        vector: The one.
        like: The other.

    Raises:
        MismatchError: They differ in a shape or a setting.
    """
    shapes, wanted = vector.shapes, like.shapes
    if differing := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        told = [f"{name}: {shapes.get(name)} and {wanted.get(name)}" for name in differing[:4]]
        raise MismatchError(
            f"{vector.source} and {like.source} differ in {len(differing)} tensors ({'; '.join(told)}): a map is "
            "learned from adaptations of one shape."
        )
    for key in MEANING:
        own, other = vector.settings.get(key) or None, like.settings.get(key) or None
        if own != other:
            raise MismatchError(
                f"{vector.source} and {like.source} differ in {key}: {own!r} and {other!r}. The same numbers would "
                "mean something else."
            )


def _heads(base: Base) -> set[str]:
    """Name the tensors of a classifier that its base has not: the head's, and a pooler's that the base lacks."""
    names = base.classifier.state_dict()
    return {name for name in names if name.removeprefix(base.prefix + ".") not in base.parameters}
