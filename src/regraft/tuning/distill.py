"""Distillation from the old model: the loss, and the cache of the teacher's outputs.

Source: Qin et al., Recyclable Tuning for Continual Pre-training, 2023 (arXiv:2305.08702), section 5.2, and the
authors' reference implementation; the hidden-state term is Sun et al.'s patient knowledge distillation
(arXiv:1908.09355).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Self

from regraft.checkpoint import is_sealed, replace_atomically, seal
from regraft.errors import MismatchError, RecipeError
from regraft.model.batches import for_each_batch
from regraft.model.outputs import forward
from regraft.recipe import added_option, check_decay_schedule, decay_factor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import nn

    from regraft.model import Deployment
    from regraft.model.outputs import Output
    from regraft.task import Split, Task
    from regraft.task.split import Integers
    from regraft.task.types import Likelihood, Signal
    from regraft.tuning.trainer import Objective

MAX_TEMPERATURE = 10_000
"""The KL falls as 1/T², until float32 rounds it away: for two classes and logits of standard deviation 5, the mean
absolute error of a row's KL is about 0.3 % of the mean KL at T = 1,000, 25 % at this limit, and 1,900 % at 100,000."""
DIVERGENCES = ("forward", "reverse", "js")
"""The values of `Distillation.divergence`."""
KL_REDUCTIONS = ("batchmean", "mean")
"""The values of `Distillation.kl_reduction`."""


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Options of the distillation loss.

    Args:
        alpha: The weight of the teacher's outputs, from 0 to 1; the weight of the targets is 1 − alpha.
        beta: The weight of half the mean squared error between the student's and the teacher's hidden states; 0 for
            none.
            By default 1, but 0 for text generation, where the states of a token are larger than its text by far.
        temperature: The temperature that softens both models' outputs, above 0 and up to 10,000; the outputs of a
            regression, which are means, are not softened. By default 5, but 1 for text generation.
        kl_reduction: `batchmean` sums the divergence over classes and averages it over the batch, as is usual; `mean`
            averages over both, as the paper's reference implementation does.
        flip_weight: Against negative flips, the teacher's terms weigh 1 + flip_weight on rows that the teacher
            predicts correctly and 1 on the others, scaled to a mean of 1 over the batch.
        decay: How alpha and beta fall to 0 over the training: `none` (they stay, as in the paper), `linear` or
            `cosine`. On a much better new base, a teacher at full weight holds the student back until the end.
        divergence: `forward` for KL(teacher ‖ student); for text generation also `reverse` for KL(student ‖ teacher),
            or `js` for the generalised Jensen-Shannon divergence.
        mixture: The teacher's part of the mixture of `js`, between 0 and 1.
        top_k: For text generation with the forward divergence: the number of most likely tokens that are cached of the
            teacher's outputs; 0 to cache its last hidden states, from which whole distributions are computed.

    Raises:
        RecipeError: A number is out of its range, infinite or NaN, or a name is unknown.
    """

    alpha: float = 0.7  # higher follows the teacher, lower the targets
    beta: float | None = None  # higher also holds the student's layers to the teacher's
    temperature: float | None = None  # higher gives small probabilities more weight
    kl_reduction: str = "batchmean"
    flip_weight: float = 0.0  # higher follows the teacher more where it is right, and less where it is wrong
    decay: str = "none"
    divergence: str = added_option("forward")
    mixture: float = added_option(0.5)
    top_k: int = added_option(64)  # 512 B a token; on natural text, more than 99 % of the probability

    def __post_init__(self) -> None:
        """Refuse numbers out of the ranges above, and unknown names of a reduction or a decay."""
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha must be from 0 to 1, found {self.alpha}.")
        if self.beta is not None and not 0 <= self.beta < math.inf:
            raise RecipeError(f"beta must be a finite number, 0 or more, found {self.beta}.")
        if self.temperature is not None and not 0 < self.temperature <= MAX_TEMPERATURE:
            raise RecipeError(f"temperature must be above 0 and up to {MAX_TEMPERATURE:,}, found {self.temperature}.")
        if self.kl_reduction not in KL_REDUCTIONS:
            raise RecipeError(f"kl_reduction must be {' or '.join(KL_REDUCTIONS)}, found {self.kl_reduction!r}.")
        if not 0 <= self.flip_weight < math.inf:
            raise RecipeError(f"flip_weight must be a finite number, 0 or more, found {self.flip_weight}.")
        check_decay_schedule("decay", self.decay)
        if self.divergence not in DIVERGENCES:
            raise RecipeError(f"divergence must be one of {', '.join(DIVERGENCES)}, found {self.divergence!r}.")
        if not 0 < self.mixture < 1:
            raise RecipeError(f"mixture must be between 0 and 1, found {self.mixture}.")
        if self.top_k < 0:
            raise RecipeError(f"top_k must be 0 or more, found {self.top_k}.")

    def for_task(self, task: Task) -> Self:
        """Return the options with the defaults of a task's type in place of None.

        Args:
            task: The task.
        """
        beta = task.distillation_beta if self.beta is None else self.beta
        temperature = task.distillation_temperature if self.temperature is None else self.temperature
        return dataclasses.replace(self, beta=beta, temperature=temperature)

    @property
    def cached_top_k(self) -> int:
        """The number of most likely tokens to cache; 0 for the hidden states, which other divergences need."""
        return self.top_k if self.divergence == "forward" else 0

    def apply_decay(self, step: int, steps: int) -> Self:
        """Apply the decay of alpha and beta.

        Args:
            step: The number of completed steps.
            steps: The number of steps of the training.

        Returns:
            The options with alpha and beta of the next step.
        """
        factor = decay_factor(self.decay, step, steps)
        assert self.beta is not None  # `for_task` has set it
        return dataclasses.replace(self, alpha=self.alpha * factor, beta=self.beta * factor)


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """A teacher's outputs for the rows of a training split.

    Args:
        signal: The teacher's signal, one row per target.
        hidden: The teacher's hidden states as in `Output.row_states`, rows × layers × width; rows × 0 if they are not
            distilled.
    """

    signal: Signal
    hidden: torch.Tensor


def teacher_loss(
    output: Output,
    batch: Mapping[str, torch.Tensor],
    teacher_outputs: TeacherOutputs,
    options: Distillation,
    likelihood: Likelihood,
) -> torch.Tensor:
    """Compute α·T²·KL(teacher ‖ student, softened by T) + β·½·MSE(h_s, h_t), rows weighted by `flip_weight`.

    h_s and h_t are the hidden states of the student and the teacher. T² is the `gradient_scale` of a softmax; other
    likelihoods may have a different factor.

    Args:
        output: The student's output, with hidden states if β is not 0.
        batch: The batch, with the indices of its rows in `row`, and with `targets` if `flip_weight` is not 0.
        teacher_outputs: The teacher's outputs for all rows of the split.
        options: α, β, T, the reduction of the KL and `flip_weight`; a decay is not applied here.
        likelihood: The distribution that the outputs parametrise.

    Returns:
        The loss, a scalar.
    """
    import torch
    from torch.nn import functional

    assert options.temperature is not None  # `for_task` has set it
    logits = output.logits
    row_indices = batch["row"].cpu()
    signal = teacher_outputs.signal.take(row_indices, logits)
    row_weights = None
    if options.flip_weight:
        is_right = likelihood.teacher_is_right(signal, batch["targets"])
        row_weights = 1 + options.flip_weight * is_right.to(getattr(logits, "dtype", torch.float32))
        row_weights = row_weights / row_weights.mean()
    divergence = likelihood.mean_divergence(
        logits,
        signal,
        options.temperature,
        row_weights,
        kind=options.divergence,
        mixture=options.mixture,
        per_output=options.kl_reduction == "mean",
    )
    loss = options.alpha * likelihood.gradient_scale(options.temperature) * divergence
    if not options.beta:
        return loss
    states = output.row_states()
    hidden = teacher_outputs.hidden[row_indices].to(states)
    distances = functional.mse_loss(states, hidden, reduction="none")
    if row_weights is not None:
        distances = distances * row_weights[:, None, None]
    return loss + options.beta * 0.5 * distances.mean()


def distillation_loss(
    output: Output,
    batch: Mapping[str, torch.Tensor],
    teacher_outputs: TeacherOutputs,
    options: Distillation,
    likelihood: Likelihood,
) -> torch.Tensor:
    """Compute (1 − α)·L(student, targets) + α·T²·KL(teacher ‖ student, softened by T) + β·½·MSE(h_s, h_t).

    The terms of the teacher are as in `teacher_loss`.

    Args:
        output: The student's output, with hidden states if β is not 0.
        batch: The batch, with `targets` and with the indices of its rows in `row`.
        teacher_outputs: The teacher's outputs for all rows of the split.
        options: α, β, T, the reduction of the KL and `flip_weight`; a decay is not applied here.
        likelihood: The distribution that the outputs parametrise; L is its negative log-likelihood.

    Returns:
        The loss, a scalar.
    """
    loss = teacher_loss(output, batch, teacher_outputs, options, likelihood)
    if options.alpha < 1:
        loss = loss + (1 - options.alpha) * likelihood.loss(output.logits, batch["targets"], "mean")
    return loss


def compute_teacher_outputs(
    teacher: Deployment,
    split: Split,
    order: Integers,
    options: Distillation,
    work_folder: Path,
    student_ids: torch.Tensor | None = None,
) -> TeacherOutputs:
    """Compute the teacher's signal and hidden states, or read them from an undamaged cache.

    Args:
        teacher: The old model, as a deployment on the old base.
        split: The student's training split.
        order: Indices of the examples that the training draws.
        options: The options of the loss; hidden states are computed only if β is not 0.
        work_folder: The folder of the cache.
        student_ids: The student's id of each token of the teacher's vocabulary, −1 for none; None if they are equal.

    Returns:
        The signal in float32 and the hidden states in bfloat16; 0 in rows of examples that are not in `order`.

    Raises:
        MismatchError: An output is infinite or NaN.
    """
    from safetensors.torch import load_file, save_file

    cache_file = work_folder / "teacher.safetensors"
    seal_file = work_folder / "teacher.json"
    if not is_sealed(seal_file):
        tensors = _run_teacher(teacher, split, order, options, student_ids)
        with replace_atomically(cache_file, synced=False) as temporary:
            save_file(tensors, temporary)
        seal(seal_file, [cache_file])
    stored = load_file(cache_file)
    hidden = stored.pop("hidden")
    assert options.temperature is not None  # `for_task` has set it
    signal = teacher.data.likelihood.cached_signal(
        stored, head=teacher.vocabulary_head(), temperature=options.temperature, student_ids=student_ids
    )
    return TeacherOutputs(signal, hidden)


def _run_teacher(
    teacher: Deployment, split: Split, order: Integers, options: Distillation, student_ids: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the tensors of the cache: those of the signal, and `hidden`, computed on the examples of an order."""
    import numpy as np
    import torch

    examples = teacher.examples(split)
    used_indices = np.unique(order).tolist()
    used_rows = torch.as_tensor(examples.rows(used_indices))  # `take` below renumbers the rows from 0
    num_rows = len(examples.targets)
    with_hidden = bool(options.beta)
    assert options.temperature is not None  # `for_task` has set it
    temperature = options.temperature
    tensors: dict[str, torch.Tensor] = {}

    def store(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        batch_tensors = teacher.data.likelihood.cached_tensors(
            output.logits, top_k=options.cached_top_k, temperature=temperature, student_ids=student_ids
        )
        if with_hidden:
            batch_tensors["hidden"] = output.row_states().bfloat16()
        for name, tensor in batch_tensors.items():
            if name not in tensors:
                tensors[name] = torch.zeros(num_rows, *tensor.shape[1:], dtype=tensor.dtype)
            tensors[name][used_rows[batch["row"].cpu()]] = tensor.cpu()

    for_each_batch(
        teacher.model,
        examples.take(used_indices),
        teacher.precision,
        store,
        teacher.progress,
        "teacher",
        hidden=with_hidden,
    )
    tensors.setdefault("hidden", torch.zeros(num_rows, 0, dtype=torch.bfloat16))
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise MismatchError(
            f"{teacher.base.path}: the outputs of the old model are infinite or NaN, so it cannot "
            "be a teacher. Compute in fp32 (--precision fp32), or use a method without a teacher."
        )
    return tensors


def distillation_objective(
    teacher_outputs: TeacherOutputs, options: Distillation, likelihood: Likelihood, steps: int
) -> Objective:
    """Return the distillation loss as an objective.

    Args:
        teacher_outputs: The teacher's outputs for all rows of the training split.
        options: The options of the loss; the decay is applied at each step.
        likelihood: The distribution that the outputs parametrise.
        steps: The number of steps of the training.

    Returns:
        A function of the student, a batch and the number of completed steps.
    """

    def objective(model: nn.Module, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        output = forward(model, batch, hidden=bool(options.beta))
        return distillation_loss(output, batch, teacher_outputs, options.apply_decay(step, steps), likelihood)

    return objective
