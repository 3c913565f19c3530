"""How long do old weights keep working while the base is pre-trained further?"""

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
from regraft.task import score
from regraft.upgrade import Upgrade

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.base import Base
    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import QuestionContext, SummaryLines


@dataclasses.dataclass(frozen=True)
class CompatibilityPoint:
    """The old weights, untuned, on one checkpoint between the old base and the new one.

    Args:
        name: The checkpoint.
        distance: Its L2 distance from the old base.
        score: The score of the old weights on it.
        loss: Their mean cross-entropy.
        agreement: How well their predictions match those on the old base, by the first metric of the task type: in
            classification, the share of equal predictions.
        steps: The number of pre-training steps that led to the checkpoint; None if its folder does not record it.
    """

    name: str
    distance: float
    score: float
    loss: float
    agreement: float
    steps: Count | None


def compatibility(pair: DeploymentPair, checkpoints: Sequence[Base | str | Path]) -> tuple[CompatibilityPoint, ...]:
    """Put old weights, untuned, on every checkpoint of continual pre-training.

    Source: Qin et al., 2023 (arXiv:2305.08702), the pilot studies.

    Args:
        pair: The old deployment.
        checkpoints: Bases on the way, in order; the old and the new one need not be among them.

    Returns:
        A point for the old base itself, then one for each checkpoint.

    Raises:
        MismatchError: A checkpoint is no upgrade of the old base.
    """
    import numpy as np

    split, data, old_base, old_predictions = pair.split, pair.data, pair.upgrade.old, pair.old_predictions
    points = []
    for number, checkpoint in enumerate([old_base, *checkpoints]):
        upgrade = Upgrade(old_base, checkpoint)
        deployment = pair.old
        new_predictions = old_predictions
        if number:
            with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
                write_graft(pair.adaptation, upgrade, Path(folder), pair.progress)
                model = load_model(load_adaptation(folder), upgrade.new, data.head)
                deployment = Deployment(model, upgrade.new, data, pair.precision, pair.progress)
                new_predictions = deployment.predictions(split)
        agreement = score(data.task.metrics[0].name, data.task.as_targets(old_predictions), new_predictions)
        points.append(
            CompatibilityPoint(
                name=upgrade.new.name,
                distance=upgrade.distance().l2,
                score=deployment.score(split),
                loss=deployment.loss(split),
                agreement=float(np.float32(agreement)),
                steps=_steps(upgrade.new) if number else 0,
            )
        )
        pair.progress("compatibility", number + 1, len(checkpoints) + 1, {"score": points[-1].score})
    return tuple(points)


def _steps(base: Base) -> int | None:
    with contextlib.suppress(CheckpointError, ValueError, KeyError, TypeError):
        return int(read_json(base.path / PRETRAINING)["steps"])
    return None


def _answer(context: QuestionContext) -> tuple[CompatibilityPoint, ...] | None:
    if not context.options.checkpoints:
        return None
    return compatibility(context.direct, context.options.checkpoints)


def _describe(points: tuple[CompatibilityPoint, ...], metric: str) -> SummaryLines:
    return [
        (f"on {point.name}", f"{metric} {point.score:.4f}, L2 {point.distance:.2f} from the old base")
        for point in points
    ]


QUESTION = Question("compatibility", 80, tuple[CompatibilityPoint, ...], _answer, describe=_describe)
