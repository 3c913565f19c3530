"""Is there a ridge of high loss between two tuned models, or one valley that holds both?"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint.record import require_length
from regraft.diagnosis.blend import Blend
from regraft.diagnosis.question import Question
from regraft.errors import RecipeError
from regraft.model import Deployment
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from regraft.base import Base
    from regraft.diagnosis.question import Asked, Lines
    from regraft.task import TaskData

    Floats = np.ndarray[Any, np.dtype[np.float64]]

SMALL = 0.05
SMALL_OF_GUESSING = 0.01
ERRORS = 2.0


@dataclasses.dataclass(frozen=True)
class Segment:
    """The straight line between two models, (1 − μ)·first + μ·second, as a task sees it.

    Args:
        ends: What the two models are called.
        mu: Where it was looked, from 0 to 1.
        loss: By split, the mean cross-entropy at each μ, in nats.
        score: By split, the task's metric at each μ.
        barrier: By split, the largest excess of the loss over the straight line between its end values; 0 if none.
        connected: Whether the barrier is small on every split, by the rule of `segment`.
    """

    ends: tuple[str, str]
    mu: tuple[float, ...]
    loss: dict[str, tuple[float, ...]]
    score: dict[str, tuple[float, ...]]
    barrier: dict[str, float]
    connected: bool

    def __post_init__(self) -> None:
        """Check that there is a value at each point."""
        for name, splits in (("loss", self.loss), ("score", self.score)):
            for split, values in splits.items():
                require_length(values, len(self.mu), f"{name}: {split}")


def barrier(mu: ArrayLike, losses: ArrayLike) -> float:
    """Measure how high the loss rises between two models.

    Source: the barrier of linear mode connectivity (Frankle et al., 2020, arXiv:1912.05671), as Qin et al., 2023
    (arXiv:2305.08702), measure it between models tuned before and after an upgrade.

    Args:
        mu: Places on the segment, ascending; the first and the last are its ends.
        losses: The loss at each.

    Returns:
        The largest excess over the straight line between the two end values, at least 0; infinite where a loss is no
        number.

    Raises:
        RecipeError: There are fewer than two places, they do not ascend, or there are not as many losses.
    """
    places, values = np.asarray(mu, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if places.ndim != 1 or len(places) < 2 or not (np.diff(places) > 0).all() or values.shape != places.shape:
        raise RecipeError(
            f"a barrier is taken of at least 2 ascending places and a loss at each, found {places.shape} and "
            f"{values.shape}."
        )
    if not np.isfinite(values).all():
        return math.inf
    return max(0.0, float(_excess(places, values).max(initial=0.0)))


def segment(
    first: Any,
    second: Any,
    base: Base,
    data: TaskData,
    *,
    points: int = 11,
    precision: str = "fp32",
    ends: tuple[str, str] = ("old deployment", "new deployment"),
    progress: Progress = silent,
) -> Segment:
    """Walk the straight line from one tuned model to another, and measure the task at each point.

    Of adapters both the base and the adapter are walked, factor by factor. The two count as connected if, on every
    split, the barrier is at most 5 % of the larger of the two end losses (or 1 % of the loss of guessing, ln(classes),
    where that is more: ends that were fitted to nearly no loss would make any bump a barrier) plus twice the standard
    error of the mean excess at the worst point, from the examples' own losses: a barrier is called one where the
    examples bear it out.

    Source: finding 2 of Qin et al., 2023 (arXiv:2305.08702), who took 26 points.

    Args:
        first: A classifier from `load_model`, at μ = 0; it is not changed.
        second: Another of the same kind, at μ = 1.
        base: A base whose tokenizer both have.
        data: The task, classes in the order of both heads; `max_length` leaves room for virtual tokens.
        points: How many points, ends included; at least 3.
        precision: `bf16` or `fp32`.
        ends: What the two are called.
        progress: Told of each point, with the loss there.

    Returns:
        Losses and scores on dev and, where there is one, test.

    Raises:
        DataError: The task has no labels.
        MismatchError: The two models differ in tensors, or their heads are not for the task's labels.
        RecipeError: There are fewer than 3 points.
    """
    if points < 3:
        raise RecipeError(f"a segment is walked at 3 points or more, found {points}.")
    data.require_labels("the loss between two models")
    splits = {split.name: split for split in (data.dev, data.test) if split is not None}
    blend = Blend((first, second), ends)
    deployment = Deployment(blend.model, base, data, precision)
    mu = tuple(i / (points - 1) for i in range(points))
    rows: dict[str, list[Floats]] = {name: [] for name in splits}
    scores: dict[str, list[float]] = {name: [] for name in splits}
    for done, at in enumerate(mu, 1):
        blend.at(at)
        deployment.clear_outputs()
        for name, split in splits.items():
            rows[name].append(deployment.losses(split).numpy())
            scores[name].append(deployment.score(split))
        last = {f"{name} loss": float(losses[-1].mean()) for name, losses in rows.items()}
        progress("connectivity", done, points, last)
    loss = {name: tuple(float(row.mean()) for row in losses) for name, losses in rows.items()}
    heights = {name: barrier(mu, values) for name, values in loss.items()}
    guessing = {
        name: data.likelihood.chance_loss(split.targets.tolist(), data.head.num_outputs)
        for name, split in splits.items()
    }
    allowed = {name: _tolerance(mu, np.stack(losses), guessing[name]) for name, losses in rows.items()}
    return Segment(
        ends=ends,
        mu=mu,
        loss=loss,
        score={name: tuple(values) for name, values in scores.items()},
        barrier=heights,
        connected=all(heights[name] <= allowed[name] for name in splits),
    )


def _excess(mu: Floats, losses: Floats) -> Floats:
    """Take the straight line between the ends from what is between them, along the first axis."""
    share = ((mu - mu[0]) / (mu[-1] - mu[0])).reshape(-1, *[1] * (losses.ndim - 1))
    excess: Floats = (losses - (losses[0] + share * (losses[-1] - losses[0])))[1:-1]
    return excess


def _tolerance(mu: Sequence[float], rows: Floats, guessing: float) -> float:
    """Return how high a barrier still counts as none, from points × examples losses and that of guessing."""
    if not np.isfinite(rows).all():
        return 0.0
    excess = _excess(np.asarray(mu), rows)
    worst = excess[int(excess.mean(axis=1).argmax())]
    error = float(worst.std(ddof=1)) / math.sqrt(len(worst)) if len(worst) > 1 else 0.0
    ends = max(float(rows[0].mean()), float(rows[-1].mean()))
    return max(SMALL * ends, SMALL_OF_GUESSING * guessing) + ERRORS * error


def _ask(asked: Asked) -> Segment:
    asked.require_same_tokens()
    pair = asked.pair
    return segment(
        pair.old.model, pair.new.model, asked.upgrade.old, pair.data, points=asked.options.points,
        precision=pair.precision, ends=asked.ends, progress=pair.progress,
    )  # fmt: skip


def _describe(answer: Segment, _: str) -> Lines:
    heights = ", ".join(f"{name} {height:.3f}" for name, height in answer.barrier.items())
    return [("barrier of the loss", f"{heights}: {'connected' if answer.connected else 'not connected'}")]


QUESTION = Question("connectivity", 30, Segment, _ask, describe=_describe)
