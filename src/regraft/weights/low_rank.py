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
    """Return factors B and A whose product is the closest to a delta that their rank allows.

    By the singular value decomposition (Eckart and Young, 1936), in float64; it takes on the order of
    out · in · min(out, in) operations. With second moments of the layer's inputs, what is closest is the layer's
    output over these inputs: ‖(Δ − B·A)·C^½‖ is least, C = E[x·xᵀ].

    Args:
        delta: The change of a linear layer's weight, [out, in].
        rank: The rank to keep, cut to what the delta has; or
        energy: the share of the squared (weighted) norm to keep, 0 to 1; the smallest rank that has it is taken.
        second_moment: E[x²] of the layer's inputs, [in], or E[x·xᵀ], [in, in]; None to weigh all alike.

    Returns:
        B [out, r] and A [r, in], in the dtype of `delta` or float32 if that is narrower; r is at least 1.

    Raises:
        CheckpointError: The delta holds values that are infinite or not a number.
        RecipeError: Not one of rank and energy is given, or it is out of its range.
    """
    import torch

    if (rank is None) == (energy is None):
        raise RecipeError("give either a rank or the energy to keep.")
    if rank is not None and rank < 1:
        raise RecipeError(f"a rank is at least 1, found {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"the energy to keep is above 0 and at most 1, found {energy}.")
    change = delta.to(torch.float64)
    if not change.isfinite().all():
        raise CheckpointError("what is infinite or not a number has no approximation of a low rank.")
    forth, back = _roots(change.shape[1], second_moment, change)
    u, s, vt = torch.linalg.svd(change @ forth if second_moment is not None else change, full_matrices=False)
    if energy is not None:
        held = s.square().cumsum(0)
        rank = int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1
    kept = slice(0, min(rank or 1, len(s)))
    root = s[kept].sqrt()
    b, a = u[:, kept] * root, root[:, None] * vt[kept]
    wide = torch.float64 if delta.dtype == torch.float64 else torch.float32
    return b.to(wide), (a @ back if second_moment is not None else a).to(wide)


def _roots(width: int, second_moment: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the square root of the second moments and its inverse; directions that no input has are left as they are.

    Only what no input has is lost in a low rank that way, and a full rank gives the delta back.
    """
    import torch

    if second_moment is None:
        nothing = torch.empty(0)
        return nothing, nothing
    moments = second_moment.to(like)
    values, vectors = torch.linalg.eigh(torch.diag(moments) if moments.dim() == 1 else moments)
    smallest = values.max().clamp(min=0) * 1e-12
    roots = torch.where(values > smallest, values, smallest if smallest > 0 else torch.ones_like(smallest)).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
