"""`interpolation`: start from the old weights, and distil at points between student and teacher too.

Source: the reference implementation of Qin et al., 2023 (arXiv:2305.08702).
"""

from __future__ import annotations

from regraft.errors import KindError
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

    Raises:
        KindError: Student and teacher have other tokens in their rows, so that there is no line between them.
    """
    from regraft.adaptation.tokens import tuned_rows

    rows = tuned_rows(job.adaptation, job.upgrade)
    if rows is not None and rows.tuned_row != tuple(range(rows.tuned_rows)):
        raise KindError(
            f"{job.upgrade.old.path} and {job.upgrade.new.path} have other vocabularies, so there is no line from the "
            "teacher to the student, tensor by tensor. Take init+distill."
        )
    return job.tune(job.grafted(), options)


METHOD = Method(
    "interpolation",
    "start from direct, distil at points between student and teacher",
    ("labels", "training"),
    run,
    Interpolation,
)
