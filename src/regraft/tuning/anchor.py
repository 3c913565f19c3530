"""A penalty that holds weights to where they start, and lets go of them little by little.

Source: the penalty is L2-SP of Xuhong et al., 2018 (arXiv:1802.01483); weighted by the Fisher information it is that of
elastic weight consolidation, Kirkpatrick et al., 2017 (arXiv:1612.00796).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.model.device import device
from regraft.model.outputs import forward
from regraft.recipe import check_fade, fade_factor

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import torch

    from regraft.progress import Progress
    from regraft.task.types import Examples, Likelihood
    from regraft.tuning.trainer import Objective

WEIGHTINGS = ("plain", "fisher")
FISHER_EXAMPLES = 128


@dataclasses.dataclass(frozen=True)
class Anchoring:
    """How weights are held to where they start.

    Args:
        strength: The penalty's weight at the first step.
        weighting: `plain`, every weight alike; or `fisher`, each by how much the targets' likelihood depends on it at
            the start, the mean over all trained weights being 1.
        decay: How the strength falls to 0 over the training: `linear`, `cosine` or `none`.

    Raises:
        RecipeError: An option is out of its range.
    """

    strength: float = 0.1
    weighting: str = "plain"
    decay: str = "linear"

    def __post_init__(self) -> None:
        """Check every option."""
        if not 0 <= self.strength < math.inf:
            raise RecipeError(f"strength must be a number that is not negative, found {self.strength}.")
        if self.weighting not in WEIGHTINGS:
            raise RecipeError(f"weighting is one of {', '.join(WEIGHTINGS)}, found {self.weighting!r}.")
        check_fade("decay", self.decay)


def anchored_objective(
    objective: Objective, model: Any, weights: Mapping[str, torch.Tensor] | None, options: Anchoring, steps: int
) -> Objective:
    """Add strength·decay(step)·½·Σ F·(θ − θ_start)² to a loss.

    Args:
        objective: The loss without it.
        model: The model as it starts; what requires gradients is held.
        weights: F by the parameters' names, of their shapes; None for 1.
        options: How strongly, and how long.
        steps: Steps of the training in all.

    Returns:
        A function of the model, a batch and the steps done so far.
    """
    start = {name: parameter.detach().clone() for name, parameter in _trained(model).items()}

    def anchored(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        loss = objective(model, batch, step)
        strength = options.strength * fade_factor(options.decay, step, steps)
        if not strength:
            return loss
        for name, parameter in _trained(model).items():
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
    """Estimate the diagonal of the empirical Fisher information from the examples a training sees first.

    Args:
        model: A model with a head; what requires gradients is measured. It is left in the mode it had.
        examples: What it is trained on.
        order: The examples in the order of the training.
        likelihood: What outputs are a distribution over.
        progress: Told of each example.

    Returns:
        By parameter, the mean over examples of the squared gradient of the targets' log-likelihood, divided by the mean
        over all parameters; 1 everywhere if all gradients are 0.
    """
    import torch

    trained, was_training = _trained(model), model.training
    chosen = list(dict.fromkeys(order.tolist()))[:FISHER_EXAMPLES]
    sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    model.eval()
    for done, index in enumerate(chosen, start=1):
        batch = {name: tensor.to(device()) for name, tensor in examples.batch([index]).items()}
        loss = likelihood.loss(forward(model, batch).logits, batch["targets"], "mean")
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.addcmul_(gradient, gradient)
        progress("fisher", done, len(chosen), {})
    model.train(was_training)
    mean = sum(float(total.double().sum()) for total in sums.values()) / sum(t.numel() for t in sums.values())
    return {name: total / mean if mean else torch.ones_like(total) for name, total in sums.items()}


def _trained(model: Any) -> dict[str, torch.Tensor]:
    inner = getattr(model, "module", model)  # the model itself where it is wrapped for many devices
    return {name: parameter for name, parameter in inner.named_parameters() if parameter.requires_grad}
