"""`interpolation`: start from the old weights, and distil at points between student and teacher too.

Source: the reference implementation of Qin et al., 2023 (arXiv:2305.08702).
"""

from __future__ import annotations

from regraft.methods.method import Job, Method
from regraft.tuning.interpolate import Interpolation


def run(job: Job, options: Interpolation) -> list[dict[str, float]]:
    """Start where `direct` ends, and tune under the distillation loss taken at several points of the line.

    Each point costs a step's time again.

    Args:
        job: What and where.
        options: The loss's weights, and the points.

    Returns:
        The learning curve.
    """
    return job.tune(job.grafted(), options)


METHOD = Method(
    "interpolation",
    "start from direct, distil at points between student and teacher",
    ("labels", "training"),
    run,
    Interpolation,
)
