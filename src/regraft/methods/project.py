"""`project`: a map from outdated to upgraded weights, learned from other tasks.

Source: Qin et al., 2023 (arXiv:2305.08702): P(v) = v·W1·W2 + b, v the old weights as one vector, learned there by
distillation on the tasks at hand. Here it can also be a regression from old weights onto new ones.
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

FEWEST = 3


def graft_mapped(job: Job, options: Projection) -> None:
    """Learn the map, and put what it makes of the old weights onto the new base; the head is copied.

    Args:
        job: What and where.
        options: What from, and how.

    Raises:
        KindError: The weights have numbers for each token, and the vocabularies differ.
    """
    if not options.pairs:
        raise RecipeError(
            "method project learns from other tasks: give pairs, as in pairs=[old1=new1,old2=new2], of what was tuned "
            "on the old and on the new base."
        )
    if job.upgrade.old.fingerprint == job.upgrade.new.fingerprint:  # nothing to be mapped to
        job.graft()
        return
    adaptation = job.adaptation
    if adaptation.family.has_token_rows(adaptation) and job.rows is not None:
        raise KindError(
            f"{job.upgrade.old.path} and {job.upgrade.new.path} have other vocabularies, and a map is learned from "
            "number to number. Take direct."
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
    """Return the weight of each pair in what the vector is mapped to, and note how far the map can be trusted."""
    import torch

    from regraft.adaptation.vector import chunks
    from regraft.weights import leave_one_out_errors, project

    count = len(pairs)
    gram, targets = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
    cross, apart, norms = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    todo = list(chunks(vector))
    for done, (name, start, size) in enumerate(todo, 1):
        old = torch.stack([first.flat_slice(name, start, size) for first, _ in pairs])
        new = torch.stack([second.flat_slice(name, start, size) for _, second in pairs])
        change = new - old
        target = change if options.residual else new
        gram += old @ old.T
        targets += target @ target.T
        cross += old @ vector.flat_slice(name, start, size)
        apart += change.square().sum(dim=1)
        norms += new.square().sum(dim=1)
        job.progress("pairs", done, len(todo), {})
    total = math.sqrt(float(norms.sum())) or 1.0
    direct = math.sqrt(float(apart.sum())) / total
    job.notes["pairs"], job.notes["direct_error"] = count, round(direct, 4)
    job.notes["learned_from"] = [[old.fingerprint, new.fingerprint] for old, new in pairs]
    warning = ""
    if count > 1:
        errors = leave_one_out_errors(gram, targets, options.ridge, options.rank, intercept=options.intercept)
        error = math.sqrt(float(errors.sum())) / total
        job.notes["left_out_error"] = round(error, 4)
        if error > direct:
            warning = f"left out in turn, each pair is mapped worse ({error:.3f}) than direct does ({direct:.3f})"
    if count < FEWEST:
        warning = f"{count} pairs are too few to learn a map from, or to tell whether it is any good"
    if warning:
        logger.warning("project: %s (distances relative to the new weights). Take direct, or give more pairs.", warning)
    weights = project(gram, targets, cross, options.ridge, options.rank, intercept=options.intercept)
    return [float(weight) for weight in weights]


def _map(
    name: str, vector: Vector, pairs: Sequence[tuple[Vector, Vector]], weights: list[float], *, residual: bool
) -> torch.Tensor:
    """Return one tensor of what the vector is mapped to, in float64."""
    import torch

    shape = vector.shapes[name]
    size = math.prod(shape)
    mapped = vector.flat_slice(name, 0, size) if residual else torch.zeros(size, dtype=torch.float64)
    for (old, new), weight in zip(pairs, weights, strict=True):
        mapped.add_(new.flat_slice(name, 0, size), alpha=weight)
        if residual:
            mapped.sub_(old.flat_slice(name, 0, size), alpha=weight)
    return mapped.reshape(shape)


def _write(job: Job, names: Collection[str], numbers: Callable[[str], torch.Tensor]) -> None:
    """Write the adaptation with the numbers that the map returns for the names of its vector."""
    from regraft.adaptation.graft import write_carried_adaptation

    adaptation, upgrade = job.adaptation, job.upgrade

    def write(into: Path) -> None:
        carried = adaptation.family.replace_vector(
            adaptation, upgrade, names, numbers, job.progress, replace=job.replace
        )
        job.notes.update(write_carried_adaptation(adaptation, upgrade, carried, into, job.progress))

    job.fill(write)


def contents(options: Projection, seed: int) -> dict[str, Any]:
    """Identify what the map is learned from.

    Args:
        options: The pairs.
        seed: What few-shot draws of their tasks follow from.

    Returns:
        As `pairs` the fingerprints of the old and the new weights of each, or of the old ones and the task's data.
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
    summary="map old weights to new ones, as other tasks tell",
    needs=("tasks",),
    contents=contents,
)
