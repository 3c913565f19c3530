"""The delta of a tuned tensor, its graft onto another base, and the line between two tensors.

Source: Qin et al., Recyclable Tuning for Continual Pre-training, 2023 (arXiv:2305.08702), section 4; also known as task
arithmetic (Ilharco et al., 2023, arXiv:2212.04089).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def graft(new: torch.Tensor, tuned: torch.Tensor, old: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Add what tuning changed in an old tensor to the new one: new + scale · (tuned − old).

    Computed in float64 (float32 for 16-bit tensors) and rounded once, to the dtype of `tuned`. Where new and old
    are equal tensors and scale is 1 the result is `tuned` to the bit.

    Args:
        new: The upgraded base's tensor, of any shape.
        tuned: The tuned tensor, of the same shape.
        old: The old base's tensor, of the same shape.
        scale: The factor λ on the delta.

    Returns:
        The grafted tensor in the dtype of `tuned`.
    """
    import torch

    half = all(tensor.dtype.itemsize <= 2 for tensor in (new, tuned, old))
    wide = torch.float32 if half else torch.float64
    if scale == 1.0 and torch.equal(new, old):
        return tuned.clone()
    change = tuned.to(wide).sub_(old.to(wide)) if tuned.dtype != wide else torch.sub(tuned, old.to(wide))
    return (change if scale == 1.0 else change.mul_(scale)).add_(new.to(wide)).to(tuned.dtype)


def delta(tuned: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return what tuning changed: tuned − old.

    Args:
        tuned: The tuned tensor, of any shape.
        old: The old base's tensor, of the same shape.

    Returns:
        The delta in float32, or in float64 if one of the two is; 16-bit numbers are widened first, so that nothing
        of a small delta is rounded away.
    """
    import torch

    wide = torch.float64 if torch.float64 in (tuned.dtype, old.dtype) else torch.float32
    return torch.sub(tuned.to(wide), old.to(wide))


def interpolate(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    """Walk the straight line between two tensors: (1 − t)·first + t·second.

    Args:
        first: Where t is 0.
        second: Where t is 1, of the same shape.
        t: The place on the line.

    Returns:
        The tensor in the dtype of `first`, computed as `graft` is; at 0 and 1 it is the end to the bit.
    """
    import torch

    if t in (0.0, 1.0):
        return (second if t else first).to(first.dtype, copy=True)
    half = first.dtype.itemsize <= 2 and second.dtype.itemsize <= 2
    wide = torch.float32 if half else torch.float64
    return first.to(wide).mul(1 - t).add_(second.to(wide), alpha=t).to(first.dtype)
