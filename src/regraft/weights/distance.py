"""How far apart two sets of weights are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.checkpoint import FLOATING, dtype_of, flat_slice, shape_of
from regraft.errors import CheckpointError, MismatchError
from regraft.progress import Progress, silent
from regraft.weights.names import align, kind_of, layer_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

CHUNK_ELEMENTS = 1 << 22
REMEDY = "they have no distance (regraft weights inspect --check-finite counts them)."


@dataclass(frozen=True)
class Distance:
    """The distance between two sets of weights, taken as one long vector each.

    Args:
        l2: The Euclidean norm of their difference.
        cosine: The cosine of the angle between them, 1 for the same direction.
        relative: The norm of the difference over the norm of the first.
        parameters: How many numbers each holds.
    """

    l2: float
    cosine: float
    relative: float
    parameters: int

    @property
    def per_parameter(self) -> float:
        """The L2 norm over the number of parameters."""
        return self.l2 / self.parameters if self.parameters else 0.0


def distance(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Distance:
    """Measure two sets of weights against each other, a pair of tensors at a time.

    Args:
        pairs: Tensors of equal shape, one of each set; any floating-point dtype.

    Returns:
        Their distance, summed in float64.

    Raises:
        CheckpointError: They hold values that are infinite or not a number.
    """
    return _distance([_sums(a, b) for a, b in pairs])


def distances(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], progress: Progress = silent
) -> dict[str, dict[str, Distance]]:
    """Measure two checkpoints against each other: as wholes, by layer, and by what tensors do.

    Args:
        first: The one side, whose names count.
        second: The other; its names may carry the prefix of a model with a head, or not.
        progress: Told of each piece, in numbers.

    Returns:
        Distances by `whole`, `layer` and `kind`, and by the name in each; tensors of one side only are left out.

    Raises:
        CheckpointError: A tensor holds values that are infinite or not a number.
        MismatchError: A tensor has different shapes, or no tensor is in both.
    """
    names = {n: o for n, o in align(second, first).items() if dtype_of(first, n) in FLOATING}
    if not names:
        raise MismatchError("no tensor has the same name in both: these checkpoints are not of one architecture.")
    groups: dict[str, dict[str, list[_Sums]]] = {"whole": {}, "layer": {}, "kind": {}}
    total, done = sum(math.prod(shape_of(first, name)) for name in names), 0
    for name, other in names.items():
        if shape_of(first, name) != shape_of(second, other):
            shapes = f"{shape_of(first, name)} and {shape_of(second, other)}"
            raise MismatchError(f"tensor {name!r} is of shapes {shapes} in the two checkpoints.")
        count = math.prod(shape_of(first, name))
        for start in range(0, count, CHUNK_ELEMENTS):
            size = min(CHUNK_ELEMENTS, count - start)
            sums = _sums(flat_slice(first, name, start, size), flat_slice(second, other, start, size))
            if not math.isfinite(sums.difference + sums.first + sums.second):
                raise CheckpointError(f"tensor {name!r} holds values that are infinite or not a number: {REMEDY}")
            for by, group in (("whole", "all"), ("layer", layer_of(name)), ("kind", kind_of(name))):
                groups[by].setdefault(group, []).append(sums)
            done += size
            progress("distance", done, total, {})
    return {by: {group: _distance(parts) for group, parts in several.items()} for by, several in groups.items()}


@dataclass(frozen=True)
class _Sums:
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


def _distance(parts: list[_Sums]) -> Distance:
    difference, dot, first, second = (
        math.fsum(getattr(part, name) for part in parts) for name in ("difference", "dot", "first", "second")
    )
    norms = math.sqrt(first) * math.sqrt(second)
    l2 = math.sqrt(difference)
    if not math.isfinite(l2 + norms):
        raise CheckpointError(f"there are weights that are infinite or not a number: {REMEDY}")
    return Distance(
        l2=l2,
        cosine=min(1.0, max(-1.0, dot / norms)) if norms else float(difference == 0),
        relative=l2 / math.sqrt(first) if first else math.inf if l2 else 0.0,
        parameters=sum(part.parameters for part in parts),
    )
