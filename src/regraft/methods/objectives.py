"""Objectives: labels, distillation from the old model, and a penalty on the distance from the start."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.adaptation.families import family_of_model
from regraft.errors import KindError
from regraft.methods.answers import answered_data
from regraft.methods.method import OLD_HEAD_ONLY, Objective
from regraft.tuning.anchor import Anchoring
from regraft.tuning.distill import Distillation
from regraft.tuning.interpolate import Interpolation
from regraft.tuning.on_policy import OnPolicy

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
        KindError: No line joins student and teacher, because their embedding rows stand for different tokens, or
            because the start made a full fine-tune of an adapter.
    """
    if family_of_model(model).tunes_base and not job.adaptation.family.tunes_base:
        raise KindError(
            f"{job.adaptation.path}: is a {job.adaptation.kind}, but the start made a full fine-tune, so there is no "
            "line from the teacher's weights to the student's. Use distill as the objective."
        )
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


def distil_on_policy(job: Job, model: nn.Module, options: OnPolicy) -> Curve:
    """Tune on the reverse KL from the new model to the old one, at the tokens of answers that the new model samples.

    The best weights are those whose distributions are closest to the old model's on its own answers to dev prompts.

    Args:
        job: The job, with the task's prompts.
        model: The model to tune, which the start returned.
        options: The temperature, and the most tokens of an answer.

    Returns:
        The learning curve; its `score` is the mean overlap of the predicted distributions with the old model's, 0–1.
    """
    job = dataclasses.replace(job, data=answered_data(job, "dev"))
    job.notes["labels"] = len(job.labelled_rows)
    job.notes["score"] = "overlap of the predicted distributions with the old model's on dev"
    return job.tune(model, options, teacher_selects_best=True)


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
ON_POLICY = Objective(
    "on-policy",
    distil_on_policy,
    OnPolicy,
    summary="let the old model score the new one's answers",
    needs=("text", "training"),
    heads=OLD_HEAD_ONLY,
    scores_agreement=True,
    generation_only=True,
)
