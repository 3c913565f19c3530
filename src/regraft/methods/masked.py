"""`masked`: the part of the old delta that lowers the loss on the new base.

Source: GradFix, Gradient-Sign Masking for Task Vector Transport Across Pre-Trained Models (Rinaldi et al., 2025,
arXiv:2510.09658): an entry of the delta is kept if its sign is that of −∂L/∂θ at the new base. In the paper, a gradient
of exactly zero drops the entry; here it keeps it, so that embeddings of tokens outside the few examples are not lost.
In the paper, examples may vote on the sign; here it is that of the mean loss.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.methods.evidence import sample_evidence
from regraft.methods.method import OLD_HEAD_ONLY, Start

if TYPE_CHECKING:
    import torch

    from regraft.methods.evidence import Evidence
    from regraft.methods.job import Job


@dataclasses.dataclass(frozen=True)
class Masking:
    """The examples that the gradient is computed on.

    Args:
        labels: The number of training examples per class; 0 to use the divergence from the old model's outputs on
            training texts as the loss, without labels.

    Raises:
        RecipeError: The number is negative.
    """

    labels: int = 32

    def __post_init__(self) -> None:
        """Check the number."""
        if self.labels < 0:
            raise RecipeError(f"labels must be 0 or more examples per class, found {self.labels}.")


def graft_masked(job: Job, options: Masking) -> None:
    """Compute the gradient at the new base with the old head, and graft the entries of the delta that agree with it.

    Args:
        job: The job.
        options: The examples.
    """
    from regraft.adaptation.transform import check_transformable
    from regraft.weights import mask_agreement

    check_transformable(job.adaptation)
    evidence = sample_evidence(job, options.labels)
    without_delta = job.adaptation.family.remove_delta(job.grafted(), job.upgrade, job.row_match)
    gradients = _gradients(without_delta, evidence, job)
    rows = job.row_match
    counts = list[tuple[int, int]]()
    triples = zip(rows.new_row_indices, rows.tuned_row_indices, rows.old_row_indices, strict=True) if rows else ()
    shared = [row for row, indices in enumerate(triples) if min(indices) >= 0]  # rows of tokens that have a delta

    def rule(name: str, delta: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        gradient = gradients[name]
        if rows and name in job.upgrade.new.architecture.token_tensors:
            gradient = gradient[shared]
        masked = mask_agreement(delta, -gradient.to(delta))
        counts.append((int(masked.count_nonzero()), int(delta.count_nonzero())))
        return masked

    job.graft_transformed(rule)
    if total := sum(count for _, count in counts):
        job.notes["kept"] = round(sum(count for count, _ in counts) / total, 4)  # of the entries that tuning changed


def _gradients(model: Any, evidence: Evidence, job: Job) -> dict[str, torch.Tensor]:
    """Compute the gradient of the mean loss, by tensor names as in `write_transform`."""
    from regraft.model import device
    from regraft.model.batches import BATCH_SIZE
    from regraft.model.outputs import forward

    examples = job.deploy(model).examples(evidence.split)
    model.eval().requires_grad_(True)
    count = len(examples)
    for start in range(0, count, BATCH_SIZE):
        end = min(start + BATCH_SIZE, count)
        batch = {name: tensor.to(device()) for name, tensor in examples.batch(range(start, end)).items()}
        losses: Any = evidence.losses(forward(model, batch).logits, batch["targets"], batch["row"].cpu())
        (losses.sum() / len(examples.targets)).backward()
        job.progress("gradient", end, count, {})
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
    summary="keep the entries of the old delta that agree with the new base's gradient",
    needs=lambda options: ("labels",) if options.labels else ("text",),
    heads=OLD_HEAD_ONLY,
)
