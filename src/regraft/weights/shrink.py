"""Reduced deltas: with fewer entries, without those that conflict with a direction, or without a shift."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    import torch


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the entries of a delta with the largest magnitudes, and set the others to zero.

    Source: the first step of TIES-Merging (Yadav et al., 2023, arXiv:2306.01708).

    Args:
        delta: The delta, of any shape.
        density: The share of entries to keep, 0 to 1. Of equal magnitudes, the first are kept.

    Returns:
        The trimmed delta, in the dtype and shape of `delta`.

    Raises:
        RecipeError: The density is not from 0 to 1.
    """
    import torch

    _check_density(density)
    flat = delta.flatten()
    largest = torch.sort(flat.abs(), descending=True, stable=True).indices[: round(density * delta.numel())]
    trimmed = torch.zeros_like(flat)
    trimmed[largest] = flat[largest]
    return trimmed.reshape(delta.shape)


def drop(delta: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Keep random entries of a delta, scaled so that its expectation does not change.

    Source: DARE (Yu et al., 2024, arXiv:2311.03099).

    Args:
        delta: The delta, of any shape.
        density: The probability of keeping an entry, above 0 and up to 1; kept entries are divided by it.
        generator: The random generator, on the CPU.

    Returns:
        The reduced delta, in the dtype and shape of `delta`.

    Raises:
        RecipeError: The density is not above 0 and up to 1.
    """
    import torch

    _check_density(density)
    if not density:
        raise RecipeError("a density must be above 0, found 0: no entry would be kept.")
    mask = torch.rand(delta.shape, generator=generator, dtype=torch.float32) < density
    return torch.where(mask, delta / density, torch.zeros_like(delta))


def mask_conflicts(delta: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Set entries of a delta to zero whose sign is opposite to the sign of a direction.

    Args:
        delta: Tuned − old, of any shape.
        direction: The direction, of the same shape, such as the negative gradient of a loss.
    """
    import torch

    return torch.where(delta.sign() * direction.sign() < 0, torch.zeros_like(delta), delta)


def orthogonal_part(delta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return the part of a delta that is orthogonal to the upgrade's shift, so that the shift is not added twice.

    Args:
        delta: Tuned − old, of any shape, considered as a vector.
        shift: New − old base, of the same shape.

    Returns:
        The orthogonal part, in the delta's dtype.
    """
    import torch

    x, y = delta.to(torch.float64), shift.to(torch.float64)
    squared_norm = y.square().sum()
    return (x - y * ((x * y).sum() / squared_norm)).to(delta.dtype) if squared_norm else delta.clone()


def _check_density(density: float) -> None:
    if not 0 <= density <= 1:
        raise RecipeError(f"a density must be from 0 to 1, found {density}.")
