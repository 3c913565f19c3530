"""Distillation at points on the line between the student and the teacher.

Source: the reference implementation of Qin et al., 2023 (arXiv:2305.08702), whose training code has this loss; none of
its scripts use it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.model.outputs import forward, unwrap_parallel
from regraft.tuning.distill import Distillation, teacher_loss

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from regraft.task.types import Likelihood
    from regraft.tuning.distill import TeacherOutputs
    from regraft.tuning.trainer import Objective


@dataclasses.dataclass(frozen=True)
class Interpolation(Distillation):
    """Options of the distillation loss, and the points between student and teacher at which it is computed.

    Args:
        points: x of the points x·student + (1 − x)·teacher, besides the student itself at x = 1.
        drawn: The number of further points, drawn at each step from a uniform distribution over [0, 1).

    Raises:
        RecipeError: An option is out of its range.
    """

    points: tuple[float, ...] = (0.5,)
    drawn: int = 0

    def __post_init__(self) -> None:
        """Check that every option is in its range."""
        super().__post_init__()
        if not all(0 <= x < 1 for x in self.points):
            raise RecipeError(f"points must be from 0 to below 1 (1 is always used), found {self.points}.")
        if self.drawn < 0:
            raise RecipeError(f"drawn must not be negative, found {self.drawn}.")


def interpolation_objective(
    teacher_outputs: TeacherOutputs, teacher: Any, options: Interpolation, likelihood: Likelihood, steps: int, seed: int
) -> Objective:
    """Return the loss (1 − α)·L(student) + mean over x of the teacher's terms at x·student + (1 − x)·teacher.

    For points x_1 … x_n this is the reference's loss with λ = 1 − α, α_x = 1/n and β_x = β/(2·α·n). All parameters
    are interpolated, also the frozen ones of adapters; only the student's trained parameters get gradients.

    Args:
        teacher_outputs: From `compute_teacher_outputs`.
        teacher: The old model; its parameters have the student's names and shapes.
        options: The options of the loss, and the points.
        likelihood: The distribution that the outputs parametrise; L is its negative log-likelihood.
        steps: The number of steps of the training.
        seed: The seed of the drawn points.

    Returns:
        A function of the student, a batch and the number of completed steps.
    """
    import torch

    teacher_parameters = {name: parameter.detach() for name, parameter in teacher.named_parameters()}

    def objective(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        faded = options.faded(step, steps)
        points = [1.0, *options.points, *draw_points(options.drawn, seed, step)]
        inner = unwrap_parallel(model)
        losses: list[torch.Tensor] = []
        for x in points:
            parameters = None if x == 1 else blend(inner, teacher_parameters, x)
            output = forward(model if x == 1 else inner, batch, hidden=bool(faded.beta), parameters=parameters)
            losses.append(teacher_loss(output, batch, teacher_outputs, faded, likelihood) / len(points))
            if x == 1 and faded.alpha < 1:
                losses.append((1 - faded.alpha) * likelihood.loss(output.logits, batch["targets"], "mean"))
        return torch.stack(losses).sum()

    return objective


def draw_points(count: int, seed: int, step: int) -> list[float]:
    """Draw the points of a step; they depend on the arguments only, so a resumed training draws the same ones.

    Args:
        count: The number of points.
        seed: The seed of the training.
        step: The number of completed steps.

    Returns:
        Numbers from 0 to below 1.
    """
    import numpy as np

    points: list[float] = np.random.default_rng((seed, step)).random(count).tolist()
    return points


def blend(student: Any, teacher: Mapping[str, torch.Tensor], x: float) -> dict[str, torch.Tensor]:
    """Interpolate linearly between a teacher and a student.

    Args:
        student: The student.
        teacher: The teacher's parameters, by the student's names.
        x: The student's weight, from 0 to 1.

    Returns:
        x·student + (1 − x)·teacher by name; gradients flow to the student's trained parameters.
    """
    return {name: x * parameter + (1 - x) * teacher[name] for name, parameter in student.named_parameters()}
