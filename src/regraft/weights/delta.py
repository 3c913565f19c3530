"""The delta of a tuned tensor, and its graft onto another base.

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
