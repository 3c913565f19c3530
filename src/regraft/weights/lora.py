"""A LoRA as tensors: the change scaling · B · A, worked on without forming B · A wherever that is possible.

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
        rank: r.
        alpha: PEFT's `lora_alpha`.
        rank_stabilised: Whether it is rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732): alpha / √r rather than alpha / r.

    Returns:
        The factor.
    """
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def lora_delta(b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """Form the change of the weight.

    Args:
        b: [out, r].
        a: [r, in].
        scale: From `scaling`.

    Returns:
        scale · B · A, [out, in], in float64.
    """
    return scale * (b.double() @ a.double())


def compress_factors(
    b: torch.Tensor, a: torch.Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the closest factors of a lower rank: QR of both, and the SVD of a core of the size of their rank.

    Args:
        b: [out, r].
        a: [r, in].
        rank: The rank to keep; or
        energy: the share of the squared norm to keep.

    Returns:
        New factors B [out, r'] and A [r', in], in float32 or float64 as `b` is.
    """
    (qb, rb), (qa, ra) = _qr(b), _qr(a.T)
    left, right = low_rank(rb @ ra.T, rank, energy)
    wide = b.dtype if b.dtype.itemsize == 8 else None
    result = qb @ left, right @ qa.T
    return result if wide else (result[0].float(), result[1].float())


def add_factors(first: Factors, second: Factors) -> Factors:
    """Add two changes exactly: their factors side by side.

    Args:
        first: B [out, r] and A [r, in].
        second: B [out, s] and A [s, in].

    Returns:
        B [out, r + s] and A [r + s, in].
    """
    import torch

    return torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]], dim=0)


def inner_product(first: Factors, second: Factors) -> float:
    """Return the inner product of two changes, from products of the size of their ranks.

    Args:
        first: B [out, r] and A [r, in].
        second: B [out, s] and A [s, in].

    Returns:
        The sum over all entries of (B·A) ∘ (B'·A'); of a change with itself, its squared norm.
    """
    (b, a), (c, d) = first, second
    return float(((b.double().T @ c.double()) * (a.double() @ d.double().T)).sum())


def subtract_factors(trained: Factors, start: Factors) -> Factors:
    """Return the true change against the original base of an adapter whose start was taken out of its base.

    PiSSA and OLoRA begin with factors B₀·A₀ of the weight itself and subtract these from the base, so the change is
    B·A − B₀·A₀. Source: Meng et al., 2024 (arXiv:2404.02948), appendix.

    Args:
        trained: B and A after tuning.
        start: B₀ and A₀, as they were initialised.

    Returns:
        Factors of twice the rank, to be used on the original base with the same scaling.
    """
    return add_factors(trained, (-start[0], start[1]))


def dora_weight(
    weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """Merge a DoRA into its weight: the direction of W + scale · B · A, at the learned length of each row.

    Source: Liu et al., 2024 (arXiv:2402.09353).

    Args:
        weight: [out, in].
        b: [out, r].
        a: [r, in].
        scale: From `scaling`.
        magnitude: [out].

    Returns:
        The merged weight, [out, in], in float64.
    """
    moved = weight.double() + lora_delta(b, a, scale)
    lengths = moved.norm(dim=1, keepdim=True)
    merged: torch.Tensor = magnitude.double().reshape(-1, 1) * moved / lengths
    return merged


def merge_experts(
    weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, turned: bool = False
) -> torch.Tensor:
    """Merge a LoRA into the weights of all experts of a layer, expert by expert.

    Args:
        weight: [experts, out, in].
        b: [out, r · experts], a rank's experts side by side, as PEFT keeps them.
        a: [r · experts, in], an expert's ranks one under the other.
        scale: From `scaling`.
        turned: Whether the weight is [experts, in, out].

    Returns:
        The merged weights, in the shape and dtype of `weight`.
    """
    import torch

    of_b = b.reshape(len(b), -1, len(weight))
    of_a = a.reshape(len(weight), -1, a.shape[1])
    merged = torch.empty_like(weight)
    for expert in range(len(weight)):
        change = lora_delta(of_b[:, :, expert], of_a[expert], scale)
        merged[expert] = weight[expert].double() + (change.T if turned else change)
    return merged


def _qr(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    q, r = torch.linalg.qr(matrix.double())
    return q, r
