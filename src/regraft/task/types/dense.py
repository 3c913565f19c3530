"""What the likelihoods have in common whose logits are tensors, rows × outputs, rather than states and a head."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from regraft.task.split import Integers


@dataclasses.dataclass(frozen=True, eq=False)
class Signal:
    """The part of a teacher's outputs that a student learns from.

    Args:
        logits: The teacher's logits, rows × outputs.
    """

    logits: torch.Tensor

    def take(self, rows: torch.Tensor | Integers | slice, template: torch.Tensor) -> Signal:
        """Return the signal of some rows.

        Args:
            rows: The indices of the rows, on the CPU.
            template: A tensor that has the device and dtype of the result, such as the student's logits.
        """
        return Signal(self.logits[rows].to(template))


class DenseLikelihood(ABC):
    """The methods of `Likelihood` that follow from the divergence of each output."""

    @abstractmethod
    def right(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return whether the most likely target of each row is right; see `Likelihood.right`."""

    @abstractmethod
    def divergence_terms(self, logits: torch.Tensor, signal: Signal, temperature: float = 1.0) -> torch.Tensor:
        """Compute the terms of KL(teacher ‖ student), both softened by a temperature.

        Their sum over a row is the divergence of that row. The terms are returned unsummed because the distillation
        loss weights each of them.

        Args:
            logits: The student's logits, rows × outputs.
            signal: The teacher's signal for the same rows.
            temperature: The divisor of both models' logits.

        Returns:
            The terms, rows × outputs, in nats.
        """

    def signal(self, logits: torch.Tensor) -> Signal:
        """Return all of the logits; see `Likelihood.signal`."""
        return Signal(logits)

    def cached_tensors(
        self, logits: torch.Tensor, *, top_k: int = 0, temperature: float = 1.0, student_ids: Any = None
    ) -> dict[str, torch.Tensor]:
        """Return all of the logits; see `Likelihood.cached_tensors`."""
        return {"logits": logits}

    def cached_signal(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        head: Any = None,
        temperature: float = 1.0,
        student_ids: Any = None,
    ) -> Signal:
        """Return the logits as a signal; see `Likelihood.cached_signal`."""
        return Signal(tensors["logits"])

    def teacher_is_right(self, signal: Signal, targets: torch.Tensor) -> torch.Tensor:
        """Return whether the teacher's prediction is right; see `Likelihood.teacher_is_right`."""
        return self.right(signal.logits, targets)

    def mean_divergence(
        self,
        logits: torch.Tensor,
        signal: Signal,
        temperature: float = 1.0,
        row_weights: torch.Tensor | None = None,
        *,
        kind: str = "forward",
        mixture: float = 0.5,
        per_output: bool = False,
    ) -> torch.Tensor:
        """Sum the terms of the divergence, weighted by row, over the number of rows; see `Likelihood`."""
        if kind != "forward":
            raise RecipeError(f"divergence {kind!r} is for text generation only. Use forward.")
        terms = self.divergence_terms(logits, signal, temperature)
        if row_weights is not None:
            terms = terms * row_weights[:, None]
        return terms.sum() / (logits.numel() if per_output else len(logits))
