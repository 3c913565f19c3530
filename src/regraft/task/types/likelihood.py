"""What the outputs of a model are a distribution over, and the losses that follow from it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from regraft.task.split import Integers


@dataclasses.dataclass(frozen=True, eq=False)
class Signal:
    """What is kept of a teacher's outputs.

    Args:
        logits: rows × outputs.
    """

    logits: torch.Tensor

    def take(self, rows: torch.Tensor | Integers | slice, like: torch.Tensor) -> Signal:
        """Return the signal of some rows.

        Args:
            rows: Which rows, on the CPU.
            like: A tensor of the device and type that are needed.
        """
        return Signal(self.logits[rows].to(like))


class Likelihood(Protocol):
    """A family of distributions; each row of logits is one of them."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str = "none") -> torch.Tensor:
        """Compute the negative log-likelihood of targets in nats.

        Args:
            logits: rows × outputs.
            targets: A target a row.
            reduction: `none` for a number a row, or `mean` over them.
        """

    def signal(self, logits: torch.Tensor) -> Signal:
        """Return what a student learns from.

        Args:
            logits: The teacher's, rows × outputs.
        """

    def divergence_terms(self, logits: torch.Tensor, signal: Signal, temperature: float = 1.0) -> torch.Tensor:
        """Compute the terms of KL(teacher ‖ student), both softened; their sum over a row is its divergence.

        Args:
            logits: The student's, rows × outputs.
            signal: The teacher's, of the same rows.
            temperature: What both models' logits are divided by.

        Returns:
            rows × outputs, in nats.
        """

    def excess_loss(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Compute the expected loss of targets that the teacher draws, less the teacher's own: KL(teacher ‖ student).

        Args:
            logits: The student's, rows × outputs.
            signal: The teacher's, of the same rows.

        Returns:
            A number a row, in nats.
        """

    def overlap(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Compute 1 − the total variation distance of two models' distributions.

        Args:
            logits: The one's, rows × outputs.
            signal: The other's, of the same rows.

        Returns:
            A number a row, from 0 to 1.
        """

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the likeliest target of each row.

        Args:
            logits: rows × outputs.
        """

    def confidence(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return how probable the likeliest target of each row is; None where that is the same for every row.

        Args:
            logits: rows × outputs.
        """

    def right(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return of each row whether its likeliest target is right.

        Args:
            logits: rows × outputs.
            targets: A target a row.
        """

    def gradient_scale(self, temperature: float) -> float:
        """Return what makes the gradients of a softened divergence as large as those of one that is not.

        Args:
            temperature: As for `divergence`.
        """

    def chance_loss(self, targets: Sequence[Any], outputs: int) -> float:
        """Return the loss of guessing without looking, in nats.

        Args:
            targets: Those to guess.
            outputs: How many outputs a model has.
        """


class Categorical:
    """One of several classes: softmax over the outputs."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str = "none") -> torch.Tensor:
        """Compute the cross-entropy; see `Likelihood`."""
        from torch.nn import functional

        return functional.cross_entropy(logits, targets, reduction=reduction)

    def signal(self, logits: torch.Tensor) -> Signal:
        """Return all logits; see `Likelihood`."""
        return Signal(logits)

    def divergence_terms(self, logits: torch.Tensor, signal: Signal, temperature: float = 1.0) -> torch.Tensor:
        """Compute p_t·(log p_t − log p_s) for each class; see `Likelihood`."""
        from torch.nn import functional

        return functional.kl_div(
            functional.log_softmax(logits / temperature, dim=-1),
            functional.log_softmax(signal.logits / temperature, dim=-1),
            reduction="none",
            log_target=True,
        )

    def excess_loss(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Compute cross-entropy − entropy of the teacher's probabilities; see `Likelihood`."""
        import torch
        from torch.nn import functional

        drawn = signal.logits.softmax(dim=1)
        losses: torch.Tensor = torch.xlogy(drawn, drawn) - drawn * functional.log_softmax(logits, dim=-1)
        return losses.sum(dim=1)

    def overlap(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Sum the smaller of both probabilities of each class; see `Likelihood`."""
        return logits.log_softmax(dim=1).exp().minimum(signal.logits.log_softmax(dim=1).exp()).sum(dim=1)

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the class of the largest logit; see `Likelihood`."""
        return logits.argmax(dim=-1)

    def confidence(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the largest probability; see `Likelihood`."""
        return logits.softmax(dim=-1).amax(dim=-1)

    def right(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compare classes; see `Likelihood`."""
        return self.predict(logits) == targets

    def gradient_scale(self, temperature: float) -> float:
        """Return T² (Hinton et al., 2015, arXiv:1503.02531); see `Likelihood`."""
        return temperature**2

    def chance_loss(self, targets: Sequence[Any], outputs: int) -> float:
        """Return ln(classes), the loss of the uniform distribution; see `Likelihood`."""
        import math

        return math.log(outputs)


CATEGORICAL = Categorical()
