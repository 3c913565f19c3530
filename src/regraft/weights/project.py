"""A linear map from old to new weights, learned from a few pairs by means of their Gram matrices.

Given n pairs of vectors v → t, the W of rank up to d that minimises Σ‖v·W + b − t‖² + λ‖W‖² maps v to a sum Σ βᵢ·tᵢ, in
which β follows from inner products. This is ridge regression in its dual form, with a limited rank as in Mukherjee and
Zhu, 2011 (Statistical Analysis and Data Mining 4). The map is that of Qin et al., 2023 (arXiv:2305.08702), who learn it
by distillation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    import torch

RELATIVE_EPSILON = 1e-12  # smaller eigenvalues are rounding errors of float64


def project(
    gram: torch.Tensor,
    target_gram: torch.Tensor,
    cross: torch.Tensor,
    ridge: float,
    rank: int | None = None,
    *,
    intercept: bool = True,
) -> torch.Tensor:
    """Return the β with which the map takes a vector v to Σ βᵢ·tᵢ.

    Args:
        gram: The inner products ⟨vᵢ, vⱼ⟩ of the sources, [n, n].
        target_gram: The inner products ⟨tᵢ, tⱼ⟩ of the targets, [n, n].
        cross: The inner products ⟨vᵢ, v⟩, [n].
        ridge: λ relative to the mean square of the sources, 0 or more. As it grows, the map goes to b alone.
        rank: d; None for the largest possible: n, or n − 1 with an intercept.
        intercept: Whether there is a b. Then sources and targets are centred, and the β sum to 1.

    Returns:
        β, [n], in float64.

    Raises:
        RecipeError: The ridge or the rank is out of range.
    """
    import torch

    if ridge < 0 or (rank is not None and rank < 1):
        raise RecipeError(f"the ridge must be at least 0 (found {ridge}), the rank at least 1 ({rank}).")
    count = len(gram)
    k, t, c = gram.double(), target_gram.double(), cross.double()
    centre = torch.eye(count, dtype=torch.float64)
    if intercept:
        centre -= 1 / count
        c = centre @ (c - k.mean(dim=1))
        k, t = centre @ k @ centre, centre @ t @ centre
    values, vectors = torch.linalg.eigh((k + k.T) / 2)
    is_positive = values > RELATIVE_EPSILON * gram.double().diagonal().amax()
    values = values[is_positive]
    vectors = vectors[:, is_positive]
    damped = values + ridge * k.diagonal().mean()
    weights = vectors @ ((vectors.T @ c) / damped)
    if rank is not None and rank < len(values):
        scaled = vectors * (values / damped).sqrt()
        squares, directions = torch.linalg.eigh(scaled.T @ t @ scaled)
        leading = scaled @ directions[:, -rank:]
        floor = RELATIVE_EPSILON * squares[-1].clamp(min=RELATIVE_EPSILON)
        weights = leading @ ((leading.T @ t @ weights) / squares[-rank:].clamp(min=floor))
    beta: torch.Tensor = centre @ weights + (1 / count if intercept else 0)
    return beta


def leave_one_out_errors(
    gram: torch.Tensor, target_gram: torch.Tensor, ridge: float, rank: int | None = None, *, intercept: bool = True
) -> torch.Tensor:
    """Return for each pair the error of the map that is learned from the other pairs.

    Args:
        gram: The inner products of the sources, [n, n], of at least two pairs.
        target_gram: The inner products of the targets, [n, n].
        ridge: As in `project`.
        rank: As in `project`.
        intercept: As in `project`.

    Returns:
        The squared distances from the targets, [n], in float64.
    """
    import torch

    errors = []
    for held_out in range(len(gram)):
        fitted = torch.as_tensor([i for i in range(len(gram)) if i != held_out])
        coefficients = -torch.eye(len(gram), dtype=torch.float64)[held_out]
        coefficients[fitted] = project(
            gram[fitted][:, fitted],
            target_gram[fitted][:, fitted],
            gram[fitted, held_out],
            ridge,
            rank,
            intercept=intercept,
        )
        errors.append(coefficients @ target_gram.double() @ coefficients)
    return torch.stack(errors).clamp(min=0)
