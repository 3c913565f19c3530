"""The likelihood of tokens: a categorical distribution whose logits are never materialised as a whole."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from regraft.task.types.token_logits import StateSignal, TokenLogits, TopKSignal, VocabularyHead

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch


class TokenCategorical:
    """One token out of a vocabulary; as `Categorical`, but for `TokenLogits`.

    It has `mean_divergence` in place of `divergence_terms`, whose terms would be as many as the logits.
    """

    def loss(self, logits: TokenLogits, targets: torch.Tensor, reduction: str = "none") -> torch.Tensor:
        """Compute the cross-entropy; see `Likelihood.loss`."""
        from regraft.task.types.token_chunks import row_losses, weighted_sum
        from regraft.task.types.token_losses import cross_entropy

        loss = cross_entropy(logits, targets)
        return weighted_sum(logits, loss) / max(1, len(logits)) if reduction == "mean" else row_losses(logits, loss)

    def signal(self, logits: TokenLogits) -> StateSignal:
        """Return the hidden states and the head; see `Likelihood.signal`."""
        return StateSignal(logits.states.detach(), logits.head.detach())

    def cached_tensors(
        self, logits: TokenLogits, *, top_k: int = 0, temperature: float = 1.0, student_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the most likely tokens, or with `top_k` 0 the hidden states; see `Likelihood.cached_tensors`."""
        from regraft.task.types.token_losses import extract_top_k

        if not top_k:
            return {"states": logits.states.detach()}
        top = extract_top_k(logits, top_k, temperature, student_ids)
        return {"log_probabilities": top.log_probabilities, "ids": top.ids}

    def cached_signal(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        head: VocabularyHead | None = None,
        temperature: float = 1.0,
        student_ids: torch.Tensor | None = None,
    ) -> TopKSignal | StateSignal:
        """Return the signal of a cache; see `Likelihood.cached_signal`."""
        if "ids" in tensors:
            return TopKSignal(tensors["log_probabilities"], tensors["ids"], temperature)
        assert head is not None  # hidden states are cached without the head
        return StateSignal(tensors["states"], head, student_ids)

    def teacher_is_right(self, signal: TopKSignal | StateSignal, targets: torch.Tensor) -> torch.Tensor:
        """Compare the teacher's most likely token with the target; see `Likelihood.teacher_is_right`."""
        if isinstance(signal, TopKSignal):
            return signal.ids[:, 0] == targets
        predicted = self.predict(signal.logits)
        if signal.student_ids is not None:
            predicted = signal.student_ids.to(predicted.device)[predicted]
        return predicted.to(targets.device) == targets

    def mean_divergence(
        self,
        logits: TokenLogits,
        signal: TopKSignal | StateSignal,
        temperature: float = 1.0,
        row_weights: torch.Tensor | None = None,
        *,
        kind: str = "forward",
        mixture: float = 0.5,
        per_output: bool = False,
    ) -> torch.Tensor:
        """Compute Σ w·divergence / rows, differentiable.

        Args:
            logits: The student's logits.
            signal: The teacher's signal for the same rows.
            temperature: The divisor of both models' logits; the result is not multiplied by `gradient_scale`.
            row_weights: w, a constant per row; None for 1.
            kind: `forward`, `reverse` or `js`; see `token_losses.divergence`.
            mixture: The teacher's part of the mixture of `js`.
            per_output: Whether the mean is over rows and tokens.

        Returns:
            A scalar, in nats.
        """
        from regraft.task.types.token_losses import divergence_sum

        count = logits.numel() if per_output else len(logits)
        return divergence_sum(logits, signal, temperature, kind, mixture, row_weights) / max(1, count)

    def excess_loss(self, logits: TokenLogits, signal: TopKSignal | StateSignal) -> torch.Tensor:
        """Compute the forward KL of each row; see `Likelihood.excess_loss`."""
        from regraft.task.types.token_chunks import row_losses
        from regraft.task.types.token_losses import divergence

        return row_losses(logits, divergence(logits, signal))

    def overlap(self, logits: TokenLogits, signal: TopKSignal | StateSignal) -> torch.Tensor:
        """Sum the smaller of the two models' probabilities over tokens; see `Likelihood.overlap`."""
        from regraft.task.types.token_losses import overlaps

        return overlaps(logits, signal)

    def predict(self, logits: TokenLogits) -> torch.Tensor:
        """Return the token with the largest logit; see `Likelihood.predict`."""
        from regraft.task.types.token_chunks import map_chunks

        return map_chunks(logits, lambda z, _: z.argmax(1))

    def confidence(self, logits: TokenLogits) -> torch.Tensor:
        """Return the largest probability; see `Likelihood.confidence`."""
        from regraft.task.types.token_chunks import map_chunks

        return map_chunks(logits, lambda z, _: z.softmax(1).amax(1))

    def right(self, logits: TokenLogits, targets: torch.Tensor) -> torch.Tensor:
        """Compare the predicted token with the target; see `Likelihood.right`."""
        return self.predict(logits) == targets

    def gradient_scale(self, temperature: float) -> float:
        """Return T² (Hinton et al., 2015, arXiv:1503.02531); see `Likelihood.gradient_scale`."""
        return temperature**2

    def chance_loss(self, targets: Sequence[Any], num_outputs: int) -> float:
        """Return ln(tokens), the loss of the uniform distribution; see `Likelihood.chance_loss`."""
        return math.log(num_outputs)


TOKENS = TokenCategorical()
"""The likelihood of task types that predict tokens; it has no state."""
