"""The best low-rank approximation of a delta."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    import torch


def low_rank(
    delta: torch.Tensor,
    rank: int | None = None,
    energy: float | None = None,
    second_moment: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors B and A whose product is the closest to a delta for their rank.

    They come from the singular value decomposition (Eckart and Young, 1936) in float64, which takes about
    out · in · min(out, in) operations. With second moments of the layer's inputs, they minimise the error of the
    layer's outputs for these inputs: ‖(Δ − B·A)·C^½‖, C = E[x·xᵀ].

    Args:
        delta: The delta of a linear layer's weight, [out, in].
        rank: The rank, at most that of the delta. Either this or `energy` is required.
        energy: The share of the squared (weighted) norm to preserve, 0 to 1, with the smallest sufficient rank.
        second_moment: E[x²] of the layer's inputs, [in], or E[x·xᵀ], [in, in]; None for equal weights.

    Returns:
        B [out, r] and A [r, in], in float64 if `delta` is, and else in float32; r is at least 1.

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
    root_moment, inverse_root = _moment_roots(second_moment, change)
    u, s, vt = torch.linalg.svd(change @ root_moment if second_moment is not None else change, full_matrices=False)
    if energy is not None:
        cumulative = s.square().cumsum(0)
        rank = int((cumulative < energy * cumulative[-1] * (1 - 1e-12)).sum()) + 1  # allow for rounding
    rank = min(rank or 1, len(s))
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * vt[:rank]
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    return b.to(dtype), (a @ inverse_root if second_moment is not None else a).to(dtype)


def _moment_roots(second_moment: torch.Tensor | None, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the square root of the second moments and its inverse.

    Directions without inputs get a tiny moment rather than none: a low rank drops them first, and a full rank
    reproduces the delta.
    """
    import torch

    if second_moment is None:
        unused = torch.empty(0)
        return unused, unused
    moments = second_moment.to(delta)
    values, vectors = torch.linalg.eigh(torch.diag(moments) if moments.dim() == 1 else moments)
    smallest = values.max().clamp(min=0) * 1e-12
    roots = torch.where(values > smallest, values, smallest if smallest > 0 else torch.ones_like(smallest)).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
