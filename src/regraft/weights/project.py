"""A linear map from outdated to upgraded weights, learned from a few pairs: in their Gram matrices alone.

With n pairs of vectors v → t in a space of any size, W with the least Σ‖v·W + b − t‖² + λ‖W‖² of a rank up to d maps v
to a sum Σ βᵢ·tᵢ, and β follows from inner products. Ridge regression in its dual form; a limited rank as in Mukherjee
and Zhu, 2011 (Statistical Analysis and Data Mining 4). The map is that of Qin et al., 2023 (arXiv:2305.08702), which
learn it by distillation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    import torch

SMALLEST = 1e-12


def project(
    gram: torch.Tensor,
    target_gram: torch.Tensor,
    cross: torch.Tensor,
    ridge: float,
    rank: int | None = None,
    *,
    intercept: bool = True,
) -> torch.Tensor:
    """Return β such that the map takes a vector v to Σ βᵢ·tᵢ.

    Args:
        gram: The inner products ⟨vᵢ, vⱼ⟩ of what is mapped, [n, n].
        target_gram: ⟨tᵢ, tⱼ⟩ of what it is mapped to, [n, n].
        cross: ⟨vᵢ, v⟩, [n].
        ridge: λ in units of the mean square of the vectors, 0 or more. As it grows the map goes to b alone.
        rank: d; None for what the pairs allow: n, or n − 1 with an intercept.
        intercept: Whether there is a b: then vectors and targets are centred, and the β sum to 1.

    Returns:
        β, [n], in float64.

    Raises:
        RecipeError: The ridge or the rank is out of its range.
    """
    import torch

    if ridge < 0 or (rank is not None and rank < 1):
        raise RecipeError(f"the ridge is 0 or more (found {ridge}), the rank 1 or more ({rank}).")
    count = len(gram)
    k, t, c = gram.double(), target_gram.double(), cross.double()
    centre = torch.eye(count, dtype=torch.float64)
    if intercept:
        centre -= 1 / count
        c = centre @ (c - k.mean(dim=1))
        k, t = centre @ k @ centre, centre @ t @ centre
    values, vectors = torch.linalg.eigh((k + k.T) / 2)
    there = values > SMALLEST * gram.double().diagonal().amax()
    values, vectors = values[there], vectors[:, there]
    damped = values + ridge * k.diagonal().mean()
    weights = vectors @ ((vectors.T @ c) / damped)
    if rank is not None and rank < len(values):
        half = vectors * (values / damped).sqrt()
        squares, turns = torch.linalg.eigh(half.T @ t @ half)
        kept = half @ turns[:, -rank:]
        weights = kept @ (
            (kept.T @ t @ weights) / squares[-rank:].clamp(min=SMALLEST * squares[-1].clamp(min=SMALLEST))
        )
    found: torch.Tensor = centre @ weights + (1 / count if intercept else 0)
    return found


def leave_one_out_errors(
    gram: torch.Tensor, target_gram: torch.Tensor, ridge: float, rank: int | None = None, *, intercept: bool = True
) -> torch.Tensor:
    """Measure for each pair how far the map that the others teach leaves its target.

    Args:
        gram: ⟨vᵢ, vⱼ⟩, [n, n], of two pairs at least.
        target_gram: ⟨tᵢ, tⱼ⟩, [n, n].
        ridge: As in `project`.
        rank: As in `project`.
        intercept: As in `project`.

    Returns:
        The squared distances, [n], in float64.
    """
    import torch

    errors = []
    for out in range(len(gram)):
        rest = [i for i in range(len(gram)) if i != out]
        within = torch.as_tensor(rest)
        miss = -torch.eye(len(gram), dtype=torch.float64)[out]
        miss[rest] = project(
            gram[within][:, within], target_gram[within][:, within], gram[rest, out], ridge, rank, intercept=intercept
        )
        errors.append(miss @ target_gram.double() @ miss)
    return torch.stack(errors).clamp(min=0)
