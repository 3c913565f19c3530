"""`masked`: the part of the old delta that does not raise the loss on the new base.

Source: GradFix, Gradient-Sign Masking for Task Vector Transport Across Pre-Trained Models (Rinaldi et al., 2025,
arXiv:2510.09658): an entry of the delta is kept if it has the sign of −∂L/∂θ at the new base. In the paper, an entry
whose gradient is exactly zero is dropped; here it is kept, so that embeddings of tokens outside the few examples are
not lost. In the paper, examples may vote on the sign; here it is the sign of the mean loss's gradient.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.methods.evidence import sample_evidence
from regraft.methods.method import OLD_HEAD_ONLY, Start

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.methods.evidence import Evidence
    from regraft.methods.job import Job
    from regraft.weights import RowMatch


@dataclasses.dataclass(frozen=True)
class Masking:
    """Options of `masked`: the examples that the gradient is computed on.

    Args:
        labels: The number of labelled training examples per class (at most 256 in all, but one of each class); 0 to use
            the divergence from the old model's outputs on training texts as the loss, for which the task needs no
            labels.

    Raises:
        RecipeError: `labels` is negative.
    """

    labels: int = 32  # more give a less noisy gradient, and use more labels

    def __post_init__(self) -> None:
        """Refuse a negative number of examples."""
        if self.labels < 0:
            raise RecipeError(f"labels must be 0 or more examples per class, found {self.labels}.")


def graft_masked(job: Job, options: Masking) -> None:
    """Compute the loss's gradient at the new base with the old head, and graft the part of the delta against it.

    An entry of the delta is set to zero if it has the sign of the gradient, since adding it would raise the loss. For a
    LoRA, these are the entries of the dense delta, which is then compressed to the LoRA's rank. The delta of a tensor
    that the upgrade did not change is kept whole.

    Args:
        job: The job, with the task's training examples.
        options: The number of examples, and whether their labels are used.

    Raises:
        KindError: The adaptation's kind is not supported.
    """
    from regraft.adaptation.transform import check_transformable
    from regraft.weights import mask_conflicts

    check_transformable(job.adaptation)
    evidence = sample_evidence(job, options.labels)
    without_delta = job.adaptation.family.remove_delta(job.build_grafted_model(), job.upgrade, job.row_match)
    gradients = _gradients(without_delta, evidence, job)
    new = job.upgrade.new
    rows_with_delta = None if job.row_match is None else _rows_with_delta(job.row_match)
    masked_counts = list[int]()  # lists rather than sums, since several threads call the rule
    delta_counts = list[int]()

    def rule(name: str, delta: torch.Tensor, _shift: torch.Tensor) -> torch.Tensor:
        gradient = gradients[name]
        if rows_with_delta is not None and (name in new.architecture.token_tensors or name in new.language_head):
            gradient = gradient[rows_with_delta]
        masked = mask_conflicts(delta, -gradient.to(delta))
        masked_counts.append(int(masked.count_nonzero()))
        delta_counts.append(int(delta.count_nonzero()))
        return masked

    job.graft_transformed(rule)
    total = sum(delta_counts)
    if total:
        job.notes["kept"] = round(sum(masked_counts) / total, 4)


def _rows_with_delta(match: RowMatch) -> list[int]:
    """Return the grafted rows whose tokens both bases and the fine-tune have."""
    row_triples = zip(match.new_row_indices, match.tuned_row_indices, match.old_row_indices, strict=True)
    return [row for row, indices in enumerate(row_triples) if min(indices) >= 0]


def _gradients(model: nn.Module, evidence: Evidence, job: Job) -> dict[str, torch.Tensor]:
    """Compute the gradient of the mean loss, by the tensor names that the rule of `write_transform` gets."""
    from regraft.model import device
    from regraft.model.batches import BATCH_SIZE
    from regraft.model.outputs import forward

    examples = job.deploy(model).examples(evidence.split)
    model.eval().requires_grad_(True)
    num_examples = len(examples)
    for start in range(0, num_examples, BATCH_SIZE):
        end = min(start + BATCH_SIZE, num_examples)
        batch = {name: tensor.to(device()) for name, tensor in examples.batch(range(start, end)).items()}
        losses: Any = evidence.losses(forward(model, batch).logits, batch["targets"], batch["row"].cpu())
        (losses.sum() / len(examples.targets)).backward()
        job.progress("gradient", end, num_examples, {})
    body = job.upgrade.new.architecture
    prefix = job.upgrade.new.prefix + "."
    body_gradients: dict[str, torch.Tensor] = {}
    head_gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else parameter.detach().new_zeros(parameter.shape)
        inner = name.removeprefix(prefix)
        if inner in body.parameters:
            body_gradients[inner] = gradient.cpu()
        else:
            head_gradients[name] = gradient.cpu()
    return job.adaptation.family.rule_tensors(body_gradients, body) | head_gradients


MASKED = Start(
    "masked",
    graft_masked,
    Masking,
    summary="keep the entries of the old delta that do not raise the loss on the new base",
    needs=lambda options: ("labels",) if options.labels else ("text",),
    heads=OLD_HEAD_ONLY,
)
