"""`init+distill`: start from the old weights, with the old tuned model as the teacher.

Source: Qin et al., 2023 (arXiv:2305.08702), section 5.2.
"""

from __future__ import annotations

from regraft.methods.method import Job, Method
from regraft.tuning.distill import Distillation


def run(job: Job, options: Distillation) -> list[dict[str, float]]:
    """Start where `direct` ends, and tune under the distillation loss.

    Args:
        job: What and where.
        options: The loss's weights.

    Returns:
        The learning curve.
    """
    return job.tune(job.grafted(), options)


METHOD = Method(
    "init+distill", "start from direct, with the old model as teacher", ("labels", "training"), run, Distillation
)
