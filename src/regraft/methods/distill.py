"""`distill`: tune the new base from a fresh start with the old tuned model as its teacher.

Source: Qin et al., 2023 (arXiv:2305.08702), section 5.2 (distillation-based recyclable tuning).
"""

from __future__ import annotations

from regraft.methods.method import Job, Method
from regraft.tuning.distill import Distillation


def run(job: Job, options: Distillation) -> list[dict[str, float]]:
    """Tune from a fresh head under the distillation loss.

    Args:
        job: What and where.
        options: The loss's weights.

    Returns:
        The learning curve.
    """
    return job.tune(job.fresh(), options)


METHOD = Method(
    "distill", "tune from a fresh head with the old model as teacher", ("labels", "training"), run, Distillation
)
