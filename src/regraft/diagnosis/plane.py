"""Loss and score on the plane through three models."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint.record import require_length, require_shape
from regraft.diagnosis.blend import Blend, named_tensors
from regraft.diagnosis.question import Question
from regraft.errors import MismatchError, RecipeError
from regraft.model import Deployment
from regraft.progress import Progress, silent
from regraft.weights import distance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from regraft.base import Base
    from regraft.diagnosis.question import QuestionContext
    from regraft.task import Split, TaskData

    Point = tuple[float, float]

MIN_RELATIVE_HEIGHT = 1e-5
"""The least length of c − a's component orthogonal to b − a, relative to c − a; less is rounding of float32 weights."""


@dataclasses.dataclass(frozen=True)
class Plane:
    """Loss and score on the plane through three models; coordinates are L2 distances between weights.

    Args:
        names: The names of the three models.
        places: The models' coordinates (x, y): the first at the origin, the second on the x axis.
        x: The x coordinate of each column of the grid.
        y: The y coordinate of each row of the grid.
        loss: The mean loss in nats at each point, rows y × columns x.
        score: The score by the task's metric at each point, rows y × columns x; empty if models would have to write
            answers at each.
        split: The split that was measured, `dev` or `test`.
    """

    names: tuple[str, str, str]
    places: tuple[tuple[float, float], ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    score: tuple[tuple[float, ...], ...]
    split: str

    def __post_init__(self) -> None:
        """Refuse any number of places but three, and a loss or score that does not have the grid's shape."""
        require_length(self.places, 3, "places")
        for name, grid in (("loss", self.loss), ("score", self.score or self.loss)):
            require_shape(grid, len(self.y), len(self.x), name)


def plane(
    models: Sequence[nn.Module],
    names: tuple[str, str, str],
    base: Base,
    data: TaskData,
    *,
    size: int = 9,
    margin: float = 0.2,
    split: str = "test",
    precision: str = "fp32",
    progress: Progress = silent,
) -> Plane:
    """Measure loss and score on a grid in the plane through three models a, b and c.

    The axes are orthonormal: x along u = b − a, y along the part of c − a that is orthogonal to u.

    Source: Garipov et al., 2018 (arXiv:1802.10026).

    Args:
        models: Three models with heads, all of the same kind; they are not changed.
        names: The names of the models.
        base: A base with the tokenizer of all three.
        data: The task's data, with labels in the order of the heads.
        size: The number of points along each side, at least 2; the data is evaluated `size`² times.
        margin: The distance from the outermost models to the edge of the grid, relative to the models' extent; the
            default is arbitrary.
        split: `test` (dev if there is none) or `dev`.
        precision: `bf16` or `fp32`.
        progress: Called after each point, with its loss.

    Returns:
        The grid, and the coordinates of the three models on it.

    Raises:
        DataError: The task has no labels.
        MismatchError: The models differ in tensors, or lie on one line.
        RecipeError: There are not three models, or `size`, `margin` or `split` is out of its range.
    """
    if size < 2 or margin < 0 or split not in ("dev", "test") or len(models) != 3:
        raise RecipeError(
            f"a plane needs 3 models, at least 2 points per side, a margin of at least 0 and the split dev or test; "
            f"found {len(models)} models, {size}, {margin} and {split!r}."
        )
    data.require_labels("the loss on a plane")
    measured_split: Split = data.dev if split == "dev" or data.test is None else data.test
    blend = Blend(models, names)
    deployment = Deployment(blend.model, base, data, precision)
    corners = _corners(models, names)
    x, y = (_axis([corner[i] for corner in corners], size, margin) for i in (0, 1))
    has_scores = not data.task.answers_needed  # answers at every point would take hours
    losses, scores = np.empty((size, size)), np.empty((size, size))
    for row, column in np.ndindex(size, size):
        blend.set_coefficients(*blend_coefficients(x[column], y[row], corners))
        deployment.clear_outputs()
        loss = deployment.losses(measured_split).numpy().mean()
        losses[row, column] = loss
        if has_scores:
            scores[row, column] = deployment.score(measured_split)
        progress("plane", row * size + column + 1, size * size, {f"{measured_split.name} loss": float(loss)})
    score = _nested_tuples(scores) if has_scores else ()
    return Plane(names, corners, x, y, _nested_tuples(losses), score, measured_split.name)


def blend_coefficients(x: float, y: float, corners: Sequence[Point]) -> tuple[float, float]:
    """Express a point of the plane as a combination of its three models.

    Args:
        x: The coordinate along b − a.
        y: The coordinate orthogonal to b − a, towards c.
        corners: The coordinates of a, b and c, as in `Plane.places`: a at the origin, b at (x_b, 0).

    Returns:
        β and γ of (1 − β − γ)·a + β·b + γ·c.
    """
    _, (b_x, _), (c_x, c_y) = corners
    gamma = y / c_y
    return (x - gamma * c_x) / b_x, gamma


def _corners(models: Sequence[nn.Module], names: Sequence[str]) -> tuple[Point, Point, Point]:
    """Return the coordinates of the three models, computed from the distances between them."""
    a, b, c = (
        {name: tensor for name, tensor in named_tensors(model).items() if tensor.is_floating_point()}
        for model in models
    )
    ab, ac, bc = (
        distance((tensor, second[name]) for name, tensor in first.items()).l2
        for first, second in ((a, b), (a, c), (b, c))
    )
    c_x = (ab**2 + ac**2 - bc**2) / (2 * ab) if ab else 0.0
    c_y = math.sqrt(max(0.0, ac**2 - c_x**2))
    if c_y <= MIN_RELATIVE_HEIGHT * ac or not ab:
        raise MismatchError(
            f"{', '.join(names)} lie on one line: a plane needs three different models, none of them between the "
            "others. Measure the segment between two of them instead."
        )
    return (0.0, 0.0), (ab, 0.0), (c_x, c_y)


def _axis(coordinates: Sequence[float], size: int, margin: float) -> tuple[float, ...]:
    low = min(coordinates)
    high = max(coordinates)
    padding = margin * (high - low)
    return tuple(np.linspace(low - padding, high + padding, size).tolist())


def _nested_tuples(grid: np.ndarray[Any, Any]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in grid.tolist())


def _answer(context: QuestionContext) -> Plane | None:
    """Measure the plane through the old deployment, the same adaptation on the new base, and the counterpart."""
    if not context.options.plane:
        return None
    context.require_same_tokens()
    context.require_labels()
    direct, pair, (old_name, new_name) = context.direct, context.pair, context.endpoint_names
    return plane(
        (direct.old.model, direct.new.model, pair.new.model),
        (old_name, "direct", new_name),
        context.upgrade.old,
        pair.data,
        size=context.options.plane,
        split=pair.split.name,
        precision=pair.precision,
        progress=pair.progress,
    )


QUESTION = Question("plane", order=40, record=Plane, answer=_answer)
