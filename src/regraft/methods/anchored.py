"""`anchored`: tune on from the old weights, held to them at first.

Source: the start is that of Qin et al., 2023 (arXiv:2305.08702), section 5.1; the penalty Xuhong et al.'s L2-SP
(arXiv:1802.01483) or Kirkpatrick et al.'s (arXiv:1612.00796), here fading away.
"""

from __future__ import annotations

from regraft.methods.method import Job, Method
from regraft.tuning.anchor import Anchored


def run(job: Job, options: Anchored) -> list[dict[str, float]]:
    """Start where `direct` ends, and tune as usual plus a penalty on leaving it, which fades.

    Args:
        job: What and where.
        options: How strong the penalty is, and how it fades.

    Returns:
        The learning curve.
    """
    return job.tune(job.grafted(), anchor=options)


METHOD = Method(
    "anchored", "start from direct, held to it by a penalty that fades", ("labels", "training"), run, Anchored
)
