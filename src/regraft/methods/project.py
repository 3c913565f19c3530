"""`project`: a map from old to new weights, learned from other tasks.

Source: Qin et al., 2023 (arXiv:2305.08702): P(v) = v·W1·W2 + b, where v is the vector of old weights. The paper learns
P by distillation on the tasks at hand; here it can also be a regression of new weights on old ones.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import KindError, RecipeError
from regraft.methods.method import Start
from regraft.methods.projection import Projection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    import torch

    from regraft.adaptation.vector import Vector
    from regraft.methods.job import Job

logger = logging.getLogger(__name__)

MIN_PAIRS = 3  # leaving one out of two leaves a single pair, from which no direction of change can be learned


def graft_mapped(job: Job, options: Projection) -> None:
    """Learn the map, and write the old weights, mapped, as an adaptation of the new base; the head is copied.

    Args:
        job: The job.
        options: What the map is learned from, and how.

    Raises:
        KindError: The weights have a row for each token, and the vocabularies differ.
        RecipeError: There are no pairs.
    """
    if not options.pairs:
        raise RecipeError(
            "method project learns from other tasks: pass pairs of adaptations that were tuned on the old and on the "
            "new base, as in pairs=[old1=new1,old2=new2]."
        )
    if job.upgrade.old.fingerprint == job.upgrade.new.fingerprint:  # there is no change to learn
        job.graft()
        return
    adaptation = job.adaptation
    if adaptation.family.has_token_rows(adaptation) and job.row_match is not None:
        raise KindError(
            f"{job.upgrade.old.path} and {job.upgrade.new.path} have different vocabularies, and the map needs the "
            "same rows in both. Use direct."
        )
    if options.fit == "distill":
        from regraft.methods.project_distill import distil_map

        mapped = distil_map(job, options)
        _write(job, mapped, mapped.__getitem__)
        return
    from regraft.methods.pairs import read_pairs

    vector = adaptation.family.vector(adaptation, job.upgrade.old)
    pairs = read_pairs(options.pairs, vector, job.upgrade)
    weights = _regress(pairs, vector, options, job)
    _write(job, vector.names, lambda name: _map(name, vector, pairs, weights, residual=options.residual))


def _regress(pairs: Sequence[tuple[Vector, Vector]], vector: Vector, options: Projection, job: Job) -> list[float]:
    """Return the weight of each pair in the mapped vector, and note the errors of the map."""
    import torch

    from regraft.adaptation.vector import chunks
    from regraft.weights import leave_one_out_errors, project

    count = len(pairs)
    gram, targets = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
    cross, change_norms, new_norms = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    all_chunks = list(chunks(vector))
    for number, (name, start, size) in enumerate(all_chunks, 1):
        old = torch.stack([first.flat_slice(name, start, size) for first, _ in pairs])
        new = torch.stack([second.flat_slice(name, start, size) for _, second in pairs])
        change = new - old
        target = change if options.residual else new
        gram += old @ old.T
        targets += target @ target.T
        cross += old @ vector.flat_slice(name, start, size)
        change_norms += change.square().sum(dim=1)
        new_norms += new.square().sum(dim=1)
        job.progress("pairs", number, len(all_chunks), {})
    total = math.sqrt(float(new_norms.sum())) or 1.0
    direct_error = math.sqrt(float(change_norms.sum())) / total
    job.notes["pairs"], job.notes["direct_error"] = count, round(direct_error, 4)
    job.notes["learned_from"] = [[old.fingerprint, new.fingerprint] for old, new in pairs]
    warning = ""
    if count > 1:
        errors = leave_one_out_errors(gram, targets, options.ridge, options.rank, intercept=options.intercept)
        error = math.sqrt(float(errors.sum())) / total
        job.notes["left_out_error"] = round(error, 4)
        if error > direct_error:
            warning = f"on pairs left out in turn, the map is worse ({error:.3f}) than direct ({direct_error:.3f})"
    if count < MIN_PAIRS:
        warning = f"{count} pairs are too few to learn a map, or to test it"
    if warning:
        logger.warning("project: %s (distances relative to the new weights). Use direct, or pass more pairs.", warning)
    weights = project(gram, targets, cross, options.ridge, options.rank, intercept=options.intercept)
    return [float(weight) for weight in weights]


def _map(
    name: str, vector: Vector, pairs: Sequence[tuple[Vector, Vector]], weights: list[float], *, residual: bool
) -> torch.Tensor:
    """Return one tensor of the mapped vector, in float64."""
    import torch

    shape = vector.shapes[name]
    size = math.prod(shape)
    mapped = vector.flat_slice(name, 0, size) if residual else torch.zeros(size, dtype=torch.float64)
    for (old, new), weight in zip(pairs, weights, strict=True):
        mapped.add_(new.flat_slice(name, 0, size), alpha=weight)
        if residual:
            mapped.sub_(old.flat_slice(name, 0, size), alpha=weight)
    return mapped.reshape(shape)


def _write(job: Job, names: Collection[str], read_mapped: Callable[[str], torch.Tensor]) -> None:
    """Write the adaptation with the mapped tensors in place of those of its vector."""
    from regraft.adaptation.graft import write_grafted_adaptation

    adaptation, upgrade = job.adaptation, job.upgrade

    def write(into: Path) -> None:
        mapped = adaptation.family.replace_vector(
            adaptation, upgrade, names, read_mapped, job.progress, replace=job.replace
        )
        job.notes.update(write_grafted_adaptation(adaptation, upgrade, mapped, into, job.progress))

    job.write_with_head(write)


def contents(options: Projection, seed: int) -> dict[str, Any]:
    """Identify the content of the pairs.

    Args:
        options: The options, with the pairs.
        seed: The seed of few-shot draws of the pairs' tasks.

    Returns:
        As `pairs`, for each pair the fingerprints of its old and its new weights; or by distillation, of its old
        weights and its task's data.
    """
    from regraft.adaptation import load_adaptation
    from regraft.methods.pairs import split_pair
    from regraft.task import load_data

    pairs = []
    for old, second in map(split_pair, options.pairs):
        new = load_data(second, seed).digest() if options.fit == "distill" else load_adaptation(second).fingerprint
        pairs.append([load_adaptation(old).fingerprint, new])
    return {"pairs": pairs}


PROJECT = Start(
    "project",
    graft_mapped,
    Projection,
    summary="map old weights to new ones, as learned from other tasks",
    needs=("tasks",),
    contents=contents,
)
