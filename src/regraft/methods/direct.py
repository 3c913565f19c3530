"""`direct`: the old weights on the new base as they are.

Source: Qin et al., 2023 (arXiv:2305.08702), section 4.1: θ = M_new + (θ_old − M_old), or the old adapter unchanged.
"""

from __future__ import annotations

from typing import Any

from regraft.methods.method import Job, Method


def run(job: Job, options: Any) -> list[dict[str, float]]:
    """Graft the old delta onto the new base and copy the head.

    Args:
        job: What and where.
        options: None.

    Returns:
        No learning curve: nothing is trained.
    """
    job.graft(job.into)
    return []


METHOD = Method("direct", "put the old delta or adapter on the new base, no tuning", (), run)
