"""What methods that rework deltas share: the graft with a rule, and the texts that a rule is chosen by."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Rule
    from regraft.methods.method import Job
    from regraft.task.types import Examples

MOST = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """Texts that weights are judged on, and what they should be taken for.

    Args:
        examples: The texts.
        targets: Examples × classes: 1 for the true class, or the old tuned model's probabilities.
        labels: How many labels were read for it.
    """

    examples: Examples
    targets: torch.Tensor
    labels: int

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

    Raises:
        RecipeError: The old head is not kept, so that what it gives tells nothing.
    """
    import numpy as np
    import torch

    from regraft.adaptation import load_model
    from regraft.model import device, encode, predict

    data, upgrade = job.data, job.upgrade
    if job.head != "copy":
        raise RecipeError(f"this method judges by the old head's outputs: it takes head copy only, found {job.head}.")
    if labels:
        each = min(labels, max(1, MOST // len(data.labels)))
        split = data.sample(data.train, each, job.recipe.seed)
        targets = torch.eye(len(data.labels))[torch.as_tensor(split.labels)]
        return Evidence(encode(upgrade.new, data, split), targets, len(split))
    split = data.train.take(np.random.default_rng(job.recipe.seed).permutation(len(data.train))[:MOST])
    tuned = load_model(job.adaptation, upgrade.old, data.head).to(device())
    shown = encode(upgrade.old, data, split)
    found = predict(tuned, shown, job.recipe.precision, job.progress).softmax(dim=1)
    sure = (found.amax(dim=1) >= confidence).nonzero().flatten()
    examples = encode(upgrade.new, data, split.take(sure.tolist())) if len(sure) else None
    return Evidence(examples or shown, found[sure], 0)


def graft_reworked(job: Job, rule: Rule) -> None:
    """Write the old weights put onto the new base, every delta changed by a rule, with the head that is wanted.

    Args:
        job: What and where.
        rule: As in `write_rework`.
    """
    from regraft.adaptation.rework import write_rework

    def write(into: Path) -> None:
        written = write_rework(job.adaptation, job.upgrade, rule, into, job.progress, replace=job.replace)
        job.notes.update(written)

    write_with_head(job, write)


def write_with_head(job: Job, write: Callable[[Path], None]) -> None:
    """Write an adaptation whose head is the old one, and change that as it is wanted.

    Args:
        job: What and where.
        write: Fills a folder with the adaptation.
    """
    from regraft.adaptation import change_head

    if job.head == "copy":
        write(job.into)
        return
    kept = job.work / "graft" / "kept"
    write(kept)
    change_head(kept, job.upgrade.new, job.data.head, job.head, job.recipe.seed, job.into)
