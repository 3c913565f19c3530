"""A penalty on the distance of the weights from their starting values; its strength may decay over the training.

Source: the plain penalty is L2-SP (Li et al., 2018, arXiv:1802.01483); the penalty weighted by the Fisher
information is elastic weight consolidation (Kirkpatrick et al., 2017, arXiv:1612.00796).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from regraft.errors import RecipeError
from regraft.model.device import device
from regraft.model.outputs import forward, trainable_parameters
from regraft.recipe import check_decay_schedule, decay_factor

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from regraft.progress import Progress
    from regraft.task.split import Integers
    from regraft.task.types import Examples, Likelihood
    from regraft.tuning.trainer import Objective

WEIGHTINGS = ("plain", "fisher")
"""The values of `Anchoring.weighting`."""
FISHER_EXAMPLES = 128
"""The most examples that the Fisher information is estimated from, arbitrary: more examples lower the variance of the
estimate, and each costs a forward and a backward pass."""


@dataclasses.dataclass(frozen=True)
class Anchoring:
    """Options of the penalty on the distance from the starting weights.

    Args:
        strength: The penalty's weight at the first step, 0 or more.
        weighting: `plain`, every weight alike; or `fisher`, each weight by its Fisher information at the start, scaled
            to a mean of 1.
        decay: How the strength falls to 0 over the training: `linear`, `cosine`, or `none` (it stays).

    Raises:
        RecipeError: The strength is negative, infinite or NaN, or a name is unknown.
    """

    strength: float = 0.1  # higher stays closer to the start, lower fits the labels sooner
    weighting: str = "plain"
    decay: str = "linear"  # with `none`, the penalty holds the model back until the end

    def __post_init__(self) -> None:
        """Refuse a strength below 0, and unknown names of a weighting or a decay."""
        if not 0 <= self.strength < math.inf:
            raise RecipeError(f"strength must be a finite number, 0 or more, found {self.strength}.")
        if self.weighting not in WEIGHTINGS:
            raise RecipeError(f"weighting must be one of {', '.join(WEIGHTINGS)}, found {self.weighting!r}.")
        check_decay_schedule("decay", self.decay)


def anchored_objective(
    objective: Objective,
    model: nn.Module,
    importance: Mapping[str, torch.Tensor] | None,
    options: Anchoring,
    steps: int,
) -> Objective:
    """Add the penalty strength·decay(step)·½·Σ F·(θ − θ_start)² to a loss.

    Args:
        objective: The loss without the penalty.
        model: The model before training; θ are its trainable parameters, and θ_start their values now.
        importance: F by parameter name, each in the shape of the parameter; None for F = 1.
        options: The penalty's strength, and its decay, which is the factor decay(step).
        steps: The number of steps of the training.

    Returns:
        The loss with the penalty, as a function of the model, a batch and the number of completed steps.
    """
    start = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}

    def penalised_loss(trained_model: nn.Module, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        loss = objective(trained_model, batch, step)
        strength = options.strength * decay_factor(options.decay, step, steps)
        if not strength:
            return loss
        for name, parameter in trainable_parameters(trained_model).items():
            squares = (parameter - start[name]).square()
            if importance is not None:
                squares = importance[name] * squares
            loss = loss + 0.5 * strength * squares.sum()
        return loss

    return penalised_loss


def fisher_information(
    model: nn.Module, examples: Examples, order: Integers, likelihood: Likelihood, progress: Progress
) -> dict[str, torch.Tensor]:
    """Estimate the diagonal of the empirical Fisher information, scaled to a mean of 1.

    The estimate is over the first `FISHER_EXAMPLES` distinct examples of the training.

    Args:
        model: A model with a head, run in evaluation mode; its mode is restored.
        examples: The training examples.
        order: Indices of the examples in the order of the training.
        likelihood: The distribution that the outputs parametrise.
        progress: Called after each example.

    Returns:
        By name of each trainable parameter, the mean over examples of the squared gradient of the mean log-likelihood
        of the example's targets, divided by the mean over all weights; 1 everywhere if all gradients are 0.
    """
    import torch

    parameters = trainable_parameters(model)
    was_training = model.training
    indices = list(dict.fromkeys(order.tolist()))[:FISHER_EXAMPLES]  # distinct, in the order of their first use
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    model.eval()
    for num_examples, index in enumerate(indices, start=1):
        batch = {name: tensor.to(device()) for name, tensor in examples.batch([index]).items()}
        loss = likelihood.loss(forward(model, batch).logits, batch["targets"], "mean")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for squares, gradient in zip(sums.values(), gradients, strict=True):
            squares.addcmul_(gradient, gradient)
        progress("fisher", num_examples, len(indices), {})
    model.train(was_training)
    total = sum(float(squares.double().sum()) for squares in sums.values())
    mean = total / sum(squares.numel() for squares in sums.values())
    if not mean:
        return {name: torch.ones_like(squares) for name, squares in sums.items()}
    return {name: squares / mean for name, squares in sums.items()}
