"""`scratch`: the usual practice, and the reference of every figure."""

from __future__ import annotations

from typing import Any

from regraft.methods.method import Job, Method


def run(job: Job, options: Any) -> list[dict[str, float]]:
    """Tune the new base with a fresh head, as if there were no old weights.

    Args:
        job: What and where.
        options: None.

    Returns:
        The learning curve.
    """
    return job.tune(job.fresh())


METHOD = Method("scratch", "tune the new base from a fresh head: the reference", ("labels", "training"), run)
