"""`init`: tune on from the old weights.

Source: Qin et al., 2023 (arXiv:2305.08702), section 5.1 (initialization-based recyclable tuning).
"""

from __future__ import annotations

from typing import Any

from regraft.methods.method import Job, Method


def run(job: Job, options: Any) -> list[dict[str, float]]:
    """Start where `direct` ends, and tune as usual.

    Args:
        job: What and where.
        options: None.

    Returns:
        The learning curve.
    """
    return job.tune(job.grafted())


METHOD = Method("init", "start from direct, then tune as usual", ("labels", "training"), run)
