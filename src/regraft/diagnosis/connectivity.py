"""Loss and score on the straight line between two tuned models, and the barrier between them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint.record import require_length
from regraft.diagnosis.blend import Blend
from regraft.diagnosis.question import MIN_SEGMENT_POINTS, SEGMENT_POINTS, Question
from regraft.errors import RecipeError
from regraft.model import Deployment
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike
    from torch import nn

    from regraft.base import Base
    from regraft.diagnosis.question import QuestionContext, SummaryLines
    from regraft.task import TaskData

    Floats = np.ndarray[Any, np.dtype[np.float64]]

END_LOSS_TOLERANCE = 0.05
"""The tolerance of the barrier between connected models, relative to the larger end loss. An arbitrary limit."""
CHANCE_LOSS_TOLERANCE = 0.01
"""The least tolerance, relative to the chance loss; without it, any bump would be a barrier if both ends are near 0."""
STANDARD_ERRORS = 2.0
"""The number of standard errors added to the tolerance: about the 95 % interval of the examples' mean excess."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Loss and score on the straight line between two models, (1 − μ)·first + μ·second.

    Args:
        ends: The names of the models at μ = 0 and μ = 1.
        mu: The values of μ at which the models were evaluated, from 0 to 1.
        loss: The mean loss in nats at each μ, by split.
        score: The score by the task's metric at each μ, by split; empty if models would have to write answers at each.
        barrier: The largest excess of the loss over the straight line between its end values, by split; 0 if there
            is none, infinite if a loss is infinite or NaN.
        connected: Whether the barrier is within the tolerance of `segment` on every split.
    """

    ends: tuple[str, str]
    mu: tuple[float, ...]
    loss: dict[str, tuple[float, ...]]
    score: dict[str, tuple[float, ...]]
    barrier: dict[str, float]
    connected: bool

    def __post_init__(self) -> None:
        """Refuse losses or scores of a split that do not have a value for each μ."""
        for name, curves in (("loss", self.loss), ("score", self.score)):
            for split, curve in curves.items():
                require_length(curve, len(self.mu), f"{name}: {split}")


def barrier(mu: ArrayLike, losses: ArrayLike) -> float:
    """Return how far the loss between two models rises above the line between its end values.

    Source: the barrier of linear mode connectivity (Frankle et al., 2020, arXiv:1912.05671), as Qin et al., 2023
    (arXiv:2305.08702), measure it between models tuned before and after an upgrade.

    Args:
        mu: Positions on the segment, ascending; the first and the last are its ends.
        losses: The loss at each position.

    Returns:
        The largest excess over the straight line between the two end values, at least 0; infinite if a loss is
        infinite or NaN.

    Raises:
        RecipeError: There are fewer than two positions, they do not ascend, or positions and losses differ in number.
    """
    mu_array = np.asarray(mu, dtype=np.float64)
    loss_array = np.asarray(losses, dtype=np.float64)
    is_ascending = mu_array.ndim == 1 and len(mu_array) >= 2 and (np.diff(mu_array) > 0).all()
    if not is_ascending or loss_array.shape != mu_array.shape:
        raise RecipeError(
            f"a barrier needs at least 2 ascending positions and a loss at each, found shapes {mu_array.shape} and "
            f"{loss_array.shape}."
        )
    if not np.isfinite(loss_array).all():
        return math.inf
    return max(0.0, float(_excess(mu_array, loss_array).max(initial=0.0)))


def segment(
    first: nn.Module,
    second: nn.Module,
    base: Base,
    data: TaskData,
    *,
    points: int = SEGMENT_POINTS,
    precision: str = "fp32",
    ends: tuple[str, str] = ("old deployment", "new deployment"),
    progress: Progress = silent,
) -> Segment:
    """Measure loss and score at equally spaced points of the straight line between two tuned models.

    For adapters, both the base and the adapter are interpolated, factor by factor. The two models count as connected
    if, on every split, the barrier is at most `END_LOSS_TOLERANCE` of the larger end loss, or `CHANCE_LOSS_TOLERANCE`
    of the chance loss if this is more. To this tolerance, `STANDARD_ERRORS` standard errors of the examples' mean
    excess at the worst point are added.

    Source: finding 2 of Qin et al., 2023 (arXiv:2305.08702), who took 26 points.

    Args:
        first: A model with a head from `load_model`, at μ = 0; it is not changed.
        second: A model of the same kind, at μ = 1; it is not changed.
        base: A base with the tokenizer of both models.
        data: The task's data, with labels in the order of both heads and a `max_length` that leaves room for virtual
            tokens.
        points: The number of points, ends included; at least 3.
        precision: `bf16` or `fp32`.
        ends: The names of the two models.
        progress: Called after each point, with the loss of each split.

    Returns:
        The losses and scores of the dev split and, if there is one, the test split.

    Raises:
        DataError: The task has no labels.
        MismatchError: The two models differ in tensors, or their heads are not for the task's labels.
        RecipeError: There are fewer than 3 points.
    """
    if points < MIN_SEGMENT_POINTS:
        raise RecipeError(f"a segment needs {MIN_SEGMENT_POINTS} points or more, found {points}.")
    data.require_labels("the loss between two models")
    splits = {split.name: split for split in (data.dev, data.test) if split is not None}
    blend = Blend((first, second), ends)
    deployment = Deployment(blend.model, base, data, precision)
    mu = tuple(i / (points - 1) for i in range(points))
    example_losses: dict[str, list[Floats]] = {name: [] for name in splits}
    # answers at every point would take far longer than all other questions
    scores: dict[str, list[float]] = {name: [] for name in splits if not data.task.answers_needed}
    for point_number, coefficient in enumerate(mu, start=1):
        blend.set_coefficients(coefficient)
        deployment.clear_outputs()
        for name, split in splits.items():
            example_losses[name].append(deployment.losses(split).numpy())
            if name in scores:
                scores[name].append(deployment.score(split))
        mean_losses = {f"{name} loss": float(losses[-1].mean()) for name, losses in example_losses.items()}
        progress("connectivity", point_number, points, mean_losses)
    loss = {name: tuple(float(row.mean()) for row in losses) for name, losses in example_losses.items()}
    barriers = {name: barrier(mu, losses) for name, losses in loss.items()}
    tolerances = {
        name: _tolerance(
            mu,
            np.stack(example_losses[name]),
            data.likelihood.chance_loss(split.targets.tolist(), deployment.outputs(split).shape[1]),
        )
        for name, split in splits.items()
    }
    return Segment(
        ends=ends,
        mu=mu,
        loss=loss,
        score={name: tuple(split_scores) for name, split_scores in scores.items()},
        barrier=barriers,
        connected=all(barriers[name] <= tolerances[name] for name in splits),
    )


def _excess(mu: Floats, losses: Floats) -> Floats:
    """Subtract the straight line between the end losses from the inner ones, along the first axis."""
    share = ((mu - mu[0]) / (mu[-1] - mu[0])).reshape(-1, *[1] * (losses.ndim - 1))
    excess: Floats = (losses - (losses[0] + share * (losses[-1] - losses[0])))[1:-1]
    return excess


def _tolerance(mu: Sequence[float], losses: Floats, chance_loss: float) -> float:
    """Return the largest barrier between connected models, from losses of points × examples."""
    if not np.isfinite(losses).all():
        return 0.0
    excess = _excess(np.asarray(mu), losses)
    worst = excess[int(excess.mean(axis=1).argmax())]
    standard_error = float(worst.std(ddof=1)) / math.sqrt(len(worst)) if len(worst) > 1 else 0.0
    end_loss = max(float(losses[0].mean()), float(losses[-1].mean()))
    tolerance = max(END_LOSS_TOLERANCE * end_loss, CHANCE_LOSS_TOLERANCE * chance_loss)
    return tolerance + STANDARD_ERRORS * standard_error


def _answer(context: QuestionContext) -> Segment:
    """Measure the segment between the two deployments of the context's pair."""
    context.require_same_tokens()
    context.require_labels()
    pair = context.pair
    return segment(
        pair.old.model,
        pair.new.model,
        context.upgrade.old,
        pair.data,
        points=context.options.points,
        precision=pair.precision,
        ends=context.endpoint_names,
        progress=pair.progress,
    )


def _describe(segment: Segment, _metric: str) -> SummaryLines:
    barriers = ", ".join(f"{split} {height:.3f}" for split, height in segment.barrier.items())
    return [("barrier of the loss", f"{barriers}: {'connected' if segment.connected else 'not connected'}")]


QUESTION = Question("connectivity", order=30, record=Segment, answer=_answer, describe=_describe)
