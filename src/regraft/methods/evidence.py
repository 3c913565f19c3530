"""The texts that starts judge weights on, and what these should be taken for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from regraft.methods.job import Job
    from regraft.task.types import Examples

MOST = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """Texts that weights are judged on, and what they should be taken for.

    Args:
        examples: The texts.
        targets: Examples × classes: 1 for the true class, or the old tuned model's probabilities.
    """

    examples: Examples
    targets: torch.Tensor

    def losses(self, logits: torch.Tensor, rows: list[int] | None = None) -> torch.Tensor:
        """KL(targets ‖ softmax(logits)) of each example; with true classes that is the cross-entropy.

        Args:
            logits: Examples × classes.
            rows: Which examples these are; None for all in their order.

        Returns:
            A number an example.
        """
        import torch
        from torch.nn import functional

        targets = (self.targets if rows is None else self.targets[rows]).to(logits)
        loss: torch.Tensor = torch.xlogy(targets, targets) - targets * functional.log_softmax(logits, dim=-1)
        return loss.sum(dim=1)


def gather(job: Job, labels: int, confidence: float = 0.0) -> Evidence:
    """Draw training examples and find out what they should be taken for.

    Args:
        job: Whose task.
        labels: Examples a class, with their labels; 0 to take texts alone and the old tuned model's outputs on them.
        confidence: Without labels: how probable the old model's class must be for a text to be used.

    Returns:
        At most 256 examples; none if the old model is confident nowhere.
    """
    import numpy as np
    import torch

    from regraft.adaptation import load_model
    from regraft.model import device, encode, predict

    data, upgrade = job.data, job.upgrade
    if labels:
        each = min(labels, max(1, MOST // len(data.labels)))
        split = data.sample(data.train, each, job.recipe.seed)
        job.labelled.update(split.rows.tolist())
        targets = torch.eye(len(data.labels))[torch.as_tensor(split.labels)]
        return Evidence(encode(upgrade.new, data, split), targets)
    split = data.train.take(np.random.default_rng(job.recipe.seed).permutation(len(data.train))[:MOST])
    tuned = load_model(job.adaptation, upgrade.old, data.labels).to(device())
    shown = encode(upgrade.old, data, split)
    found = predict(tuned, shown, job.recipe.precision, job.progress).softmax(dim=1)
    sure = (found.amax(dim=1) >= confidence).nonzero().flatten()
    examples = encode(upgrade.new, data, split.take(sure.tolist())) if len(sure) else None
    return Evidence(examples or shown, found[sure])
