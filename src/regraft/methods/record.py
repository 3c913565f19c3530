"""Evaluation of newly written weights, and their record as an outcome."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation import Outcome, load_adaptation, load_model, write_outcome
from regraft.adaptation.outcome import versions
from regraft.adaptation.outcome_record import BaseRecord, Cost, OutcomeRecord, Scores, TaskRecord
from regraft.checkpoint import check_finite
from regraft.errors import CheckpointError, MismatchError
from regraft.model import Deployment
from regraft.recipe import best_step, check_trained
from regraft.task import chance_score
from regraft.tuning import plan_order

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from regraft.adaptation.outcome_record import Source
    from regraft.base import Base
    from regraft.checkpoint import Checkpoint
    from regraft.progress import Progress
    from regraft.recipe import Recipe
    from regraft.task import Split, TaskData

SPLITS = ("dev", "test")
"""The splits that are scored."""


def record_outcome(
    staging: Path,
    out: Path,
    base: Base,
    data: TaskData,
    recipe: Recipe,
    curve: list[dict[str, float]],
    inputs: dict[str, Any],
    *,
    method: str,
    recycled_from: Source | None,
    notes: dict[str, Any] | None = None,
    labelled_rows: Collection[int] = (),
    scores_agreement: bool = False,
    progress: Progress,
) -> Outcome:
    """Load a newly written adaptation, evaluate it on the dev and test splits, and publish the outcome.

    Args:
        staging: A folder with the adaptation in `adaptation/`, which becomes the outcome folder.
        out: The final path of the outcome folder.
        base: The base that the adaptation is loaded on.
        data: The task's data.
        recipe: The resolved recipe, with steps and precision.
        curve: The learning curve; empty if nothing was trained.
        inputs: The provenance of the outcome, by which a later run recognises the same inputs.
        method: The method's name on the command line, or `tune`.
        recycled_from: The adaptation that was carried over; None for one tuned from scratch.
        notes: The method's notes as JSON by name; `labels` and `seconds` become the cost.
        labelled_rows: The row numbers of training examples whose labels were read outside training steps.
        scores_agreement: Whether the scores of the curve are agreement with the old model, not the task's metric.
        progress: Called at each batch.

    Returns:
        The published outcome.

    Raises:
        CheckpointError: The adaptation does not load completely.
        MismatchError: Outputs are infinite or NaN, or weights are although nothing was trained.
        OutcomeError: A figure is infinite or NaN, or `out` exists.
        RecipeError: Weights are infinite or NaN after training.
    """
    adaptation = load_adaptation(staging / "adaptation")
    if curve:
        check_trained(adaptation.checkpoint, recipe)
    else:
        _check_grafted(adaptation.checkpoint, base)
    deployment = Deployment(load_model(adaptation, base, data.head), base, data, recipe.precision, progress)
    predictions: list[dict[str, Any]] = []
    scores: dict[str, float | None] = {}
    for name in SPLITS:
        split = getattr(data, name)
        scores |= {name: None, f"{name}_majority": None}
        if split is None:
            continue
        predictions += _prediction_rows(deployment, data, name, split)
        if data.labelled:
            scores |= {name: deployment.score(split), f"{name}_majority": chance_score(data, split)}
    is_trained = bool(curve)
    # without labels there is no score, but a curve needs one
    curve = curve or [{"step": 0, "seconds": 0.0, "score": float(scores["dev"] or 0.0)}]
    steps = int(curve[-1]["step"])
    merit = float if scores_agreement else data.scoring.merit
    labels_read = set(labelled_rows) | _trained_rows(data, recipe, steps)
    notes = dict(notes or {})
    record = OutcomeRecord(
        method=method,
        kind=adaptation.kind,
        inputs=inputs,
        task=TaskRecord(data.name, data.metric, data.digest(), len(data.train), data.task.type),
        labels=tuple(data.labels),
        seed=recipe.seed,
        recipe=dataclasses.asdict(recipe),
        scores=Scores(**scores, dev_at_start=curve[0]["score"] if is_trained or data.labelled else None),
        best_step=best_step(curve, merit),
        cost=Cost(
            steps=steps,
            seconds=notes.pop("seconds", round(curve[-1]["seconds"], 2)),
            labels=notes.pop("labels", len(labels_read)),
        ),
        notes=notes,
        base=BaseRecord(base.name, base.fingerprint),
        recycled_from=recycled_from,
        versions=versions(),
    )
    return write_outcome(staging, out, record, curve, predictions)


def _prediction_rows(deployment: Deployment, data: TaskData, name: str, split: Split) -> list[dict[str, Any]]:
    """Return the rows of `predictions.jsonl` for a split, or refuse outputs that are infinite or NaN."""
    if not deployment.is_finite(split):
        raise MismatchError(
            f"{deployment.base.path}: with the new weights on it, the outputs on {name} are infinite or NaN. "
            "Compute in fp32 (--precision), or choose another method."
        )
    unknown = [None] * len(split)
    confidence = deployment.confidence(split)
    columns = {
        "row": split.row_numbers.tolist(),
        "label": split.targets.tolist() if data.labelled else unknown,
        "prediction": deployment.predictions(split),
        "right": deployment.right(split) if data.labelled else unknown,
        "confidence": unknown if confidence is None else [round(value, 4) for value in confidence],
    }
    return [{"split": name, **dict(zip(columns, cells, strict=True))} for cells in zip(*columns.values(), strict=True)]


def _trained_rows(data: TaskData, recipe: Recipe, steps: int) -> set[int]:
    """Return the row numbers of the training examples that the steps of a training read."""
    import numpy as np

    if not steps:
        return set()
    lengths = np.zeros(len(data.train), dtype=np.int64)  # lengths affect when an example is read, not whether
    order = plan_order(lengths, recipe.batch_size, steps, recipe.seed)
    return set(data.train.row_numbers[order].tolist())


def _check_grafted(checkpoint: Checkpoint, base: Base) -> None:
    """Refuse weights that are infinite or NaN although nothing was trained."""
    try:
        check_finite(checkpoint)
    except CheckpointError as error:
        raise MismatchError(
            f"{base.path}: with this method, the new weights on it are infinite or NaN. A base or the "
            "adaptation has such values (regraft weights inspect --check-finite names them), or an option is too large."
        ) from error
