"""The old tuned model as a teacher: the distillation loss, and the teacher's outputs computed once.

Source: Qin et al., Recyclable Tuning for Continual Pre-training, 2023 (arXiv:2305.08702), section 5.2, and the
authors' reference implementation; the hidden-state term is Sun et al.'s patient knowledge distillation
(arXiv:1908.09355).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import is_sealed, replace_atomically, seal
from regraft.errors import MismatchError, RecipeError
from regraft.model.batches import for_each_batch
from regraft.model.outputs import forward
from regraft.recipe import check_fade, fade_factor
from regraft.task.types import Signal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from regraft.model import Deployment
    from regraft.model.outputs import Output
    from regraft.task import Split
    from regraft.task.split import Integers
    from regraft.task.types import Likelihood
    from regraft.tuning.trainer import Objective

HOTTEST = 10_000  # softened so far, outputs are alike in every digit of float32


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The weights of the distillation loss.

    Args:
        alpha: The share of the teacher's soft labels; 1 − alpha is left for the true labels.
        beta: The weight of the hidden states' mean squared error, 0 for none.
        temperature: Softens both models' outputs.
        kl_reduction: `batchmean` sums the divergence over classes and averages it over the batch (the textbook's);
            `mean` averages over both, as the paper's reference does.
        flip_weight: Where above 0, the teacher counts 1 + flip_weight times as much on examples it has right as on
            those it has wrong, the mean over the batch staying 1: what was right is to stay right.
        decay: How alpha and beta fall to 0 over the training, so that the labels win in the end: `none` (they stay, as
            in the paper), `linear` or `cosine`. Where the new base is much the better one, a teacher that stays holds
            the student down to what it knew.

    Raises:
        RecipeError: A number is out of its range.
    """

    alpha: float = 0.7
    beta: float = 1.0
    temperature: float = 5.0
    kl_reduction: str = "batchmean"
    flip_weight: float = 0.0
    decay: str = "none"

    def __post_init__(self) -> None:
        """Check every number."""
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha must be from 0 to 1, found {self.alpha}.")
        if not 0 <= self.beta < math.inf or not 0 < self.temperature <= HOTTEST:
            raise RecipeError(
                f"beta must not be negative (found {self.beta}), temperature above 0 and up to {HOTTEST:,} "
                f"({self.temperature})."
            )
        if self.kl_reduction not in ("batchmean", "mean"):
            raise RecipeError(f"kl_reduction is batchmean or mean, found {self.kl_reduction!r}.")
        if not 0 <= self.flip_weight < math.inf:
            raise RecipeError(f"flip_weight must be a number that is not negative, found {self.flip_weight}.")
        check_fade("decay", self.decay)

    def at(self, step: int, steps: int) -> Distillation:
        """Return what the weights have become.

        Args:
            step: Steps done so far.
            steps: Steps in all.

        Returns:
            The same with alpha and beta as far down as they are by then.
        """
        left = fade_factor(self.decay, step, steps)
        return dataclasses.replace(self, alpha=self.alpha * left, beta=self.beta * left)


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """What a teacher says of the examples of a training, computed once.

    Args:
        signal: At each row.
        hidden: The hidden states there, rows × layers × width; of width 0 where they are not learned.
    """

    signal: Signal
    hidden: torch.Tensor


def teacher_loss(
    output: Output,
    batch: Mapping[str, torch.Tensor],
    taught: TeacherOutputs,
    options: Distillation,
    likelihood: Likelihood,
) -> torch.Tensor:
    """α·T²·KL(teacher ‖ student, softened by T) + β·½·MSE(h_s, h_t), rows weighted by whether the teacher is right.

    Args:
        output: The student's, with hidden states if β is not 0.
        batch: Its `targets`, unused where flip_weight is 0, and the numbers of its rows.
        taught: What the teacher says of all rows.
        options: α, β, T, the reduction of the KL and flip_weight.
        likelihood: What outputs are a distribution over.

    Returns:
        The loss, a scalar.
    """
    from torch.nn import functional

    logits, rows, targets = output.logits, batch["row"].cpu(), batch["targets"]
    signal = taught.signal.take(rows, logits)
    divergence = likelihood.divergence_terms(logits, signal, options.temperature)
    apart = None
    if options.beta:
        apart = functional.mse_loss(output.row_states(), taught.hidden[rows].to(logits), reduction="none")
    if options.flip_weight:
        is_right = likelihood.right(signal.logits, targets)
        weights = 1 + options.flip_weight * is_right.to(logits.dtype)
        weights = weights / weights.mean()
        divergence = divergence * weights[:, None]
        apart = apart * weights[:, None, None] if apart is not None else None
    count = len(logits) if options.kl_reduction == "batchmean" else logits.numel()
    loss = options.alpha * likelihood.gradient_scale(options.temperature) * (divergence.sum() / count)
    return loss if apart is None else loss + options.beta * 0.5 * apart.mean()


