"""The device that models run on, and the precision that they compute in."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def device() -> torch.device:
    """Return the device to run models on: the accelerator if there is one, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def deploy(model: nn.Module, precision: str) -> Any:
    """Move a model to the device, in a dtype that it can compute in.

    Args:
        model: The model, which is modified.
        precision: `fp32` to convert weights that are stored in bfloat16 to float32; `bf16` to leave them.
    """
    import torch

    if precision == "fp32" and any(tensor.dtype == torch.bfloat16 for tensor in model.parameters()):
        model.float()
    return model.to(device())


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager inside which models compute in a precision.

    Args:
        precision: `bf16` to compute in bfloat16 the operations that autocast to it, or `fp32` for no autocast.
        device: The device of the computation.
    """
    import torch

    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
