"""`orthogonal`: the old delta without what lies along the upgrade's own shift.

What tuning and continual pre-training both changed would otherwise be added twice. A baseline of our own, after the
projections that keep merged task vectors from adding what they have in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.methods.method import Start

if TYPE_CHECKING:
    import torch

    from regraft.methods.job import Job


def graft_orthogonal(job: Job, options: None) -> None:
    """Take the component along the shift out of every tensor's delta.

    Args:
        job: What and where.
        options: None.
    """
    from regraft.weights import orthogonal_shift

    def rule(_: str, delta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return orthogonal_shift(delta, shift)

    job.graft_transformed(rule)


ORTHOGONAL = Start("orthogonal", graft_orthogonal, summary="take out of the old delta what the upgrade itself changed")
