"""Scores of an adaptation, untuned, on checkpoints of its base's continual pre-training."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adaptation import load_adaptation, load_model, write_graft
from regraft.base import PRETRAINING
from regraft.checkpoint import read_json
from regraft.checkpoint.record import Count
from regraft.diagnosis.question import Question
from regraft.errors import CheckpointError
from regraft.model import Deployment
from regraft.task import find_metric
from regraft.upgrade import Upgrade

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.base import Base
    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import QuestionContext, SummaryLines


@dataclasses.dataclass(frozen=True)
class CompatibilityPoint:
    """The old adaptation, untuned, on one checkpoint of the base.

    Args:
        name: The checkpoint's path or hub id; the first point is the old base itself.
        distance: The checkpoint's L2 distance from the old base.
        score: The adaptation's score on the checkpoint.
        loss: The adaptation's mean loss on the checkpoint, in nats.
        agreement: The agreement of the predictions with those on the old base, or None; see `Check`.
        steps: The number of pre-training steps that the checkpoint's folder records, counted from the base that
            regraft pre-trained further; 0 for the old base, None without a record.
    """

    name: str
    distance: float
    score: float
    loss: float
    agreement: float | None
    steps: Count | None


def compatibility(pair: DeploymentPair, checkpoints: Sequence[Base | str | Path]) -> tuple[CompatibilityPoint, ...]:
    """Measure the old adaptation, untuned, on every checkpoint of continual pre-training.

    Source: Qin et al., 2023 (arXiv:2305.08702), the pilot studies.

    Args:
        pair: The old deployment, with the task's data and the precision to measure in.
        checkpoints: Bases between the old and the new one, in order of pre-training.

    Returns:
        A point for the old base itself, then one for each checkpoint.

    Raises:
        CheckpointError: A weight file is incomplete or damaged.
        MismatchError: A checkpoint is not an upgrade of the old base, or an output of the old deployment is infinite or
            NaN.
    """
    old_base = pair.upgrade.old
    num_points = 1 + len(checkpoints)
    points = [_point(pair, Upgrade(old_base, old_base), pair.old, steps=0)]
    pair.progress("compatibility", 1, num_points, {"score": points[0].score})
    for checkpoint in checkpoints:
        upgrade = Upgrade(old_base, checkpoint)
        with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
            write_graft(pair.adaptation, upgrade, Path(folder), pair.progress)
            model = load_model(load_adaptation(folder), upgrade.new, pair.data.head)
            deployment = Deployment(model, upgrade.new, pair.data, pair.precision, pair.progress)
            points.append(_point(pair, upgrade, deployment, _recorded_steps(upgrade.new)))
        pair.progress("compatibility", len(points), num_points, {"score": points[-1].score})
    return tuple(points)


def _point(pair: DeploymentPair, upgrade: Upgrade, deployment: Deployment, steps: int | None) -> CompatibilityPoint:
    """Measure a deployment of the old adaptation on the upgrade's new base."""
    import numpy as np

    agreed = pair.agreement(deployment)
    return CompatibilityPoint(
        name=upgrade.new.name,
        distance=upgrade.distance().l2,
        score=deployment.score(pair.split),
        loss=deployment.loss(pair.split),
        agreement=None if agreed is None else float(np.float32(agreed)),  # the precision of the records of regraft 0.1
        steps=steps,
    )


def _recorded_steps(base: Base) -> int | None:
    """Return the pre-training steps that a base's folder records, if it does."""
    with contextlib.suppress(CheckpointError, ValueError, KeyError, TypeError):
        return int(read_json(base.path / PRETRAINING)["steps"])
    return None


def _answer(context: QuestionContext) -> tuple[CompatibilityPoint, ...] | None:
    if not context.options.checkpoints:
        return None
    context.require_labels()
    return compatibility(context.direct, context.options.checkpoints)


def _describe(points: tuple[CompatibilityPoint, ...], metric: str) -> SummaryLines:
    format_score = find_metric(metric).format_score
    return [
        (f"on {point.name}", f"{metric} {format_score(point.score, 4)}, L2 {point.distance:.2f} from the old base")
        for point in points
    ]


QUESTION = Question(
    "compatibility", order=80, record=tuple[CompatibilityPoint, ...], answer=_answer, describe=_describe
)
