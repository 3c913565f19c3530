"""`masked`: the part of the old delta that goes downhill on the new base.

Source: GradFix, Gradient-Sign Masking for Task Vector Transport Across Pre-Trained Models (Rinaldi et al., 2025,
arXiv:2510.09658): a coordinate of the delta stays if its sign is that of −∂L/∂θ at the new base. There a gradient of
exactly zero drops the coordinate; here it is no evidence, and keeps it (embeddings of tokens that the few examples do
not have would be lost). There the signs may be voted on example by example; here they are of the mean loss.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.methods.evidence import gather
from regraft.methods.method import OLD_HEAD_ONLY, Start

if TYPE_CHECKING:
    import torch

    from regraft.methods.evidence import Evidence
    from regraft.methods.job import Job


@dataclasses.dataclass(frozen=True)
class Masking:
    """What the gradient is measured on.

    Args:
        labels: Training examples a class; 0 to read no label and take the divergence from the old tuned model's
            outputs on training texts for the loss.

    Raises:
        RecipeError: The number is out of its range.
    """

    labels: int = 32

    def __post_init__(self) -> None:
        """Check the number."""
        if self.labels < 0:
            raise RecipeError(f"labels is 0 or more examples a class, found {self.labels}.")


def graft_masked(job: Job, options: Masking) -> None:
    """Measure the gradient at the new base under the old head, and keep what of the delta agrees with it.

    Args:
        job: What and where.
        options: What on.
    """
    from regraft.adaptation.transform import check_transformable
    from regraft.weights import mask_agreement

    check_transformable(job.adaptation)
    evidence = gather(job, options.labels)
    bare = job.adaptation.family.remove_delta(job.grafted(), job.upgrade, job.rows)
    gradients = _gradients(bare, evidence, job)
    rows, counts = job.rows, list[tuple[int, int]]()
    sides = zip(rows.new_row_indices, rows.tuned_row_indices, rows.old_row_indices, strict=True) if rows else ()
    shared = [row for row, of_each in enumerate(sides) if min(of_each) >= 0]  # of tokens that have a delta

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
    """Compute the gradient of the mean loss, by the name that `write_transform` calls a tensor of the body."""
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
    body, prefix = job.upgrade.new.architecture, job.upgrade.new.prefix + "."
    inside: dict[str, torch.Tensor] = {}
    outside: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else parameter.detach().new_zeros(parameter.shape)
        inner = name.removeprefix(prefix)
        side = inside if inner in body.parameters else outside
        side[inner if side is inside else name] = gradient.cpu()
    return job.adaptation.family.rule_tensors(inside, body) | outside


MASKED = Start(
    "masked",
    graft_masked,
    Masking,
    summary="keep what of the old delta agrees with the new base's gradient",
    needs=lambda options: ("labels",) if options.labels else ("text",),
    heads=OLD_HEAD_ONLY,
)
