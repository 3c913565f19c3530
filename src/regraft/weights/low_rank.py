"""The best low-rank approximation of a delta."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    import torch

RELATIVE_EPSILON = 1e-12  # smaller differences and eigenvalues are rounding errors of float64
"""The smallest relative difference of energies, and the smallest eigenvalue relative to the largest, that count."""


def low_rank(
    delta: torch.Tensor,
    rank: int | None = None,
    energy: float | None = None,
    second_moment: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors B and A whose product is the closest to a delta for their rank.

    The factors come from the singular value decomposition (Eckart and Young, 1936) in float64, which takes about
    out · in · min(out, in) operations. With second moments C = E[x·xᵀ] of the layer's inputs, they minimise the
    error of the layer's outputs for these inputs: ‖(Δ − B·A)·C^½‖.

    Args:
        delta: The delta of a linear layer's weight, [out, in].
        rank: The maximal rank, 1 or more. Either this or `energy` is required.
        energy: The share of the squared (weighted) norm to preserve, above 0 and up to 1, with the smallest sufficient
            rank.
        second_moment: E[x²] of the layer's inputs, [in], or E[x·xᵀ], [in, in]; None for equal weights.

    Returns:
        B [out, r] and A [r, in], in float64 if `delta` is in float64, and otherwise in float32; r is at least 1.

    Raises:
        CheckpointError: The delta has infinite or NaN values.
        RecipeError: Both or neither of rank and energy are set, or one is out of range.
    """
    import torch

    if (rank is None) == (energy is None):
        raise RecipeError("set either a rank or the energy to preserve.")
    if rank is not None and rank < 1:
        raise RecipeError(f"a rank must be at least 1, found {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"the energy to preserve must be above 0 and at most 1, found {energy}.")
    change = delta.to(torch.float64)
    if not change.isfinite().all():
        raise CheckpointError("a delta with infinite or NaN values has no low-rank approximation.")
    if second_moment is None:
        b, a = _truncated_svd(change, rank, energy)
    else:
        root_moment, inverse_root = _moment_roots(second_moment.to(change))
        b, weighted_a = _truncated_svd(change @ root_moment, rank, energy)
        a = weighted_a @ inverse_root
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    return b.to(dtype), a.to(dtype)


def _truncated_svd(matrix: torch.Tensor, rank: int | None, energy: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leading singular vectors, both scaled by the roots of the singular values."""
    import torch

    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    if energy is not None:
        cumulative = s.square().cumsum(0)
        rank = int((cumulative < energy * cumulative[-1] * (1 - RELATIVE_EPSILON)).sum()) + 1
    assert rank is not None  # either the rank or the energy is set
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _moment_roots(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the square root of the second moments and its inverse, [in, in].

    A direction without inputs gets a tiny moment rather than none: a low rank drops it first, and a full rank
    reproduces the delta.
    """
    import torch

    values, vectors = torch.linalg.eigh(torch.diag(moments) if moments.dim() == 1 else moments)
    smallest = values.max().clamp(min=0) * RELATIVE_EPSILON
    roots = torch.where(values > smallest, values, smallest if smallest > 0 else torch.ones_like(smallest)).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
