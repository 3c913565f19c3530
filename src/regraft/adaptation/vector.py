"""An adaptation as a vector, which is read in chunks."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import chunk_ranges, flat_slice, shape_of
from regraft.errors import MAX_LISTED, MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

CHUNK_ELEMENTS = 1 << 18  # arbitrary: a chunk takes 2 MiB in float64
LAYOUT_SETTINGS = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "num_virtual_tokens",
    "inner_size",
    "activation",
    "placement",
)
"""The settings of adapters that must be equal for their vectors to be comparable."""


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """An adaptation without its head: the deltas of a full fine-tune's body, or an adapter's own tensors.

    Args:
        source: The adaptation's folder, for error messages.
        kind: The kind of adaptation.
        fingerprint: The fingerprint of the weights.
        tensors: The stored tensors; of a LoRA whose initialisation changed its base, those of the plain LoRA.
        config: The content of `adapter_config.json`; empty for a full fine-tune.
        base: The base's tensors to subtract, and their names by the names in the vector; None for an adapter.
        names: The stored names of the tensors, by their names in the vector.
    """

    source: str
    kind: str
    fingerprint: str
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    base: tuple[Mapping[str, torch.Tensor], Mapping[str, str]] | None
    names: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors."""
        return {name: tuple(shape_of(self.tensors, stored)) for name, stored in self.names.items()}

    def flat_slice(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return a slice of a flattened tensor.

        Args:
            name: The tensor's name in the vector.
            start: The index of the first element.
            count: The number of elements.

        Returns:
            [count], in float64.
        """
        values = flat_slice(self.tensors, self.names[name], start, count).double()
        if self.base is None:
            return values
        return values - flat_slice(self.base[0], self.base[1][name], start, count).double()


def chunks(vector: Vector) -> Iterator[tuple[str, int, int]]:
    """Divide a vector into chunks of at most `CHUNK_ELEMENTS` elements.

    Args:
        vector: The vector.

    Yields:
        A tensor's name in the vector, the index of the chunk's first element in it, and the number of elements.
    """
    for name, shape in vector.shapes.items():
        for start, count in chunk_ranges(math.prod(shape), CHUNK_ELEMENTS):
            yield name, start, count


def check_same_layout(vector: Vector, reference: Vector) -> None:
    """Check that the elements of two vectors have the same meaning.

    Args:
        vector: A vector.
        reference: The vector that it is compared with.

    Raises:
        MismatchError: The vectors differ in kind, in a shape or in a setting.
    """
    if vector.kind != reference.kind:
        raise MismatchError(
            f"{vector.source} is a {vector.kind}, but {reference.source} is a {reference.kind}: a map is learned from "
            "adaptations of a single kind."
        )
    shapes, expected = vector.shapes, reference.shapes
    if differing := sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)):
        first = "; ".join(f"{name}: {shapes.get(name)} and {expected.get(name)}" for name in differing[:MAX_LISTED])
        raise MismatchError(
            f"{vector.source} and {reference.source} differ in {len(differing)} tensors ({first}): a map is learned "
            "from adaptations of the same shapes."
        )
    for key in LAYOUT_SETTINGS:
        value, expected_value = vector.config.get(key) or None, reference.config.get(key) or None
        if value != expected_value:
            raise MismatchError(
                f"{vector.source} and {reference.source} differ in {key}: {value!r} and {expected_value!r}. Their "
                "elements have different meanings."
            )
