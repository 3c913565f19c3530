"""The numbers of examples to draw from strata."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def spread_evenly(size: int, stratum_sizes: Sequence[int]) -> list[int]:
    """Divide a number of examples among strata as evenly as they allow.

    Args:
        size: The number of examples in all.
        stratum_sizes: The number of available examples of each stratum.

    Returns:
        The number of examples of each stratum; if all have too few, the first number is larger than its stratum, which
        callers refuse.
    """
    counts = [0] * len(stratum_sizes)
    remaining = size
    while remaining:
        unfilled = [index for index, available in enumerate(stratum_sizes) if counts[index] < available]
        if not unfilled:
            counts[0] += remaining
            break
        for index in unfilled[:remaining]:
            counts[index] += 1
        remaining -= len(unfilled[:remaining])
    return counts
