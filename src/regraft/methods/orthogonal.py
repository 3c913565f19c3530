"""`orthogonal`: the old delta without its component along the upgrade's shift.

Changes that tuning and continual pre-training have in common would otherwise be added twice.

Source: our own baseline, after the projections that remove common components of merged task vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.methods.method import Start

if TYPE_CHECKING:
    import torch

    from regraft.methods.job import Job


def graft_orthogonal(job: Job, options: None) -> None:
    """Remove the component along the upgrade's shift, which is new − old base, from the delta of every tensor.

    For a LoRA, this is done to the dense delta, which is then compressed to the LoRA's rank.

    Args:
        job: The job, with an adaptation that has deltas.
        options: None, since the start has no options.

    Raises:
        KindError: The adaptation's kind has no deltas.
    """
    from regraft.weights import orthogonal_part

    def rule(_name: str, delta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return orthogonal_part(delta, shift)

    job.graft_transformed(rule)


ORTHOGONAL = Start(
    "orthogonal", graft_orthogonal, summary="remove the old delta's component along the upgrade's own shift"
)
