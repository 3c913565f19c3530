"""The objectives that are a call: the labels, the old model as a teacher, and a penalty on leaving the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.errors import KindError
from regraft.methods.method import OLD_HEAD_ONLY, Objective
from regraft.tuning.anchor import Anchoring
from regraft.tuning.distill import Distillation
from regraft.tuning.interpolate import Interpolation

if TYPE_CHECKING:
    from regraft.methods.job import Job
    from regraft.methods.method import Curve

TRAINS_ON_LABELS = ("labels", "training")


def tune_on_labels(job: Job, model: Any, options: None) -> Curve:
    """Tune as usual, on the labels.

    Source: Qin et al., 2023 (arXiv:2305.08702), section 5.1 (initialization-based recyclable tuning).

    Args:
        job: What and where.
        model: What is tuned.
        options: None.

    Returns:
        The learning curve.
    """
    return job.tune(model)


def distil(job: Job, model: Any, options: Distillation) -> Curve:
    """Tune under the distillation loss, with the old tuned model as the teacher.

    Source: Qin et al., 2023 (arXiv:2305.08702), section 5.2 (distillation-based recyclable tuning).

    Args:
        job: What and where.
        model: What is tuned.
        options: The loss's weights.

    Returns:
        The learning curve.
    """
    return job.tune(model, options)


def distil_between(job: Job, model: Any, options: Interpolation) -> Curve:
    """Tune under the distillation loss, taken at several points of the line between student and teacher.

    Each point costs a step's time again.

    Source: the reference implementation of Qin et al., 2023 (arXiv:2305.08702).

    Args:
        job: What and where.
        model: What is tuned.
        options: The loss's weights, and the points.

    Returns:
        The learning curve.

    Raises:
        KindError: Student and teacher have other tokens in their rows, so that there is no line between them.
    """
    rows = job.rows
    if rows is not None and rows.tuned_row_indices != tuple(range(rows.num_tuned_rows)):
        raise KindError(
            f"{job.upgrade.old.path} and {job.upgrade.new.path} have other vocabularies, so there is no line from the "
            "teacher to the student, tensor by tensor. Take init+distill."
        )
    return job.tune(model, options)


def tune_anchored(job: Job, model: Any, options: Anchoring) -> Curve:
    """Tune as usual plus a penalty on leaving the start, which fades.

    Source: the penalty is Xuhong et al.'s L2-SP (arXiv:1802.01483) or Kirkpatrick et al.'s (arXiv:1612.00796), here
    fading away.

    Args:
        job: What and where.
        model: What is tuned.
        options: How strong the penalty is, and how it fades.

    Returns:
        The learning curve.
    """
    return job.tune(model, anchor=options)


LABELS = Objective("labels", tune_on_labels, summary="then tune as usual", needs=TRAINS_ON_LABELS)
DISTILL = Objective(
    "distill",
    distil,
    Distillation,
    summary="with the old model as teacher",
    needs=TRAINS_ON_LABELS,
    heads=OLD_HEAD_ONLY,
)
INTERPOLATION = Objective(
    "interpolation",
    distil_between,
    Interpolation,
    summary="distil at points between student and teacher",
    needs=TRAINS_ON_LABELS,
    heads=OLD_HEAD_ONLY,
)
ANCHORED = Objective(
    "anchored", tune_anchored, Anchoring, summary="held to it by a penalty that fades", needs=TRAINS_ON_LABELS
)
