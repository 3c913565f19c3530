"""Deltas that have the same effect on a new base's activations as on the old base's; and rotations of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    import torch


def match_effect(factor: torch.Tensor, cross: torch.Tensor, second_moment: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the delta D' whose effect on a layer of the new base is closest to the effect of D on the old base.

    D' minimises E‖D'·x_n − D·x_o‖² + λ·‖D' − D‖², where x_o and x_n are the layer's inputs in the old and the new base
    on the same tokens: D' = (D·C_on + λ·D)·(C_nn + λ·I)⁻¹. As λ goes to infinity, D' goes to D. If both bases have the
    same inputs, D' is D. This is a ridge regression per layer, similar to RegMean (Jin et al., 2023, arXiv:2212.09849).

    Args:
        factor: D, [k, in], which is applied to the input: a delta, or a LoRA's A.
        cross: C_on = E[x_o·x_nᵀ], [in, in].
        second_moment: C_nn = E[x_n·x_nᵀ], [in, in].
        ridge: λ relative to the mean of the diagonal of C_nn; above 0.

    Returns:
        D', [k, in], in the dtype of `factor`; computed in float64. D itself if the layer's inputs are zero.

    Raises:
        RecipeError: The ridge is not above 0.
    """
    import torch

    if not ridge > 0:
        raise RecipeError(f"the ridge must be above 0, found {ridge}.")
    if torch.equal(cross, second_moment):
        return factor.clone()
    d, c_on, c_nn = factor.double(), cross.double(), second_moment.double()
    damping = ridge * c_nn.diagonal().mean()
    if not damping > 0:  # the layer's inputs are zero
        return factor.clone()
    damped = c_nn + damping * torch.eye(len(c_nn), dtype=torch.float64, device=c_nn.device)
    matched: torch.Tensor = torch.linalg.solve(damped, (d @ c_on + damping * d).T).T  # C_nn is symmetric
    return matched.to(factor.dtype)


def rotation(cross: torch.Tensor, shrink: float) -> torch.Tensor:
    """Return the orthogonal map R from the old to the new base's activations, shrunk towards the identity.

    R minimises E‖R·x_o − x_n‖² for the activations x_o of the old and x_n of the new base on the same tokens. This is
    the orthogonal Procrustes problem (Schönemann, 1966): for C = E[x_n·x_oᵀ] = U·Σ·Vᵀ, R = U·Vᵀ. With
    shrinkage, C is replaced by (1 − s)·C/mean(Σ) + s·I, so that directions without activations are not rotated.

    Args:
        cross: C, [width, width], in float32 or float64.
        shrink: s, from 0 (none) to 1 (the identity).

    Returns:
        R, [width, width], computed in the dtype of `cross`.

    Raises:
        RecipeError: The shrinkage is not from 0 to 1.
    """
    import torch

    if not 0 <= shrink <= 1:
        raise RecipeError(f"the shrinkage must be from 0 to 1, found {shrink}.")
    identity = torch.eye(len(cross)).to(cross)
    if shrink == 1 or not cross.any():  # without activations, nothing determines a rotation
        return identity
    scale = torch.linalg.svdvals(cross.float()).mean() if shrink else 1.0
    u, _, vt = torch.linalg.svd((1 - shrink) * cross / scale + shrink * identity)
    orthogonal: torch.Tensor = u @ vt
    return orthogonal
