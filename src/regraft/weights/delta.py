"""The delta of a tuned tensor, its graft onto another base, and linear interpolation.

Source: Qin et al., Recyclable Tuning for Continual Pre-training, 2023 (arXiv:2305.08702), section 4. Adding deltas is
also known as task arithmetic (Ilharco et al., 2023, arXiv:2212.04089).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def graft(new: torch.Tensor, tuned: torch.Tensor, old: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Add the delta of a tuned tensor to the new base's tensor: new + scale · (tuned − old).

    The result is computed in float64 (float32 if all tensors have at most 16 bits), and rounded once to the dtype of
    `tuned`. If `new` equals `old` and the scale is 1, the result is bit-equal to `tuned`.

    Args:
        new: The upgraded base's tensor, of any shape.
        tuned: The tuned tensor, of the same shape.
        old: The old base's tensor, of the same shape.
        scale: The factor on the delta.

    Returns:
        The grafted tensor in the dtype of `tuned`.
    """
    import torch

    is_half = all(tensor.dtype.itemsize <= 2 for tensor in (new, tuned, old))
    dtype = torch.float32 if is_half else torch.float64
    if scale == 1.0 and torch.equal(new, old):
        return tuned.clone()
    change = tuned.to(dtype, copy=True).sub_(old.to(dtype))
    if scale != 1.0:
        change.mul_(scale)
    return change.add_(new.to(dtype)).to(tuned.dtype)


def delta(tuned: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return the delta of a tuned tensor: tuned − old.

    Args:
        tuned: The tuned tensor, of any shape.
        old: The old base's tensor, of the same shape.

    Returns:
        The delta in float32, or in float64 if either tensor is. Tensors are converted before the subtraction, so that
        small deltas of 16-bit tensors are not rounded.
    """
    import torch

    dtype = torch.float64 if torch.float64 in (tuned.dtype, old.dtype) else torch.float32
    return torch.sub(tuned.to(dtype), old.to(dtype))


def interpolate(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    """Interpolate linearly between two tensors: (1 − t)·first + t·second.

    Args:
        first: The tensor at t = 0.
        second: The tensor at t = 1, of the same shape.
        t: The coefficient of the second tensor; values outside 0 to 1 extrapolate.

    Returns:
        The tensor in the dtype of `first`, computed with the precision of `graft`. At t = 0 it is `first`, and at t = 1
        `second` in that dtype.
    """
    import torch

    if t == 0.0:
        return first.clone()
    if t == 1.0:
        return second.to(first.dtype, copy=True)
    is_half = first.dtype.itemsize <= 2 and second.dtype.itemsize <= 2
    dtype = torch.float32 if is_half else torch.float64
    return first.to(dtype).mul(1 - t).add_(second.to(dtype), alpha=t).to(first.dtype)
