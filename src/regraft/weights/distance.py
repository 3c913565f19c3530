"""How far apart two sets of weights are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


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


def distance(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Distance:
    """Measure two sets of weights against each other, a pair of tensors at a time.

    Args:
        pairs: Tensors of equal shape, one of each set; any floating-point dtype.

    Returns:
        Their distance, summed in float64.
    """
    import torch

    difference = dot = first = second = 0.0
    parameters = 0
    for a, b in pairs:
        x, y = a.to(torch.float64).flatten(), b.to(torch.float64).flatten()
        difference += float((x - y).square().sum())
        dot += float(x @ y)
        first += float(x @ x)
        second += float(y @ y)
        parameters += x.numel()
    norms = math.sqrt(first) * math.sqrt(second)
    l2 = math.sqrt(difference)
    return Distance(
        l2=l2,
        cosine=min(1.0, max(-1.0, dot / norms)) if norms else float(difference == 0),
        relative=l2 / math.sqrt(first) if first else math.inf if l2 else 0.0,
        parameters=parameters,
    )
