"""A linear map from old to new weights, learned from a few pairs by means of their Gram matrices.

Given n pairs of vectors v → t, the W of rank up to d that minimises Σ‖v·W + b − t‖² + λ‖W‖² maps v to a sum Σ βᵢ·tᵢ, in
which β follows from inner products. This is ridge regression in its dual form, with a limited rank as in Mukherjee and
Zhu, 2011 (Statistical Analysis and Data Mining 4). Qin et al., 2023 (arXiv:2305.08702) learn a map of this form
by distillation instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    import torch

RELATIVE_EPSILON = 1e-12  # smaller eigenvalues are rounding errors of float64
"""The smallest eigenvalue that counts, relative to the largest squared norm, or to the largest eigenvalue."""


def project(
    gram: torch.Tensor,
    target_gram: torch.Tensor,
    cross: torch.Tensor,
    ridge: float,
    rank: int | None = None,
    *,
    intercept: bool = True,
) -> torch.Tensor:
    """Return the coefficients β of the mapped vector Σ βᵢ·tᵢ.

    Args:
        gram: The inner products ⟨vᵢ, vⱼ⟩ of the sources, [n, n].
        target_gram: The inner products ⟨tᵢ, tⱼ⟩ of the targets, [n, n].
        cross: The inner products ⟨vᵢ, v⟩ of the sources with the vector to map, [n].
        ridge: λ relative to the mean squared norm of the sources, 0 or more. The larger it is, the closer the map is
            to a constant: the mean of the targets, or 0 without an intercept.
        rank: d; None for the largest possible: n, or n − 1 with an intercept.
        intercept: Whether the map has the constant b. Then sources and targets are centred, and the β sum to 1.

    Returns:
        β, [n], in float64.

    Raises:
        RecipeError: The ridge is below 0, or the rank below 1.
    """
    import torch

    if ridge < 0:
        raise RecipeError(f"the ridge must be 0 or more, found {ridge}.")
    if rank is not None and rank < 1:
        raise RecipeError(f"a rank must be at least 1, found {rank}.")
    num_pairs = len(gram)
    k, t, c = gram.double(), target_gram.double(), cross.double()
    centre = torch.eye(num_pairs, dtype=torch.float64)
    if intercept:
        centre -= 1 / num_pairs
        c = centre @ (c - k.mean(dim=1))
        k, t = centre @ k @ centre, centre @ t @ centre
    all_values, all_vectors = torch.linalg.eigh((k + k.T) / 2)
    is_positive = all_values > RELATIVE_EPSILON * gram.double().diagonal().amax()
    values = all_values[is_positive]
    vectors = all_vectors[:, is_positive]
    damped = values + ridge * k.diagonal().mean()
    weights = vectors @ ((vectors.T @ c) / damped)
    if rank is not None and rank < len(values):
        scaled = vectors * (values / damped).sqrt()
        squares, directions = torch.linalg.eigh(scaled.T @ t @ scaled)
        leading = scaled @ directions[:, -rank:]
        smallest = RELATIVE_EPSILON * squares[-1].clamp(min=RELATIVE_EPSILON)
        weights = leading @ ((leading.T @ t @ weights) / squares[-rank:].clamp(min=smallest))
    beta: torch.Tensor = centre @ weights + (1 / num_pairs if intercept else 0)
    return beta


def leave_one_out_errors(
    gram: torch.Tensor, target_gram: torch.Tensor, ridge: float, rank: int | None = None, *, intercept: bool = True
) -> torch.Tensor:
    """Return the error of each pair under the map that is learned from all other pairs.

    Args:
        gram: The inner products of the sources, [n, n], of at least two pairs.
        target_gram: The inner products of the targets, [n, n].
        ridge: λ relative to the mean squared norm of the sources, 0 or more.
        rank: The maximal rank of the map; None for the largest possible.
        intercept: Whether the map has a constant.

    Returns:
        The squared distances of the mapped sources from their targets, [n], in float64.

    Raises:
        RecipeError: The ridge is below 0, or the rank below 1.
    """
    import torch

    errors = []
    for held_out in range(len(gram)):
        fitted = torch.as_tensor([pair for pair in range(len(gram)) if pair != held_out])
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
