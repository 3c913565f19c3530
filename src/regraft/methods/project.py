"""`project`: a map from old to new weights, learned from other tasks.

Source: Qin et al., 2023 (arXiv:2305.08702): P(v) = v·W1·W2 + b, where v is the vector of old weights; here, that of a
full fine-tune is its delta. The paper learns P by distillation; here it can also be a regression of new weights on old
ones.
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

MIN_PAIRS = 3
"""With fewer pairs, leaving one out for the test leaves at most one, from which a map with an intercept learns nothing
but a constant."""


def graft_mapped(job: Job, options: Projection) -> None:
    """Learn the map, and write the mapped old weights as an adaptation of the new base; by default the head is copied.

    Args:
        job: The job, with the adaptation to map.
        options: The pairs to learn from, and the options of the map.

    Raises:
        CheckpointError: A folder of a pair has no adaptation.
        DataError: By distillation, the data of a pair's task cannot be used.
        KindError: The weights have a row per token and the vocabularies differ, the adaptation has no weights to map,
            or by distillation, its kind is not supported or it is too large.
        MismatchError: An adaptation of a pair was tuned on a different base, or its weights differ in kind,
            shapes or settings.
        RecipeError: There are no pairs, a pair is not written OLD=NEW, or by distillation, the loss diverged.
    """
    if not options.pairs:
        raise RecipeError(
            "method project learns from other tasks: pass pairs of adaptations that were tuned on the old and on the "
            "new base, as in pairs=[old1=new1,old2=new2]."
        )
    if job.upgrade.old.fingerprint == job.upgrade.new.fingerprint:  # without an upgrade, there is no change to learn
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
        _write_mapped(job, mapped, mapped.__getitem__)
        return
    from regraft.methods.pairs import read_pairs

    vector = adaptation.family.vector(adaptation, job.upgrade.old)
    pairs = read_pairs(options.pairs, vector, job.upgrade)
    weights = _regress(pairs, vector, options, job)

    def read_mapped(name: str) -> torch.Tensor:
        return _map_tensor(name, vector, pairs, weights, residual=options.residual)

    _write_mapped(job, vector.names, read_mapped)


def _regress(pairs: Sequence[tuple[Vector, Vector]], vector: Vector, options: Projection, job: Job) -> list[float]:
    """Return the weight of each pair in the mapped vector, and note the errors of the map."""
    import torch

    from regraft.adaptation.vector import chunks
    from regraft.weights import leave_one_out_errors, project

    num_pairs = len(pairs)
    old_gram, target_gram = (torch.zeros(num_pairs, num_pairs, dtype=torch.float64) for _ in range(2))
    cross, squared_changes, squared_norms = (torch.zeros(num_pairs, dtype=torch.float64) for _ in range(3))
    all_chunks = list(chunks(vector))
    for num_read, (name, start, size) in enumerate(all_chunks, 1):
        old = torch.stack([old_vector.flat_slice(name, start, size) for old_vector, _ in pairs])
        new = torch.stack([new_vector.flat_slice(name, start, size) for _, new_vector in pairs])
        change = new - old
        target = change if options.residual else new
        old_gram += old @ old.T
        target_gram += target @ target.T
        cross += old @ vector.flat_slice(name, start, size)
        squared_changes += change.square().sum(dim=1)
        squared_norms += new.square().sum(dim=1)
        job.progress("pairs", num_read, len(all_chunks), {})
    new_norm = math.sqrt(float(squared_norms.sum())) or 1.0  # weights that are all zero cause no division by 0
    direct_error = math.sqrt(float(squared_changes.sum())) / new_norm
    job.notes["pairs"] = num_pairs
    job.notes["direct_error"] = round(direct_error, 4)
    job.notes["learned_from"] = [[old.fingerprint, new.fingerprint] for old, new in pairs]
    warning = ""
    if num_pairs > 1:
        errors = leave_one_out_errors(old_gram, target_gram, options.ridge, options.rank, intercept=options.intercept)
        map_error = math.sqrt(float(errors.sum())) / new_norm
        job.notes["left_out_error"] = round(map_error, 4)
        if map_error > direct_error:
            warning = f"on pairs left out in turn, the map is worse ({map_error:.3f}) than direct ({direct_error:.3f})"
    if num_pairs < MIN_PAIRS:
        pairs_are = "1 pair is" if num_pairs == 1 else f"{num_pairs} pairs are"
        warning = f"{pairs_are} too few to learn a map, or to test it"
    if warning:
        logger.warning("project: %s (distances relative to the new weights). Use direct, or pass more pairs.", warning)
    weights = project(old_gram, target_gram, cross, options.ridge, options.rank, intercept=options.intercept)
    return [float(weight) for weight in weights]


def _map_tensor(
    name: str, vector: Vector, pairs: Sequence[tuple[Vector, Vector]], weights: list[float], *, residual: bool
) -> torch.Tensor:
    """Return a tensor of the mapped vector, in float64."""
    import torch

    shape = vector.shapes[name]
    size = math.prod(shape)
    mapped = vector.flat_slice(name, 0, size) if residual else torch.zeros(size, dtype=torch.float64)
    for (old, new), weight in zip(pairs, weights, strict=True):
        mapped.add_(new.flat_slice(name, 0, size), alpha=weight)
        if residual:
            mapped.sub_(old.flat_slice(name, 0, size), alpha=weight)
    return mapped.reshape(shape)


def _write_mapped(job: Job, names: Collection[str], read_mapped: Callable[[str], torch.Tensor]) -> None:
    """Write the adaptation with the mapped tensors in place of the tensors of its vector."""
    from regraft.adaptation.graft import write_grafted_adaptation

    adaptation = job.adaptation
    upgrade = job.upgrade

    def write(folder: Path) -> None:
        mapped = adaptation.family.replace_vector(
            adaptation, upgrade, names, read_mapped, job.progress, replace=job.replace
        )
        job.notes.update(write_grafted_adaptation(adaptation, upgrade, mapped, folder, job.progress))

    job.write_with_head(write)


def fingerprint_pairs(options: Projection, seed: int) -> dict[str, Any]:
    """Compute the fingerprints of the pairs.

    Args:
        options: The options, with the pairs.
        seed: The seed of few-shot draws of the pairs' tasks.

    Returns:
        As `pairs`, the fingerprints of each pair's old and new weights; by distillation, each fingerprint of old
        weights and the digest of the task's data.

    Raises:
        CheckpointError: A folder has no adaptation.
        DataError: By distillation, the data of a pair's task cannot be used.
        RecipeError: A pair is not written OLD=NEW.
    """
    from regraft.adaptation import load_adaptation
    from regraft.methods.pairs import split_pair
    from regraft.task import load_data

    fingerprints = []
    for old, new_or_task in map(split_pair, options.pairs):
        if options.fit == "distill":
            target = load_data(new_or_task, seed).digest()
        else:
            target = load_adaptation(new_or_task).fingerprint
        fingerprints.append([load_adaptation(old).fingerprint, target])
    return {"pairs": fingerprints}


PROJECT = Start(
    "project",
    graft_mapped,
    Projection,
    summary="map old weights to new ones, as learned from other tasks",
    needs=("tasks",),
    contents=fingerprint_pairs,
)
