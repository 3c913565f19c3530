"""Deltas made smaller: fewer entries, or less of what the upgrade itself changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    import torch


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the largest entries of a delta and set the others to zero.

    Source: TIES-Merging (Yadav et al., 2023, arXiv:2306.01708), its first step.

    Args:
        delta: Of any shape.
        density: The share of entries to keep, 0 to 1; among equals the first ones stay.

    Returns:
        The trimmed delta.

    Raises:
        RecipeError: The density is out of its range.
    """
    import torch

    kept = round(_density(density) * delta.numel())
    flat = delta.flatten()
    places = torch.sort(flat.abs(), descending=True, stable=True).indices[:kept]
    result = torch.zeros_like(flat)
    result[places] = flat[places]
    return result.reshape(delta.shape)


def drop(delta: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Keep entries of a delta at random, scaled up so that its expectation stays.

    Source: DARE (Yu et al., 2024, arXiv:2311.03099).

    Args:
        delta: Of any shape.
        density: The chance of an entry to be kept, above 0 and up to 1; what is kept is divided by it.
        generator: What the draw is made from.

    Returns:
        The thinned delta.

    Raises:
        RecipeError: The density is out of its range.
    """
    import torch

    if not _density(density):
        raise RecipeError("a density of 0 leaves nothing of the delta.")
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float32) < density
    return torch.where(kept, delta / density, torch.zeros_like(delta))


def mask_agreement(delta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Keep what tuning changed in the direction in which the upgrade moved too, or where it did not move.

    Args:
        delta: Tuned minus old, of any shape.
        shift: New minus old base, of the same shape.

    Returns:
        The delta, with zero where its sign is opposite to the shift's.
    """
    import torch

    return torch.where(delta.sign() * shift.sign() < 0, torch.zeros_like(delta), delta)


def orthogonal_shift(delta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Take out of a delta what lies along the upgrade's own shift, so that it is not added twice.

    Args:
        delta: Tuned minus old, of any shape; taken as one vector.
        shift: New minus old base, of the same shape.

    Returns:
        The delta's part that is orthogonal to the shift, in the delta's dtype.
    """
    import torch

    x, y = delta.to(torch.float64), shift.to(torch.float64)
    along = y.square().sum()
    return (x - y * ((x * y).sum() / along)).to(delta.dtype) if along else delta.clone()


def _density(density: float) -> float:
    if not 0 <= density <= 1:
        raise RecipeError(f"a density is from 0 to 1, found {density}.")
    return density
