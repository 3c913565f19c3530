"""`orthogonal`: the old delta without what lies along the upgrade's own shift.

What tuning and continual pre-training both changed would otherwise be added twice. A baseline of our own, after the
projections that keep merged task vectors from adding what they have in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.methods.method import Job, Method

if TYPE_CHECKING:
    import torch


def run(job: Job, options: Any) -> list[dict[str, float]]:
    """Take the component along the shift out of every tensor's delta.

    Args:
        job: What and where.
        options: None.

    Returns:
        No learning curve: nothing is trained.
    """
    from regraft.methods.reworked import graft_reworked
    from regraft.weights import orthogonal_shift

    def rule(_: str, delta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return orthogonal_shift(delta, shift)

    graft_reworked(job, rule)
    return []


METHOD = Method("orthogonal", "take out of the old delta what the upgrade itself changed", (), run)
