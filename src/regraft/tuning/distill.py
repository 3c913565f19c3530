"""The old tuned model as a teacher: the distillation loss, and the teacher's outputs computed once.

Source: Qin et al., Recyclable Tuning for Continual Pre-training, 2023 (arXiv:2305.08702), section 5.2, and the
authors' reference implementation; the hidden-state term is Sun et al.'s patient knowledge distillation
(arXiv:1908.09355).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import is_sealed, replacing, seal
from regraft.errors import MismatchError, RecipeError
from regraft.model.batches import for_each_batch
from regraft.model.outputs import Output, forward
from regraft.tuning.recipe import check_fade, fade

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from regraft.model.examples import Examples
    from regraft.progress import Progress

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
        left = fade(self.decay, step, steps)
        return dataclasses.replace(self, alpha=self.alpha * left, beta=self.beta * left)


def teacher_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor,
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    options: Distillation,
) -> torch.Tensor:
    """α·T²·KL(softmax(z_t/T) ‖ softmax(z_s/T)) + β·½·MSE(h_s, h_t), examples weighted by whether the teacher is right.

    Args:
        logits: The student's z_s, batch × classes.
        labels: The true classes, batch; unused where flip_weight is 0.
        teacher_logits: The teacher's z_t, batch × classes.
        hidden: The student's h_s, batch × layers × width; unused where beta is 0.
        teacher_hidden: The teacher's h_t, likewise.
        options: α, β, T, the reduction of the KL and flip_weight.

    Returns:
        The loss, a scalar.
    """
    from torch.nn import functional

    hot = options.temperature
    divergence = functional.kl_div(
        functional.log_softmax(logits / hot, dim=-1),
        functional.log_softmax(teacher_logits / hot, dim=-1),
        reduction="none",
        log_target=True,
    )
    apart = functional.mse_loss(hidden, teacher_hidden, reduction="none") if options.beta else None
    if options.flip_weight:
        weights = 1 + options.flip_weight * (teacher_logits.argmax(dim=-1) == labels).to(logits.dtype)
        weights = weights / weights.mean()
        divergence = divergence * weights[:, None]
        apart = apart * weights[:, None, None] if apart is not None else None
    count = len(logits) if options.kl_reduction == "batchmean" else logits.numel()
    loss = options.alpha * hot**2 * (divergence.sum() / count)
    return loss if apart is None else loss + options.beta * 0.5 * apart.mean()


def distillation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor,
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    options: Distillation,
) -> torch.Tensor:
    """(1 − α)·CE(z_s, y) + α·T²·KL(softmax(z_t/T) ‖ softmax(z_s/T)) + β·½·MSE(h_s, h_t).

    Args:
        logits: The student's z_s, batch × classes.
        labels: The true classes y, batch.
        teacher_logits: The teacher's z_t, batch × classes.
        hidden: The student's h_s, batch × layers × width; unused where beta is 0.
        teacher_hidden: The teacher's h_t, likewise.
        options: α, β, T, the reduction of the KL and flip_weight.

    Returns:
        The loss, a scalar.
    """
    from torch.nn import functional

    loss = teacher_loss(logits, labels, teacher_logits, hidden, teacher_hidden, options)
    if options.alpha < 1:
        loss = loss + (1 - options.alpha) * functional.cross_entropy(logits, labels)
    return loss


def read_hidden(output: Output) -> torch.Tensor:
    """Take the hidden state the head's token has after the embeddings and after every layer but the last.

    Args:
        output: With hidden states.

    Returns:
        batch × layers × width.
    """
    import torch

    rows = torch.arange(len(output.read), device=output.read.device)
    return torch.stack([layer[rows, output.read] for layer in output.hidden[:-1]], dim=1)


def teach(
    teacher: Any,
    examples: Examples,
    wanted: Any,
    options: Distillation,
    precision: str,
    work: Path,
    progress: Progress,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the teacher's logits and hidden states once; a later call finds them, undamaged, in the working folder.

    Args:
        teacher: The old tuned model on the old base; frozen, in evaluation mode.
        examples: What the student is trained on, in the teacher's tokens.
        wanted: Indices of the examples that the training will see.
        options: Hidden states are kept only if its beta needs them.
        precision: `bf16` or `fp32`.
        work: The folder for the cache.
        progress: Told of each batch.

    Returns:
        Logits (examples × classes, float32) and hidden states (examples × layers × width, bfloat16; of width 0
        without beta); rows of examples that are not wanted are 0.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file, record = work / "teacher.safetensors", work / "teacher.json"
    if not is_sealed(record):
        import numpy as np

        from regraft.model.examples import Examples

        seen = np.unique(wanted)
        part = Examples(
            {name: [column[i] for i in seen] for name, column in examples.columns.items()}, examples.labels[seen],
            examples.pad,
        )  # fmt: skip
        kept: dict[str, torch.Tensor] = {}

        def keep(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
            found = {"logits": output.logits.float()}
            if options.beta:
                found["hidden"] = read_hidden(output).bfloat16()
            for name, rows in found.items():
                if name not in kept:
                    kept[name] = torch.zeros(len(examples), *rows.shape[1:], dtype=rows.dtype)
                kept[name][torch.as_tensor(seen[indices])] = rows.cpu()

        for_each_batch(teacher, part, precision, keep, progress, "teacher", hidden=bool(options.beta))
        kept.setdefault("hidden", torch.zeros(len(examples), 0, dtype=torch.bfloat16))
        if not all(rows.isfinite().all() for rows in kept.values()):
            raise MismatchError("the old deployment's outputs are infinite or not a number: there is nothing to learn.")
        with replacing(file, synced=False) as beside:
            save_file(kept, beside)
        seal(record, [file])
    stored = load_file(file)
    return stored["logits"], stored["hidden"]


def distillation_objective(
    taught: tuple[torch.Tensor, torch.Tensor], options: Distillation, steps: int
) -> Callable[[Any, dict[str, torch.Tensor], int], torch.Tensor]:
    """Make the loss of a batch from the teacher's cached outputs.

    Args:
        taught: From `teach`.
        options: The loss's weights.
        steps: Steps of the training in all.

    Returns:
        A function of the student, a batch that carries `labels` and `index`, and the steps done so far.
    """

    def objective(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        labels, index = batch.pop("labels"), batch.pop("index").cpu()
        output = forward(model, batch, hidden=bool(options.beta))
        teacher_logits, teacher_hidden = (rows[index].to(output.logits.device).float() for rows in taught)
        hidden = teacher_hidden
        if options.beta:
            hidden = read_hidden(output).float()
        now = options.at(step, steps)
        return distillation_loss(output.logits.float(), labels, teacher_logits, hidden, teacher_hidden, now)

    return objective
