"""The examples on which starts measure losses, with labels or the old model's outputs as the reference."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from regraft.methods.job import Job
    from regraft.task import Split
    from regraft.task.types import Likelihood, Signal

MAX_EXAMPLES = 256  # a balance: few enough that a start takes seconds on a CPU


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """Examples, and the reference for losses on them: their targets, or the old model's outputs.

    Args:
        split: The examples.
        likelihood: The likelihood of the model's outputs.
        signal: The old model's outputs on the examples; None to use their targets.
    """

    split: Split
    likelihood: Likelihood
    signal: Signal | None = None

    def losses(self, logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the loss of each row: that of its target, or the divergence from the old model.

        Args:
            logits: The outputs, [rows, outputs].
            targets: The targets of the rows; unused if there is a signal.
            rows: The indices of the rows, on the CPU; None for all rows in order.

        Returns:
            The losses in nats, [rows].
        """
        if self.signal is None:
            return self.likelihood.loss(logits, targets)
        return self.likelihood.excess_loss(logits, self.signal.take(slice(None) if rows is None else rows, logits))


def sample_evidence(job: Job, labels: int, confidence: float = 0.0) -> Evidence:
    """Draw training examples, with their targets or the old model's outputs as the reference.

    Args:
        job: The job, with the task.
        labels: The number of examples per stratum, with their targets; 0 to use the old model's outputs.
        confidence: Without labels: the least confidence of the old model's prediction for an example to be used.

    Returns:
        At most 256 examples; none if the old model is confident on none.

    Raises:
        RecipeError: A confidence is required, and the task's outputs have none.
    """
    import numpy as np

    data, likelihood = job.data, job.data.likelihood
    if labels:
        strata = data.task.strata(data.train.targets, data.labels)[1]
        split = data.sample(data.train, min(labels, max(1, MAX_EXAMPLES // len(strata))), job.recipe.seed)
        job.labelled.update(split.row_numbers.tolist())
        job.notes["labels"] = len(job.labelled)
        return Evidence(split, likelihood)
    split = data.train.take(np.random.default_rng(job.recipe.seed).permutation(len(data.train))[:MAX_EXAMPLES])
    job.notes["labels"] = 0
    old = job.old_deployment()
    old_confidence = old.confidence(split)
    if old_confidence is None and confidence:
        raise RecipeError(f"the outputs of a {data.task.type} have no confidence. Leave out the option confidence.")
    values = [1.0] * len(split) if old_confidence is None else old_confidence
    confident = np.flatnonzero(np.array(values, dtype=np.float32) >= confidence)
    return Evidence(split.take(confident), likelihood, old.signal(split).take(confident, old.outputs(split)))
