"""How high is the loss around three models, on the plane that they span?"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint.record import require_length, require_shape
from regraft.diagnosis.blend import Blend, tensors_of
from regraft.diagnosis.question import Question
from regraft.errors import MismatchError, RecipeError
from regraft.model import Deployment
from regraft.progress import Progress, silent
from regraft.weights import distance

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from regraft.base import Base
    from regraft.diagnosis.question import Asked
    from regraft.task import Split, TaskData


@dataclasses.dataclass(frozen=True)
class Plane:
    """The plane through three models, as a task sees it; coordinates are L2 distances in the space of weights.

    Args:
        names: What the three are called.
        places: Where each of them is, (x, y): the first at the origin, the second on the x axis.
        x: The grid's columns.
        y: Its rows.
        loss: The mean cross-entropy at each point in nats, rows y × columns x.
        score: The task's metric there.
        split: What was measured on, `dev` or `test`.
    """

    names: tuple[str, str, str]
    places: tuple[tuple[float, float], ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    score: tuple[tuple[float, ...], ...]
    split: str

    def __post_init__(self) -> None:
        """Check that there are three places, and a value at each point."""
        require_length(self.places, 3, "places")
        for name, values in (("loss", self.loss), ("score", self.score)):
            require_shape(values, len(self.y), len(self.x), name)


def plane(
    models: Sequence[Any],
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
    """Measure the task on the plane through three models a, b and c.

    The axes are orthonormal: one along u = b − a, the other along what of c − a is at a right angle to it.

    Source: Garipov et al., 2018 (arXiv:1802.10026).

    Args:
        models: Three classifiers of one kind; they are not changed.
        names: What they are called.
        base: A base whose tokenizer they have.
        data: The task, classes in the order of the heads.
        size: Points a side; at least 2.
        margin: How far beyond the three the grid goes, in units of their extent.
        split: `test` (dev where there is none) or `dev`.
        precision: `bf16` or `fp32`.
        progress: Told of each point, with the loss there.

    Returns:
        The grid, and the places of the three on it.

    Raises:
        DataError: The task has no labels.
        MismatchError: The models differ in tensors, or lie on one line.
        RecipeError: An option is out of its range.
    """
    if size < 2 or margin < 0 or split not in ("dev", "test") or len(models) != 3:
        raise RecipeError(
            f"a plane goes through 3 models, has 2 points a side or more, a margin of at least 0 and is of dev or "
            f"test; found {len(models)} models, {size}, {margin} and {split!r}."
        )
    data.require_labels("the loss on a plane")
    chosen: Split = data.dev if split == "dev" or data.test is None else data.test
    blend = Blend(models, names)
    deployment = Deployment(blend.model, base, data, precision)
    places = _places(models, names)
    x, y = (_axis([position[i] for position in places], size, margin) for i in (0, 1))
    loss, scores = np.empty((size, size)), np.empty((size, size))
    for row, column in np.ndindex(size, size):
        blend.at(*shares_at(x[column], y[row], places))
        deployment.clear_outputs()
        loss[row, column], scores[row, column] = deployment.losses(chosen).numpy().mean(), deployment.score(chosen)
        progress("plane", row * size + column + 1, size * size, {f"{chosen.name} loss": float(loss[row, column])})
    by_row: list[tuple[tuple[float, ...], ...]] = [tuple(map(tuple, grid.tolist())) for grid in (loss, scores)]
    return Plane(names, places, x, y, by_row[0], by_row[1], chosen.name)


def shares_at(x: float, y: float, places: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return what of three models makes up a point of their plane.

    Args:
        x: Along b − a.
        y: At a right angle to it, towards c.
        places: Of a, b and c, from `plane`: a at the origin, b at (x_b, 0).

    Returns:
        β and γ of (1 − β − γ)·a + β·b + γ·c.
    """
    gamma = y / places[2][1]
    return (x - gamma * places[2][0]) / places[1][0], gamma


def _places(models: Sequence[Any], names: Sequence[str]) -> tuple[tuple[float, float], ...]:
    a, b, c = (_floating(model) for model in models)
    ab, ac, bc = (distance((p[n], q[n]) for n in p).l2 for p, q in ((a, b), (a, c), (b, c)))
    along = (ab**2 + ac**2 - bc**2) / (2 * ab) if ab else 0.0
    beside = math.sqrt(max(0.0, ac**2 - along**2))
    if beside <= 1e-5 * ac or not ab:
        raise MismatchError(
            f"{', '.join(names)} lie on one line: a plane needs three models of which none is between or the same as "
            "the others. Walk the segment between two of them instead."
        )
    return (0.0, 0.0), (ab, 0.0), (along, beside)


def _axis(places: Sequence[float], size: int, margin: float) -> tuple[float, ...]:
    room = margin * (max(places) - min(places))
    return tuple(np.linspace(min(places) - room, max(places) + room, size).tolist())


def _floating(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_of(model).items() if tensor.is_floating_point()}


def _ask(asked: Asked) -> Plane | None:
    if not asked.options.plane:
        return None
    asked.require_same_tokens()
    direct, pair, (old, new) = asked.direct, asked.pair, asked.ends
    return plane(
        (direct.old.model, direct.new.model, pair.new.model), (old, "direct", new), asked.upgrade.old, pair.data,
        size=asked.options.plane, split=pair.split.name, precision=pair.precision, progress=pair.progress,
    )  # fmt: skip


QUESTION = Question("plane", 40, Plane, _ask)
