"""A penalty on the distance of the weights from where they start, faded out over the training.

Source: the penalty is L2-SP of Xuhong et al., 2018 (arXiv:1802.01483); weighted by the Fisher information it is that of
elastic weight consolidation, Kirkpatrick et al., 2017 (arXiv:1612.00796).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.model.device import device
from regraft.model.outputs import forward, unwrap_parallel
from regraft.recipe import check_fade_schedule, fade_factor

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import torch

    from regraft.progress import Progress
    from regraft.task.types import Examples, Likelihood
    from regraft.tuning.trainer import Objective

WEIGHTINGS = ("plain", "fisher")
FISHER_EXAMPLES = 128
"""Each costs a forward and a backward pass of its own; more examples lower the variance of the estimate."""


@dataclasses.dataclass(frozen=True)
class Anchoring:
    """Options of the penalty on the distance from the starting weights.

    Args:
        strength: The penalty's weight at the first step.
        weighting: `plain`, every weight alike; or `fisher`, each weight by its Fisher information at the start, scaled
            to a mean of 1.
        decay: How the strength falls to 0 over the training: `linear`, `cosine` or `none`.

    Raises:
        RecipeError: An option is out of its range.
    """

    strength: float = 0.1  # higher stays closer to the start, lower fits the labels sooner
    weighting: str = "plain"
    decay: str = "linear"

    def __post_init__(self) -> None:
        """Check that every option is in its range."""
        if not 0 <= self.strength < math.inf:
            raise RecipeError(f"strength must be a number that is not negative, found {self.strength}.")
        if self.weighting not in WEIGHTINGS:
            raise RecipeError(f"weighting must be one of {', '.join(WEIGHTINGS)}, found {self.weighting!r}.")
        check_fade_schedule("decay", self.decay)


def anchored_objective(
    objective: Objective, model: Any, weights: Mapping[str, torch.Tensor] | None, options: Anchoring, steps: int
) -> Objective:
    """Add the penalty strength·decay(step)·½·Σ F·(θ − θ_start)² to a loss.

    Args:
        objective: The loss without the penalty.
        model: The model before training; the penalty is on its parameters that require gradients.
        weights: F by parameter name, each of its parameter's shape; None for F = 1.
        options: The penalty's strength and its decay.
        steps: The number of steps of the training.

    Returns:
        The loss with the penalty, as a function of the model, a batch and the number of completed steps.
    """
    start = {name: parameter.detach().clone() for name, parameter in _trained_parameters(model).items()}

    def anchored(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        loss = objective(model, batch, step)
        strength = options.strength * fade_factor(options.decay, step, steps)
        if not strength:
            return loss
        for name, parameter in _trained_parameters(model).items():
            squares = (parameter - start[name]).square()
            loss = loss + 0.5 * strength * (squares if weights is None else weights[name] * squares).sum()
        return loss

    return anchored


def fisher_information(
    model: Any,
    examples: Examples,
    order: np.ndarray[Any, np.dtype[np.int64]],
    likelihood: Likelihood,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Estimate the diagonal of the empirical Fisher information, scaled to a mean of 1.

    The estimate is over the first `FISHER_EXAMPLES` distinct examples of the training.

    Args:
        model: A model with a head. Its parameters that require gradients are covered; its mode is unchanged.
        examples: The training examples.
        order: Indices of the examples in the order of the training.
        likelihood: The distribution that the outputs parametrise.
        progress: Called after each example.

    Returns:
        By parameter name, the mean over examples of the squared gradient of the targets' log-likelihood, divided by the
        mean over all parameters; 1 everywhere if all gradients are 0.
    """
    import torch

    parameters = _trained_parameters(model)
    was_training = model.training
    indices = list(dict.fromkeys(order.tolist()))[:FISHER_EXAMPLES]
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    model.eval()
    for count, index in enumerate(indices, start=1):
        batch = {name: tensor.to(device()) for name, tensor in examples.batch([index]).items()}
        loss = likelihood.loss(forward(model, batch).logits, batch["targets"], "mean")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.addcmul_(gradient, gradient)
        progress("fisher", count, len(indices), {})
    model.train(was_training)
    mean = sum(float(total.double().sum()) for total in sums.values()) / sum(t.numel() for t in sums.values())
    return {name: total / mean if mean else torch.ones_like(total) for name, total in sums.items()}


def _trained_parameters(model: Any) -> dict[str, torch.Tensor]:
    inner = unwrap_parallel(model)
    return {name: parameter for name, parameter in inner.named_parameters() if parameter.requires_grad}
