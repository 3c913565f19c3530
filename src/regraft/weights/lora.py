"""Arithmetic on the factors of LoRAs, whose delta is scaling · B · A, mostly without forming B · A.

B is [out, r] and A is [r, in]. Source: Hu et al., 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from regraft.weights.low_rank import low_rank

if TYPE_CHECKING:
    import torch

    Factors = tuple[torch.Tensor, torch.Tensor]


def scaling(rank: int, alpha: float, rank_stabilised: bool = False) -> float:
    """Return the factor on B · A.

    Args:
        rank: The rank r, above 0.
        alpha: PEFT's `lora_alpha`.
        rank_stabilised: Whether the LoRA is an rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732), whose factor is
            alpha / √r rather than alpha / r.
    """
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def lora_delta(b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the dense delta of a LoRA.

    Args:
        b: The factor B, [out, r].
        a: The factor A, [r, in].
        scale: The result of `scaling`.

    Returns:
        scale · B · A, [out, in], in float64.
    """
    return scale * (b.double() @ a.double())


def compress_factors(
    b: torch.Tensor, a: torch.Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the closest factors of a lower rank, by QR of both factors and the SVD of a small core.

    Args:
        b: The factor B, [out, r].
        a: The factor A, [r, in].
        rank: The maximal new rank r'. Either this or `energy` is required.
        energy: The share of the squared norm to preserve, above 0 and up to 1.

    Returns:
        B [out, r'] and A [r', in], in float64 if `b` is in float64, and otherwise in float32.

    Raises:
        CheckpointError: A factor has infinite or NaN values.
        RecipeError: Both or neither of rank and energy are set, or one is out of range.
    """
    (qb, rb), (qa, ra) = _qr(b), _qr(a.T)
    small_b, small_a = low_rank(rb @ ra.T, rank, energy)
    compressed_b, compressed_a = qb @ small_b, small_a @ qa.T
    return (compressed_b, compressed_a) if b.dtype.itemsize == 8 else (compressed_b.float(), compressed_a.float())


def add_factors(first: Factors, second: Factors) -> Factors:
    """Return factors of the sum of two deltas, by concatenating the factors of both.

    Args:
        first: The factors B [out, r] and A [r, in].
        second: The factors B [out, s] and A [s, in].

    Returns:
        B [out, r + s] and A [r + s, in].
    """
    import torch

    return torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]], dim=0)


def inner_product(first: Factors, second: Factors) -> float:
    """Return the inner product of two deltas without forming them, from products of shape [r, s].

    Args:
        first: The factors B [out, r] and A [r, in].
        second: The factors B [out, s] and A [s, in].

    Returns:
        The sum over all entries of (B₁·A₁) ∘ (B₂·A₂); for a delta with itself, the squared norm.
    """
    (b1, a1), (b2, a2) = first, second
    return float(((b1.double().T @ b2.double()) * (a1.double() @ a2.double().T)).sum())


def subtract_factors(trained: Factors, start: Factors) -> Factors:
    """Return factors of the delta to the original base of a LoRA that was initialised from that base's weight.

    PiSSA and OLoRA start with factors B₀ and A₀ of the weight itself, and subtract their product from the base, so
    the delta is scaling · (B·A − B₀·A₀). Source: Meng et al., 2024 (arXiv:2404.02948), appendix.

    Args:
        trained: B and A after tuning.
        start: The initial factors, B₀ and A₀.

    Returns:
        B and A of twice the rank, for the original base and the same scaling.
    """
    return add_factors(trained, (-start[0], start[1]))


def dora_weight(
    weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """Merge a DoRA into its weight: the direction of W + scale · B · A, with the learned norm of each row.

    Source: Liu et al., 2024 (arXiv:2402.09353).

    Args:
        weight: The weight W, [out, in].
        b: The factor B, [out, r].
        a: The factor A, [r, in].
        scale: The result of `scaling`.
        magnitude: The learned norms, [out].

    Returns:
        The merged weight, [out, in], in float64.
    """
    tuned = weight.double() + lora_delta(b, a, scale)
    norms = tuned.norm(dim=1, keepdim=True)
    merged: torch.Tensor = magnitude.double().reshape(-1, 1) * tuned / norms
    return merged


def merge_experts(
    weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, transposed: bool = False
) -> torch.Tensor:
    """Merge a LoRA into the fused weights of a layer's experts.

    Args:
        weight: The fused weights, [experts, out, in].
        b: The factors B, [out, r · experts], in PEFT's layout, where the expert varies fastest.
        a: The factors A, [r · experts, in], in PEFT's layout, where the rank varies fastest.
        scale: The result of `scaling`.
        transposed: Whether the weight is [experts, in, out].

    Returns:
        The merged weights, in the shape and dtype of `weight`.
    """
    import torch

    expert_b = b.reshape(len(b), -1, len(weight))
    expert_a = a.reshape(len(weight), -1, a.shape[1])
    merged = torch.empty_like(weight)
    for expert in range(len(weight)):
        change = lora_delta(expert_b[:, :, expert], expert_a[expert], scale)
        merged[expert] = weight[expert].double() + (change.T if transposed else change)
    return merged


def _qr(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    q, r = torch.linalg.qr(matrix.double())
    return q, r
