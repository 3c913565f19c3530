"""How long old weights go on working while the base is pre-trained further."""

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
    from regraft.diagnosis.pair import Pair
    from regraft.diagnosis.question import Asked, Lines


@dataclasses.dataclass(frozen=True)
class Point:
    """Old weights on one checkpoint of the way from the old base to the new one.

    Args:
        name: The checkpoint.
        distance: Its L2 distance from the old base.
        score: The old weights' score on it, without any tuning.
        loss: Their mean cross-entropy.
        agreement: How well they predict what they did on the old base, by the first metric of the type of task: the
            share of examples, in classification.
        steps: The pre-training steps that made it, if its folder says so.
    """

    name: str
    distance: float
    score: float
    loss: float
    agreement: float
    steps: Count | None


def compatibility(pair: Pair, checkpoints: Sequence[Base | str | Path]) -> tuple[Point, ...]:
    """Put old weights on every checkpoint of continual pre-training as they are.

    Source: Qin et al., 2023 (arXiv:2305.08702), the pilot studies.

    Args:
        pair: The old deployment.
        checkpoints: Bases on the way, in order; the old and the new one need not be among them.

    Returns:
        A point each, after one for the old base itself.

    Raises:
        MismatchError: A checkpoint is no upgrade of the old base.
    """
    import numpy as np

    split, data, old, before = pair.split, pair.data, pair.upgrade.old, pair.before
    points = []
    for number, name in enumerate([old, *checkpoints]):
        upgrade = Upgrade(old, name)
        deployment, after = pair.old, before
        if number:
            with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
                write_graft(pair.adaptation, upgrade, Path(folder), pair.progress)
                model = load_model(load_adaptation(folder), upgrade.new, data.head)
                deployment = Deployment(model, upgrade.new, data, pair.precision, pair.progress)
                after = deployment.predictions(split)
        agreement = score(data.task.metrics[0].name, data.task.as_targets(before), after)
        points.append(
            Point(
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


def _ask(asked: Asked) -> tuple[Point, ...] | None:
    return compatibility(asked.direct, asked.options.checkpoints) if asked.options.checkpoints else None


def _describe(points: tuple[Point, ...], metric: str) -> Lines:
    return [
        (f"on {point.name}", f"{metric} {point.score:.4f}, L2 {point.distance:.2f} from the old base")
        for point in points
    ]


QUESTION = Question("compatibility", 80, tuple[Point, ...], _ask, describe=_describe)
