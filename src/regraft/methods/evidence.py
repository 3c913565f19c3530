"""The examples that starts judge weights on, and what these should be taken for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from regraft.methods.job import Job
    from regraft.task import Split
    from regraft.task.types import Likelihood, Signal

MOST = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """Examples that weights are judged on, and what they should be taken for.

    Args:
        split: The examples.
        likelihood: What outputs are a distribution over.
        signal: The old tuned model's outputs on them; None where their targets judge.
    """

    split: Split
    likelihood: Likelihood
    signal: Signal | None = None

    def losses(self, logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the loss of each row: that of its target, or the divergence from the old tuned model.

        Args:
            logits: rows × outputs.
            targets: The targets of these rows, which are not read where the old tuned model judges.
            rows: The numbers of these rows, on the CPU; None for all in their order.

        Returns:
            A number a row, in nats.
        """
        if self.signal is None:
            return self.likelihood.loss(logits, targets)
        return self.likelihood.excess_loss(logits, self.signal.take(slice(None) if rows is None else rows, logits))


def gather(job: Job, labels: int, confidence: float = 0.0) -> Evidence:
    """Draw training examples and find out what they should be taken for.

    Args:
        job: Whose task.
        labels: Examples a stratum, with their targets; 0 to take inputs and the old tuned model's outputs on them.
        confidence: Without labels: how probable the old model's prediction must be for an example to be used.

    Returns:
        At most 256 examples; none if the old model is confident nowhere.

    Raises:
        RecipeError: A confidence is asked for, and the task's outputs have none.
    """
    import numpy as np

    data, likelihood = job.data, job.data.likelihood
    if labels:
        strata = data.task.strata(data.train.targets, data.labels)[1]
        split = data.sample(data.train, min(labels, max(1, MOST // len(strata))), job.recipe.seed)
        job.labelled.update(split.rows.tolist())
        job.notes["labels"] = len(job.labelled)
        return Evidence(split, likelihood)
    split = data.train.take(np.random.default_rng(job.recipe.seed).permutation(len(data.train))[:MOST])
    job.notes["labels"] = 0
    old = job.old_deployment()
    measured = old.confidence(split)
    if measured is None and confidence:
        raise RecipeError(f"a {data.task.type} has no confidence to choose texts by: leave `confidence` out.")
    values = [1.0] * len(split) if measured is None else measured
    sure = np.flatnonzero(np.array(values, dtype=np.float32) >= confidence)
    return Evidence(split.take(sure), likelihood, old.signal(split).take(sure, old.outputs(split)))
