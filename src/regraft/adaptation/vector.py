"""An adaptation as one long vector that is never held whole."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import flat_slice, shape_of
from regraft.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

CHUNK_ELEMENTS = 1 << 18  # numbers at a time: 2 MiB in float64
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
        kind: The adaptation's.
        fingerprint: Which weights these are.
        tensors: The tensors as they are stored; of a LoRA that began in its base, those of the plain one.
        settings: The content of an adapter's config; nothing for a full fine-tune.
        base: What is taken off each tensor, and its name there; None for an adapter.
        names: The stored name of each tensor, by its name in the vector.
    """

    source: str
    kind: str
    fingerprint: str
    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]
    base: tuple[Mapping[str, torch.Tensor], Mapping[str, str]] | None
    names: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(shape_of(self.tensors, stored)) for name, stored in self.names.items()}

    def flat_slice(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return some of its numbers.

        Args:
            name: A tensor's name in the vector.
            start: The first number in that tensor, laid out flat.
            count: How many.

        Returns:
            [count], in float64.
        """
        numbers = flat_slice(self.tensors, self.names[name], start, count).double()
        if self.base is None:
            return numbers
        return numbers - flat_slice(self.base[0], self.base[1][name], start, count).double()


def chunks(vector: Vector) -> Iterator[tuple[str, int, int]]:
    """Cut a vector into pieces.

    Args:
        vector: The vector.

    Yields:
        A tensor's name in the vector, the first number in it, and how many.
    """
    for name, shape in vector.shapes.items():
        count = math.prod(shape)
        for start in range(0, count, CHUNK_ELEMENTS):
            yield name, start, min(CHUNK_ELEMENTS, count - start)


def check_same_layout(vector: Vector, like: Vector) -> None:
    """Refuse a vector whose numbers stand for something else.

    Args:
        vector: What is compared.
        like: What it is compared with.

    Raises:
        MismatchError: They differ in their kind, a shape or a setting.
    """
    if vector.kind != like.kind:
        raise MismatchError(
            f"{vector.source}: is a {vector.kind}, and {like.source} a {like.kind}: a map is learned from adaptations "
            "of one kind."
        )
    shapes, expected = vector.shapes, like.shapes
    if differing := sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)):
        first = "; ".join(f"{name}: {shapes.get(name)} and {expected.get(name)}" for name in differing[:4])
        raise MismatchError(
            f"{vector.source} and {like.source} differ in {len(differing)} tensors ({first}): a map is learned from "
            "adaptations of one shape."
        )
    for key in MEANING:
        own, other = vector.settings.get(key) or None, like.settings.get(key) or None
        if own != other:
            raise MismatchError(
                f"{vector.source} and {like.source} differ in {key}: {own!r} and {other!r}. The same numbers would "
                "mean something else."
            )