def distillation_loss(
    output: Output,
    batch: Mapping[str, torch.Tensor],
    taught: TeacherOutputs,
    options: Distillation,
    likelihood: Likelihood,
) -> torch.Tensor:
    """(1 − α)·L(student, targets) + α·T²·KL(teacher ‖ student, softened by T) + β·½·MSE(h_s, h_t).

    Args:
        output: The student's, with hidden states if β is not 0.
        batch: Its `targets` and the numbers of its rows.
        taught: What the teacher says of all rows.
        options: α, β, T, the reduction of the KL and flip_weight.
        likelihood: What outputs are a distribution over, and so L; the cross-entropy of classes.

    Returns:
        The loss, a scalar.
    """
    loss = teacher_loss(output, batch, taught, options, likelihood)
    if options.alpha < 1:
        loss = loss + (1 - options.alpha) * likelihood.loss(output.logits, batch["targets"], "mean")
    return loss


def compute_teacher_outputs(
    teacher: Deployment, split: Split, order: Integers, options: Distillation, work: Path
) -> TeacherOutputs:
    """Compute the teacher's signal and hidden states once; a later call reads them, undamaged, in the working folder.

    Args:
        teacher: The old tuned model on the old base.
        split: What the student is trained on.
        order: Indices of the examples that the training will draw.
        options: Hidden states are stored only if its beta needs them.
        work: The folder for the cache.

    Returns:
        The signal in float32, the hidden states in bfloat16; rows of examples that are not in the order are 0.
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    file, record = work / "teacher.safetensors", work / "teacher.json"
    if not is_sealed(record):
        likelihood, examples = teacher.data.likelihood, teacher.examples(split)
        drawn = np.unique(order).tolist()
        numbers = torch.as_tensor(examples.rows(drawn))
        stored: dict[str, torch.Tensor] = {}

        def keep(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
            parts = {"logits": likelihood.signal(output.logits).logits}
            if options.beta:
                parts["hidden"] = output.row_states().bfloat16()
            for name, part in parts.items():
                if name not in stored:
                    stored[name] = torch.zeros(len(examples.targets), *part.shape[1:], dtype=part.dtype)
                stored[name][numbers[batch["row"].cpu()]] = part.cpu()

        some, learns_states = examples.take(drawn), bool(options.beta)
        for_each_batch(teacher.model, some, teacher.precision, keep, teacher.progress, "teacher", hidden=learns_states)
        stored.setdefault("hidden", torch.zeros(len(examples.targets), 0, dtype=torch.bfloat16))
        if not all(rows.isfinite().all() for rows in stored.values()):
            raise MismatchError("the old deployment's outputs are infinite or not a number: there is nothing to learn.")
        with replace_atomically(file, synced=False) as beside:
            save_file(stored, beside)
        seal(record, [file])
    stored = load_file(file)
    return TeacherOutputs(Signal(stored["logits"]), stored["hidden"])


def distillation_objective(
    taught: TeacherOutputs, options: Distillation, likelihood: Likelihood, steps: int
) -> Objective:
    """Make the loss of a batch from the teacher's cached outputs.

    Args:
        taught: From `teach`.
        options: The loss's weights.
        likelihood: What outputs are a distribution over.
        steps: Steps of the training in all.

    Returns:
        A function of the student, a batch and the steps done so far.
    """

    def objective(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        output = forward(model, batch, hidden=bool(options.beta))
        return distillation_loss(output, batch, taught, options.at(step, steps), likelihood)

    return objective
