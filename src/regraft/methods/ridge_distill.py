"""`ridge+distill`: tune on from old weights that were refitted to the new base, with the old model as the teacher."""

from __future__ import annotations

from regraft.methods.method import Job, Method
from regraft.methods.ridge import Ridge, refitted
from regraft.tuning.distill import Distillation


def run(job: Job, options: Distillation) -> list[dict[str, float]]:
    """Start where `ridge` ends, and tune under the distillation loss.

    Args:
        job: What and where.
        options: The loss's weights.

    Returns:
        The learning curve.
    """
    return job.tune(refitted(job, Ridge()), options)


METHOD = Method(
    "ridge+distill", "start from ridge, with the old model as teacher", ("labels", "training"), run, Distillation
)
