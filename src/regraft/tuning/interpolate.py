"""Distillation at points between the student and the teacher.

Source: the reference implementation of Qin et al., 2023 (arXiv:2305.08702), which trains so but never calls it from its
scripts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.model.outputs import forward
from regraft.tuning.distill import Distillation, teacher_loss

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from regraft.task.types import Likelihood
    from regraft.tuning.distill import TeacherOutputs
    from regraft.tuning.trainer import Objective


@dataclasses.dataclass(frozen=True)
class Interpolation(Distillation):
    """The weights of the distillation loss, and where between student and teacher it is taken.

    Args:
        points: x of points x·student + (1 − x)·teacher, beside the student itself at x = 1.
        drawn: How many more are drawn anew at each step, evenly from 0 to 1.

    Raises:
        RecipeError: A number is out of its range.
    """

    points: tuple[float, ...] = (0.5,)
    drawn: int = 0

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        if not all(0 <= x < 1 for x in self.points):
            raise RecipeError(f"points are from 0 to below 1 (1 is always there), found {self.points}.")
        if self.drawn < 0:
            raise RecipeError(f"drawn must not be negative, found {self.drawn}.")


def interpolation_objective(
    taught: TeacherOutputs, teacher: Any, options: Interpolation, likelihood: Likelihood, steps: int, seed: int
) -> Objective:
    """Make the loss (1 − α)·L(student) + the mean over x of the teacher's terms at x·student + (1 − x)·teacher.

    With points x_1 … x_n that is the reference's λ = 1 − α, α_x = 1/n and β_x = β/(2·α·n). The bodies of adapters are
    blended too; only the student's trained parameters get gradients.

    Args:
        taught: From `teach`.
        teacher: The old tuned model, its parameters named and shaped as the student's.
        options: The loss's weights, and the points.
        likelihood: What outputs are a distribution over, and so L; the cross-entropy of classes.
        steps: Steps of the training in all.
        seed: With the step, what points are drawn from.

    Returns:
        A function of the student, a batch and the steps done so far.
    """
    import torch

    fixed = {name: parameter.detach() for name, parameter in teacher.named_parameters()}

    def objective(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        now, points = options.at(step, steps), [1.0, *options.points, *draw_points(options.drawn, seed, step)]
        inner = getattr(model, "module", model)  # the model itself where it is wrapped for many devices
        losses: list[torch.Tensor] = []
        for x in points:
            parameters = None if x == 1 else blend(inner, fixed, x)
            output = forward(model if x == 1 else inner, batch, hidden=bool(now.beta), parameters=parameters)
            losses.append(teacher_loss(output, batch, taught, now, likelihood) / len(points))
            if x == 1 and now.alpha < 1:
                losses.append((1 - now.alpha) * likelihood.loss(output.logits, batch["targets"], "mean"))
        return torch.stack(losses).sum()

    return objective


def draw_points(count: int, seed: int, step: int) -> list[float]:
    """Draw the points of a step; the same ones whenever it is computed.

    Args:
        count: How many.
        seed: The training's.
        step: Steps done before it.

    Returns:
        Numbers from 0 to below 1.
    """
    import numpy as np

    drawn: list[float] = np.random.default_rng((seed, step)).random(count).tolist()
    return drawn


def blend(student: Any, teacher: Mapping[str, torch.Tensor], x: float) -> dict[str, torch.Tensor]:
    """Take a point of the straight line from the teacher to the student.

    Args:
        student: A model.
        teacher: Parameters by the student's names.
        x: How far from the teacher, 0 to 1.

    Returns:
        x·student + (1 − x)·teacher by name; gradients flow to what is trained of the student.
    """
    return {name: x * parameter + (1 - x) * teacher[name] for name, parameter in student.named_parameters()}
