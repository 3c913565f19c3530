"""Where models run, and in which precision."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def device() -> torch.device:
    """Return where models run.

    Returns:
        The accelerator if there is one, else the CPU.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def autocast(precision: str, on: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute in bfloat16 where that was asked for.

    Args:
        precision: `bf16` or `fp32`.
        on: The device.

    Returns:
        A context manager.
    """
    import torch

    return torch.autocast(on.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
