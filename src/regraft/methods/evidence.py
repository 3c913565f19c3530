"""The examples on which starts measure losses against labels or the old model's outputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from regraft.methods.job import Job
    from regraft.task import Split
    from regraft.task.types import Likelihood, Signal

MAX_EXAMPLES = 256  # more measure losses better; with so few, a start takes seconds on a CPU


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """Examples, and the reference for losses on them: their targets, or the old model's outputs.

    Args:
        split: The examples, drawn from the training examples.
        likelihood: The distribution over targets that the model's outputs parametrise.
        signal: The old model's outputs on the examples; None to use the examples' targets.
    """

    split: Split
    likelihood: Likelihood
    signal: Signal | None = None

    def losses(
        self, logits: torch.Tensor, targets: torch.Tensor, row_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the loss of each row against its target, or its divergence from the old model.

        Args:
            logits: The outputs, [rows, outputs].
            targets: The targets of the rows; unused if there is a signal.
            row_indices: The indices of the rows in the signal, on the CPU; None for all rows in order.

        Returns:
            The losses in nats, [rows].
        """
        if self.signal is None:
            return self.likelihood.loss(logits, targets)
        signal = self.signal.take(slice(None) if row_indices is None else row_indices, logits)
        return self.likelihood.excess_loss(logits, signal)


def sample_evidence(job: Job, examples_per_stratum: int, min_confidence: float = 0.0) -> Evidence:
    """Draw training examples, with targets or the old model's outputs as the reference.

    The number of labelled examples that are drawn is noted in the job.

    Args:
        job: The job, with the task's training examples.
        examples_per_stratum: The number of examples with targets, as the task's `shots`: per class in classification;
            0 to draw from all examples and use the old model's outputs.
        min_confidence: Without targets: the least confidence, 0–1, that the old model's prediction for an example must
            have for the example to be used.

    Returns:
        At most `MAX_EXAMPLES` examples, or one per stratum if there are more strata; none if the old model is confident
        on none.

    Raises:
        KindError: The old and the new base have rows for different words.
        RecipeError: A confidence is required, and the task's outputs have none.
    """
    import numpy as np

    from regraft.model.examples import check_rows, encode

    data = job.data
    if examples_per_stratum:
        strata, names = data.task.strata(data.train.targets, data.labels)
        sizes = np.bincount(strata, minlength=len(names)).tolist()
        shots = min(examples_per_stratum, MAX_EXAMPLES)
        while shots > 1 and sum(data.task.sample_counts(shots, sizes)) > MAX_EXAMPLES:
            shots -= 1
        split = data.sample(data.train, shots, job.recipe.seed)
        job.labelled_rows.update(split.row_numbers.tolist())
        job.notes["labels"] = len(job.labelled_rows)
        return Evidence(split, data.likelihood)
    split = data.train.take(np.random.default_rng(job.recipe.seed).permutation(len(data.train))[:MAX_EXAMPLES])
    job.notes["labels"] = 0
    old = job.old_deployment()
    old_confidence = old.confidence(split)
    if old_confidence is None:
        if min_confidence:
            raise RecipeError(f"the outputs of a {data.task.type} have no confidence. Leave out the option confidence.")
        old_confidence = [1.0] * len(split)
    confident = np.flatnonzero(np.array(old_confidence, dtype=np.float32) >= min_confidence)
    old_examples = old.examples(split)
    check_rows(old_examples, encode(job.upgrade.new, data, split), split)
    rows = old_examples.rows(confident.tolist())
    return Evidence(
        split.take(confident), data.likelihood, old.signal(split, job.student_ids()).take(rows, old.outputs(split))
    )
