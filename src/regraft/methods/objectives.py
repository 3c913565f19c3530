"""Objectives: labels, distillation from the old model, and a penalty on the distance from the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.errors import KindError
from regraft.methods.method import OLD_HEAD_ONLY, Objective
from regraft.tuning.anchor import Anchoring
from regraft.tuning.distill import Distillation
from regraft.tuning.interpolate import Interpolation

if TYPE_CHECKING:
    from torch import nn

    from regraft.methods.job import Job
    from regraft.methods.method import Curve

NEEDS_LABELS = ("labels", "training")


def tune_on_labels(job: Job, model: nn.Module, options: None) -> Curve:
    """Tune on the labels, without a teacher.

    Source: Qin et al., 2023 (arXiv:2305.08702), section 5.1 (initialization-based recyclable tuning).

    Args:
        job: The job, with the task's labelled examples.
        model: The model to tune, which the start returned.
        options: None, since the objective has no options.

    Returns:
        The learning curve.
    """
    return job.tune(model)


def distil(job: Job, model: nn.Module, options: Distillation) -> Curve:
    """Tune on the distillation loss, with the old model as the teacher.

    Args:
        job: The job, with the task's labelled examples.
        model: The model to tune, which the start returned.
        options: The weights of the loss's terms.

    Returns:
        The learning curve.
    """
    return job.tune(model, options)


def distil_between(job: Job, model: nn.Module, options: Interpolation) -> Curve:
    """Tune on the distillation loss at several points of the line between the student's and the teacher's weights.

    Each point costs as much time as a step of plain distillation.

    Source: the reference implementation of Qin et al., 2023 (arXiv:2305.08702).

    Args:
        job: The job, with the task's labelled examples.
        model: The model to tune, which the start returned.
        options: The weights of the loss's terms, and the points.

    Returns:
        The learning curve.

    Raises:
        KindError: The embedding rows of student and teacher stand for different tokens, so that no line joins the two.
    """
    match = job.row_match
    if match is not None and match.tuned_row_indices != tuple(range(match.num_tuned_rows)):
        raise KindError(
            f"{job.upgrade.old.path} and {job.upgrade.new.path} have different vocabularies, so there is no line "
            "from the teacher's weights to the student's. Use init+distill."
        )
    return job.tune(model, options)


def tune_anchored(job: Job, model: nn.Module, options: Anchoring) -> Curve:
    """Tune on the labels, with a penalty on the distance from the starting weights; by default the penalty decays.

    Source: the penalty is L2-SP (Li et al., 2018, arXiv:1802.01483) or EWC (Kirkpatrick et al., 2017,
    arXiv:1612.00796); the decay is our own.

    Args:
        job: The job, with the task's labelled examples.
        model: The model to tune, which the start returned.
        options: The strength, the weighting and the decay of the penalty.

    Returns:
        The learning curve.
    """
    return job.tune(model, anchor=options)


LABELS = Objective("labels", tune_on_labels, summary="then tune as usual", needs=NEEDS_LABELS)
DISTILL = Objective(
    "distill",
    distil,
    Distillation,
    summary="with the old model as teacher",
    needs=NEEDS_LABELS,
    heads=OLD_HEAD_ONLY,
)
INTERPOLATION = Objective(
    "interpolation",
    distil_between,
    Interpolation,
    summary="distil at points between student and teacher",
    needs=NEEDS_LABELS,
    heads=OLD_HEAD_ONLY,
)
ANCHORED = Objective(
    "anchored", tune_anchored, Anchoring, summary="held to it by a penalty that decays", needs=NEEDS_LABELS
)
