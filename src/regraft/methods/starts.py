"""`scratch` and `direct`: the new base without old weights, and with the old delta or adapter unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.methods.method import Start

if TYPE_CHECKING:
    from regraft.methods.job import Job


def start_fresh(job: Job, options: None) -> Any:
    """Return the new base with a fresh head, and with a fresh adapter if the old weights are an adapter.

    Args:
        job: The job, of whose adaptation only the kind and the config are used.
        options: None, since the start has no options.

    Returns:
        The model, ready for tuning.
    """
    return job.build_fresh_model()


def graft(job: Job, options: None) -> None:
    """Graft the old delta onto the new base, or put the old adapter on it; the head is copied by default.

    Source: Qin et al., 2023 (arXiv:2305.08702), section 4.1: θ_new = M_new + (θ_old − M_old), where M are the weights
    of a base and θ the weights tuned from it; or the old adapter unchanged.

    Args:
        job: The job, with the adaptation to graft.
        options: None, since the start has no options.
    """
    job.graft()


SCRATCH = Start("scratch", start_fresh, summary="put a fresh head on the new base")
DIRECT = Start("direct", graft, summary="put the old delta or adapter on the new base, no tuning")
