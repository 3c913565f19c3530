"""Distances between two sets of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.checkpoint import FLOATING, chunk_ranges, dtype_of, flat_slice, shape_of
from regraft.errors import CheckpointError, MismatchError
from regraft.progress import Progress, silent
from regraft.weights.names import align, kind_of, layer_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

CHUNK_ELEMENTS = 1 << 22
"""The number of elements that are compared at once, 32 MiB in float64."""
NONFINITE_REMEDY = "their distance is undefined (regraft weights inspect --check-finite counts them)."
"""The end of messages about infinite or NaN weights."""


@dataclass(frozen=True)
class Distance:
    """The distance between two sets of weights, each considered as a vector.

    Args:
        l2: The Euclidean norm of the difference.
        cosine: The cosine of the angle between the vectors, −1 to 1; if a vector is zero, 1 for equal vectors, else 0.
        relative: The norm of the difference divided by the norm of the first vector; infinite if only that is zero.
        parameters: The number of parameters.
    """

    l2: float
    cosine: float
    relative: float
    parameters: int

    @property
    def per_parameter(self) -> float:
        """The L2 norm divided by the number of parameters."""
        return self.l2 / self.parameters if self.parameters else 0.0


def distance(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Distance:
    """Return the distance between two sets of weights, computed in float64.

    Args:
        pairs: The corresponding tensors of both sets, of equal shapes and any floating-point dtype.

    Raises:
        CheckpointError: A tensor has infinite or NaN values.
    """
    return _distance([_sums(a, b) for a, b in pairs])


def distances(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], progress: Progress = silent
) -> dict[str, dict[str, Distance]]:
    """Return the distances between two checkpoints: in total, by layer, and by kind of tensor.

    Args:
        first: The first checkpoint, whose names determine layers and kinds.
        second: The second checkpoint, whose names may differ by the prefix of a model with a head.
        progress: Called for each chunk, in elements.

    Returns:
        The distances by grouping (`whole`, `layer`, `kind`) and group. Integer tensors and tensors that only
            one checkpoint has are left out.

    Raises:
        CheckpointError: A tensor has infinite or NaN values.
        MismatchError: A tensor has different shapes, or no floating-point tensor is in both checkpoints.
    """
    in_second = align(second, first)
    pairs = {name: in_second[name] for name in in_second if dtype_of(first, name) in FLOATING}
    if not pairs:
        raise MismatchError("no tensor has the same name in both checkpoints. Use checkpoints of one architecture.")
    sums_by_group: dict[str, dict[str, list[_Sums]]] = {"whole": {}, "layer": {}, "kind": {}}
    total = sum(math.prod(shape_of(first, name)) for name in pairs)
    num_processed = 0
    for name, second_name in pairs.items():
        if shape_of(first, name) != shape_of(second, second_name):
            shapes = f"{shape_of(first, name)} and {shape_of(second, second_name)}"
            raise MismatchError(
                f"tensor {name!r} has shapes {shapes} in the two checkpoints. Use checkpoints of one size."
            )
        for start, count in chunk_ranges(math.prod(shape_of(first, name)), CHUNK_ELEMENTS):
            sums = _sums(flat_slice(first, name, start, count), flat_slice(second, second_name, start, count))
            if not math.isfinite(sums.difference + sums.first + sums.second):
                raise CheckpointError(f"tensor {name!r} has infinite or NaN values: {NONFINITE_REMEDY}")
            for grouping, group in (("whole", "all"), ("layer", layer_of(name)), ("kind", kind_of(name))):
                sums_by_group[grouping].setdefault(group, []).append(sums)
            num_processed += count
            progress("distance", num_processed, total, {})
    return {
        grouping: {group: _distance(chunk_sums) for group, chunk_sums in sums_of_groups.items()}
        for grouping, sums_of_groups in sums_by_group.items()
    }


@dataclass(frozen=True)
class _Sums:
    """Sums over a chunk of two tensors: of squared differences, of products, and of the squares of each tensor."""

    difference: float
    dot: float
    first: float
    second: float
    parameters: int


def _sums(a: torch.Tensor, b: torch.Tensor) -> _Sums:
    import torch

    x, y = a.to(torch.float64).flatten(), b.to(torch.float64).flatten()
    difference = (x - y).square_().sum()
    return _Sums(float(difference), float(x @ y), float(x @ x), float(y @ y), x.numel())


def _distance(chunk_sums: list[_Sums]) -> Distance:
    """Compute a distance from the sums over its chunks, which are added exactly."""
    dot = math.fsum(sums.dot for sums in chunk_sums)
    l2 = math.sqrt(math.fsum(sums.difference for sums in chunk_sums))
    first_norm = math.sqrt(math.fsum(sums.first for sums in chunk_sums))
    second_norm = math.sqrt(math.fsum(sums.second for sums in chunk_sums))
    norms = first_norm * second_norm
    if not math.isfinite(l2 + norms):
        raise CheckpointError(f"there are infinite or NaN weights: {NONFINITE_REMEDY}")
    relative = math.inf if l2 else 0.0
    if first_norm:
        relative = l2 / first_norm
    return Distance(
        l2=l2,
        cosine=min(1.0, max(-1.0, dot / norms)) if norms else float(l2 == 0),
        relative=relative,
        parameters=sum(sums.parameters for sums in chunk_sums),
    )
