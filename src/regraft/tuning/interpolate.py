"""Distillation at points on the line between the student and the teacher.

Source: the training code of Qin et al.'s reference implementation, 2023 (arXiv:2305.08702); none of its scripts uses
this loss.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.errors import RecipeError
from regraft.model.outputs import forward, unwrap_parallel
from regraft.tuning.distill import Distillation, teacher_loss

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from regraft.task.types import Likelihood
    from regraft.tuning.distill import TeacherOutputs
    from regraft.tuning.trainer import Objective


@dataclasses.dataclass(frozen=True)
class Interpolation(Distillation):
    """Options of the distillation loss, and the points between student and teacher at which it is computed.

    Args:
        points: x of the points x·student + (1 − x)·teacher, from 0 to below 1; the student itself, at x = 1, is always
            a point.
        drawn: The number of further points, drawn at each step from a uniform distribution over [0, 1).

    Raises:
        RecipeError: A number is out of its range, infinite or NaN, or a name is unknown.
    """

    points: tuple[float, ...] = (0.5,)  # the midpoint, arbitrary; each point costs a forward and a backward pass
    drawn: int = 0  # a drawn point costs as much as a fixed point

    def __post_init__(self) -> None:
        """Refuse points out of [0, 1), a negative number of drawn points, and what `Distillation` refuses."""
        super().__post_init__()
        if not all(0 <= x < 1 for x in self.points):
            raise RecipeError(f"points must be from 0 to below 1 (1 is always used), found {self.points}.")
        if self.drawn < 0:
            raise RecipeError(f"drawn must be 0 or more, found {self.drawn}.")


def interpolation_objective(
    teacher_outputs: TeacherOutputs,
    teacher: nn.Module,
    options: Interpolation,
    likelihood: Likelihood,
    steps: int,
    seed: int,
) -> Objective:
    """Return the loss (1 − α)·L(student) + mean over x of the teacher's terms at x·student + (1 − x)·teacher.

    For points x_1 … x_n, the student's among them, this is the reference's loss λ·L + (1 − λ)·Σ_x (α_x·KL + β_x·MSE)
    with λ = 1 − α, α_x = 1/n and β_x = β/(2·α·n). All parameters are interpolated, including the frozen parameters
    below an adapter; only trainable parameters get gradients.

    Args:
        teacher_outputs: The teacher's outputs for all rows of the training split.
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

    def objective(student: nn.Module, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        decayed = options.apply_decay(step, steps)
        unwrapped = unwrap_parallel(student)
        points = [*options.points, *draw_points(options.drawn, seed, step)]
        num_points = 1 + len(points)  # the student itself is the point x = 1
        output = forward(student, batch, hidden=bool(decayed.beta))
        losses = [teacher_loss(output, batch, teacher_outputs, decayed, likelihood) / num_points]
        if decayed.alpha < 1:
            losses.append((1 - decayed.alpha) * likelihood.loss(output.logits, batch["targets"], "mean"))
        for x in points:
            parameters = blend(unwrapped, teacher_parameters, x)
            output = forward(unwrapped, batch, hidden=bool(decayed.beta), parameters=parameters)
            losses.append(teacher_loss(output, batch, teacher_outputs, decayed, likelihood) / num_points)
        return torch.stack(losses).sum()

    return objective


def draw_points(num_points: int, seed: int, step: int) -> list[float]:
    """Draw the points of a step, which depend on the arguments only: a resumed training draws the same points.

    Args:
        num_points: The number of points to draw.
        seed: The seed of the training.
        step: The number of completed steps, which selects the points.

    Returns:
        Numbers from 0 to below 1.
    """
    import numpy as np

    points: list[float] = np.random.default_rng((seed, step)).random(num_points).tolist()
    return points


def blend(student: nn.Module, teacher_parameters: Mapping[str, torch.Tensor], x: float) -> dict[str, torch.Tensor]:
    """Interpolate linearly between a teacher and a student.

    Args:
        student: The student, not wrapped for several devices.
        teacher_parameters: The teacher's parameters, by the student's names.
        x: The student's weight, from 0 to 1.

    Returns:
        x·student + (1 − x)·teacher by name; gradients flow to the student's trainable parameters.
    """
    return {name: x * parameter + (1 - x) * teacher_parameters[name] for name, parameter in student.named_parameters()}
