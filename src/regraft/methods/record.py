"""Evaluation of newly written weights, and their record as an outcome."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import Outcome, load_adaptation, load_model, write_outcome, write_uniform
from regraft.adaptation.outcome import versions
from regraft.adaptation.outcome_record import (
    AGREEMENT,
    ANSWER_LOSS,
    BaseRecord,
    Cost,
    OutcomeRecord,
    Scores,
    TaskRecord,
)
from regraft.checkpoint import check_finite
from regraft.errors import CheckpointError, MismatchError
from regraft.model import Deployment
from regraft.model.keep import keep_digest, keep_metric, measure_keep
from regraft.recipe import best_step, check_trained
from regraft.task import chance_score
from regraft.tuning import plan_order

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from regraft.adaptation.outcome_record import Source
    from regraft.base import Base
    from regraft.checkpoint import Checkpoint
    from regraft.progress import Progress
    from regraft.recipe import Recipe
    from regraft.task import Split, Task, TaskData

SPLITS = ("dev", "test")
"""The splits that are scored."""
LM_EVAL_FOLDER = "lm_eval"
"""The folder of lm-evaluation-harness's sample logs, in that of an outcome or of a reference."""


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
        curve: The learning curve; empty if nothing was trained. The recorded curve then has the dev score alone, by the
            metric that selects the best weights, or nothing without labels.
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
    if data.task.uniform_loras:
        write_uniform(staging / "adaptation")
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
        predictions += prediction_rows(deployment, data, split)
        if data.labelled:
            scores[name] = deployment.score(split)
            if not data.task.head_in_base:  # otherwise chance is the bare base, which is not run for each outcome
                scores[f"{name}_majority"] = chance_score(data, split)
    if not curve and scores["dev"] is not None:
        selection_score = deployment.loss(data.dev) if data.task.head_in_base else scores["dev"]
        curve = [{"step": 0, "seconds": 0.0, "score": selection_score}]
    steps = int(curve[-1]["step"]) if curve else 0
    labels_read = set(labelled_rows) | _trained_rows(data, recipe, steps)
    notes = {**(notes or {}), **further_figures(deployment, data, staging, progress)}
    merit: Callable[[float], float] = data.selection.merit
    if scores_agreement:
        notes.setdefault("score", AGREEMENT)
        if notes["score"] != ANSWER_LOSS:
            merit = float
    record = OutcomeRecord(
        method=method,
        kind=adaptation.kind,
        inputs=inputs,
        task=TaskRecord(
            name=data.name,
            metric=data.metric,
            digest=data.digest(),
            train=len(data.train),
            type=data.task.type,
            selection=None if data.selection.name == data.metric else data.selection.name,
        ),
        labels=tuple(data.labels),
        seed=recipe.seed,
        recipe=recipe.record(),
        scores=Scores(**scores, dev_at_start=curve[0]["score"] if curve else None),
        best_step=best_step(curve, merit) if curve else 0,
        cost=Cost(
            steps=steps,
            seconds=notes.pop("seconds", round(curve[-1]["seconds"], 2) if curve else 0.0),
            labels=notes.pop("labels", len(labels_read)),
        ),
        notes=notes,
        base=BaseRecord(base.name, base.fingerprint),
        recycled_from=recycled_from,
        versions=versions(),
    )
    return write_outcome(staging, out, record, curve, predictions)


def further_inputs(task: Task) -> dict[str, Any]:
    """Identify what `further_figures` measures, for the provenance of an outcome.

    Args:
        task: The task.

    Returns:
        By key, the digest of `keep`, and the names of `lm_eval` with digests in place of files; empty without them.

    Raises:
        DataError: A file of `keep` is missing or malformed.
    """
    files = [(name, Path(name)) for name in getattr(task, "lm_eval", ())]  # only some task types have the key
    names = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name for name, path in files]
    inputs = {"keep": keep_digest(task), "lm_eval": names}
    return {key: value for key, value in inputs.items() if value}


def further_figures(deployment: Deployment, data: TaskData, folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure what a task names in `keep` and `lm_eval`.

    Args:
        deployment: The model on its base.
        data: The task's data.
        folder: The folder to which the harness's sample logs are written, in `LM_EVAL_FOLDER`.
        progress: Called at each batch.

    Returns:
        `keep`, a score and the name of its metric, and `lm_eval`, scores by task and metric; each only if the task
        names it.
    """
    from regraft.model.harness import run_lm_eval

    figures: dict[str, Any] = {}
    keep = measure_keep(deployment.model, deployment.base, data, deployment.precision, progress)
    metric = keep_metric(data.task)
    if metric is not None and keep is not None:
        figures["keep"] = {"metric": metric.name, "score": metric.round_score(keep)}
    harness_tasks = getattr(data.task, "lm_eval", ())  # only some task types have the key
    if harness_tasks:
        tokenizer = deployment.base.tokenizer
        figures["lm_eval"] = run_lm_eval(
            deployment.model,
            tokenizer,
            harness_tasks,
            folder / LM_EVAL_FOLDER,
            apply_chat_template=bool(tokenizer.chat_template),
            progress=progress,
        )
    return figures


def prediction_rows(deployment: Deployment, data: TaskData, split: Split) -> list[dict[str, Any]]:
    """Return the rows of `predictions.jsonl` for a split.

    Args:
        deployment: The model on its base.
        data: The task's data.
        split: The split of the data.

    Raises:
        MismatchError: Outputs are infinite or NaN.
    """
    if not deployment.is_finite(split):
        raise MismatchError(
            f"{deployment.base.path}: with the new weights on it, the outputs on {split.name} are infinite or NaN. "
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
    if data.task.answers_needed:  # then the answers are shown with their prompts
        columns["prompt"] = [data.task.as_text(inputs) for inputs in split.inputs]
    return [
        {"split": split.name, **dict(zip(columns, cells, strict=True))} for cells in zip(*columns.values(), strict=True)
    ]


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
