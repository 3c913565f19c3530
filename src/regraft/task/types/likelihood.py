"""Likelihoods: distributions over targets that a model's outputs parametrise, and the losses that follow from them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Protocol

from regraft.task.types.dense import DenseLikelihood, Signal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch


class Likelihood(Protocol):
    """A family of distributions over targets; each row of logits parametrises one distribution.

    Logits are a tensor, rows × outputs, and signals a `Signal`; over a vocabulary, they are `TokenLogits` and
    `TopKSignal` or `StateSignal`.
    """

    def loss(self, logits: Any, targets: torch.Tensor, reduction: str = "none") -> torch.Tensor:
        """Compute the negative log-likelihood of targets, in nats.

        Args:
            logits: The model's logits, rows × outputs.
            targets: One target per row.
            reduction: `none` for one value per row, or `mean` for their mean.
        """

    def signal(self, logits: Any) -> Any:
        """Extract the signal that a student learns from.

        Args:
            logits: The teacher's logits, rows × outputs.
        """

    def cached_tensors(
        self, logits: Any, *, top_k: int = 0, temperature: float = 1.0, student_ids: Any = None
    ) -> dict[str, torch.Tensor]:
        """Return the tensors that a cache stores of a teacher's outputs, one row per row of the logits.

        Args:
            logits: The teacher's logits, rows × outputs.
            top_k: Over a vocabulary: the number of most likely tokens to cache; 0 for the hidden states.
            temperature: Over a vocabulary: the divisor of the logits of the most likely tokens.
            student_ids: Over a vocabulary: the student's id of each token of the teacher's; None if they are equal.
        """

    def cached_signal(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        head: Any = None,
        temperature: float = 1.0,
        student_ids: torch.Tensor | None = None,
    ) -> Any:
        """Return the signal that the tensors of a cache stand for.

        Args:
            tensors: The tensors of `cached_tensors`, for all rows.
            head: The teacher's `VocabularyHead`, if hidden states were cached.
            temperature: The temperature of `cached_tensors`.
            student_ids: The ids of `cached_tensors`.
        """

    def teacher_is_right(self, signal: Any, targets: torch.Tensor) -> torch.Tensor:
        """Return whether the teacher's most likely target of each row is right.

        Args:
            signal: The teacher's signal.
            targets: One target per row.
        """

    def mean_divergence(
        self,
        logits: Any,
        signal: Any,
        temperature: float = 1.0,
        row_weights: torch.Tensor | None = None,
        *,
        kind: str = "forward",
        mixture: float = 0.5,
        per_output: bool = False,
    ) -> torch.Tensor:
        """Compute the mean divergence of a student from a teacher over rows, both softened by a temperature.

        Args:
            logits: The student's logits, rows × outputs.
            signal: The teacher's signal for the same rows.
            temperature: The divisor of both models' logits.
            row_weights: A weight per row; None for 1.
            kind: `forward` for KL(teacher ‖ student), `reverse` for KL(student ‖ teacher), or `js`.
            mixture: The teacher's part of the mixture of `js`.
            per_output: Whether the mean is over rows and outputs.

        Raises:
            RecipeError: The likelihood has only the forward divergence.
        """

    def excess_loss(self, logits: Any, signal: Any) -> torch.Tensor:
        """Compute the expected loss on targets drawn from the teacher, less their entropy: KL(teacher ‖ student).

        Up to rounding, these are the row sums of `divergence_terms` at temperature 1. The last bits differ with the
        order of operations. Methods that judge weights by a teacher have always used `excess_loss`, and the
        distillation loss `divergence_terms`, so replacing either would change published results.

        Args:
            logits: The student's logits, rows × outputs.
            signal: The teacher's signal for the same rows.

        Returns:
            One value per row, in nats.
        """

    def overlap(self, logits: Any, signal: Any) -> torch.Tensor:
        """Compute 1 − the total variation distance between the distributions of two models.

        Args:
            logits: One model's logits, rows × outputs.
            signal: The other model's signal for the same rows.

        Returns:
            One value per row, from 0 to 1.
        """

    def predict(self, logits: Any) -> torch.Tensor:
        """Return the most likely target of each row.

        Args:
            logits: The model's logits, rows × outputs.
        """

    def confidence(self, logits: Any) -> torch.Tensor | None:
        """Return the probability of each row's most likely target; None if it is the same for every row.

        Args:
            logits: The model's logits, rows × outputs.
        """

    def right(self, logits: Any, targets: torch.Tensor) -> torch.Tensor:
        """Return whether the most likely target of each row is right.

        Args:
            logits: The model's logits, rows × outputs.
            targets: One target per row.
        """

    def gradient_scale(self, temperature: float) -> float:
        """Return the factor that makes gradients of a softened divergence about as large as those at temperature 1.

        Args:
            temperature: The temperature of `divergence_terms`.
        """

    def chance_loss(self, targets: Sequence[Any], num_outputs: int) -> float:
        """Return the mean loss of a prediction that ignores the input, in nats.

        Args:
            targets: One target per row.
            num_outputs: The number of outputs of the model.
        """


class Categorical(DenseLikelihood):
    """One class out of several: a softmax over the outputs."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str = "none") -> torch.Tensor:
        """Compute the cross-entropy; see `Likelihood.loss`."""
        from torch.nn import functional

        return functional.cross_entropy(logits, targets, reduction=reduction)

    def divergence_terms(self, logits: torch.Tensor, signal: Signal, temperature: float = 1.0) -> torch.Tensor:
        """Compute p_t·(log p_t − log p_s) for each class; see `DenseLikelihood.divergence_terms`."""
        from torch.nn import functional

        return functional.kl_div(
            functional.log_softmax(logits / temperature, dim=-1),
            functional.log_softmax(signal.logits / temperature, dim=-1),
            reduction="none",
            log_target=True,
        )

    def excess_loss(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Compute Σ (p_t·log p_t − p_t·log p_s), cross-entropy minus entropy; see `Likelihood.excess_loss`."""
        import torch
        from torch.nn import functional

        probabilities = signal.logits.softmax(dim=1)
        log_predicted = functional.log_softmax(logits, dim=-1)
        losses: torch.Tensor = torch.xlogy(probabilities, probabilities) - probabilities * log_predicted
        return losses.sum(dim=1)

    def overlap(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Sum the smaller of the two models' probabilities over classes; see `Likelihood.overlap`."""
        probabilities = logits.log_softmax(dim=1).exp()
        signal_probabilities = signal.logits.log_softmax(dim=1).exp()
        return probabilities.minimum(signal_probabilities).sum(dim=1)

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the class with the largest logit; see `Likelihood.predict`."""
        return logits.argmax(dim=-1)

    def confidence(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the largest probability; see `Likelihood.confidence`."""
        return logits.softmax(dim=-1).amax(dim=-1)

    def right(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compare the predicted class with the target; see `Likelihood.right`."""
        return self.predict(logits) == targets

    def gradient_scale(self, temperature: float) -> float:
        """Return T² (Hinton et al., 2015, arXiv:1503.02531); see `Likelihood.gradient_scale`."""
        return temperature**2

    def chance_loss(self, targets: Sequence[Any], num_outputs: int) -> float:
        """Return ln(classes), the loss of the uniform distribution; see `Likelihood.chance_loss`."""
        return math.log(num_outputs)


CATEGORICAL = Categorical()
"""The likelihood of task types that predict one class per row; it has no state."""


class Bernoulli(DenseLikelihood):
    """Any of several labels: an independent sigmoid of each output. All values are means over the labels."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str = "none") -> torch.Tensor:
        """Compute the binary cross-entropy; see `Likelihood.loss`."""
        from torch.nn import functional

        if reduction == "mean":
            return functional.binary_cross_entropy_with_logits(logits, targets.to(logits))
        return functional.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none").mean(dim=-1)

    def divergence_terms(self, logits: torch.Tensor, signal: Signal, temperature: float = 1.0) -> torch.Tensor:
        """Compute the divergence of each label, over the number of labels; see `DenseLikelihood.divergence_terms`."""
        from torch.nn import functional

        student, teacher = logits / temperature, signal.logits / temperature
        present = teacher.sigmoid() * (functional.logsigmoid(teacher) - functional.logsigmoid(student))
        absent = (-teacher).sigmoid() * (functional.logsigmoid(-teacher) - functional.logsigmoid(-student))
        return (present + absent) / logits.shape[-1]

    def excess_loss(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Sum the terms of the divergence; see `Likelihood.excess_loss`."""
        return self.divergence_terms(logits, signal).sum(dim=-1)

    def overlap(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Return 1 − the mean distance of the labels' probabilities; see `Likelihood.overlap`."""
        return 1 - (logits.sigmoid() - signal.logits.sigmoid()).abs().mean(dim=-1)

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """Return 1 for each label whose probability is above one half, else 0; see `Likelihood.predict`."""
        return (logits > 0).long()

    def confidence(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the probability of the whole predicted set of labels; see `Likelihood.confidence`."""
        return logits.abs().sigmoid().prod(dim=-1)

    def right(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compare the predicted set of labels with the target; see `Likelihood.right`."""
        return (self.predict(logits) == targets).all(dim=-1)

    def gradient_scale(self, temperature: float) -> float:
        """Return T², as for a softmax; see `Likelihood.gradient_scale`."""
        return temperature**2

    def chance_loss(self, targets: Sequence[Any], num_outputs: int) -> float:
        """Return ln 2, the loss of a probability of one half for every label; see `Likelihood.chance_loss`."""
        return math.log(2)


BERNOULLI = Bernoulli()
"""The likelihood of task types that predict a set of labels per row; it has no state."""


@dataclasses.dataclass(frozen=True)
class Normal(DenseLikelihood):
    """A number: a normal distribution around the single output, with the same standard deviation for every row.

    Losses leave out the entropy's constant, so that the loss of a perfect prediction is 0.

    Args:
        deviation: The standard deviation, in the unit of the targets.
        tolerance: The largest error of a right prediction, in the unit of the targets.
    """

    deviation: float = 1.0
    tolerance: float = 0.0

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str = "none") -> torch.Tensor:
        """Compute half the squared error in standard deviations; see `Likelihood.loss`."""
        losses = 0.5 * ((self.predict(logits) - targets.to(logits)) / self.deviation) ** 2
        return losses.mean() if reduction == "mean" else losses

    def divergence_terms(self, logits: torch.Tensor, signal: Signal, temperature: float = 1.0) -> torch.Tensor:
        """Compute half the squared distance of the means in deviations, at any temperature; see `Likelihood`."""
        return 0.5 * ((logits - signal.logits) / self.deviation) ** 2

    def excess_loss(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Sum the single term of the divergence; see `Likelihood.excess_loss`."""
        return self.divergence_terms(logits, signal).sum(dim=-1)

    def overlap(self, logits: torch.Tensor, signal: Signal) -> torch.Tensor:
        """Return erfc(distance of the means / √8) in deviations; see `Likelihood.overlap`."""
        distance = (self.predict(logits) - self.predict(signal.logits)).abs() / self.deviation
        return (distance / math.sqrt(8)).erfc()

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the output; see `Likelihood.predict`."""
        return logits.squeeze(-1)

    def confidence(self, logits: torch.Tensor) -> None:
        """Return None, because the density is the same for every row; see `Likelihood.confidence`."""

    def right(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return whether the error is within the tolerance; see `Likelihood.right`."""
        return (self.predict(logits) - targets.to(logits)).abs() <= self.tolerance

    def gradient_scale(self, temperature: float) -> float:
        """Return 1, because the temperature changes nothing; see `Likelihood.gradient_scale`."""
        return 1.0

    def chance_loss(self, targets: Sequence[Any], num_outputs: int) -> float:
        """Return the loss of always predicting the mean; see `Likelihood.chance_loss`."""
        import numpy as np

        return 0.5 * float(np.var(targets)) / self.deviation**2
