"""`ridge+init`: tune on from old weights that were refitted to the new base."""

from __future__ import annotations

from regraft.methods.method import Job, Method
from regraft.methods.ridge import Ridge, refitted


def run(job: Job, options: Ridge) -> list[dict[str, float]]:
    """Start where `ridge` ends, and tune as usual.

    Args:
        job: What and where.
        options: Those of `ridge`.

    Returns:
        The learning curve.
    """
    return job.tune(refitted(job, options))


METHOD = Method("ridge+init", "start from ridge, then tune as usual", ("labels", "training"), run, Ridge)
