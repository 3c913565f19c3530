"""The whole diagnosis: all questions about an upgrade and an adaptation, answered in one record."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adaptation.outcome import versions
from regraft.checkpoint import check_output_path, write_json
from regraft.diagnosis.pair import load_counterpart, load_pair
from regraft.diagnosis.question import QuestionContext, Questions, all_questions
from regraft.diagnosis.record import DIAGNOSIS_FILE, Diagnosis
from regraft.errors import MismatchError, OutcomeError
from regraft.model import Deployment
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from regraft.adaptation import Adaptation
    from regraft.recipe import Recipe
    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade


def diagnose(
    upgrade: Upgrade,
    adaptation: Adaptation | str | Path,
    task: Task | TaskData | str | Path,
    out: str | Path | None = None,
    *,
    questions: Questions | None = None,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Diagnosis:
    """Answer every question about an upgrade and an adaptation.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation tuned on the old base, or its folder.
        task: A task file, a `Task` or its data.
        out: A folder for `diagnosis.json`, which `regraft report` shows; None to write nothing.
        questions: The options of the questions; None for the defaults.
        recipe: The recipe whose seed and precision are used; None for the default recipe.
        force: Whether to accept an adaptation that records a different old base.
        progress: Called after each batch, tensor or point, with the name of the stage.

    Returns:
        The diagnosis. A question that this kind of model cannot answer is in `left_out`, with the reason.

    Raises:
        CheckpointError: A weight file is incomplete or damaged, or holds infinite or NaN values.
        DataError: The task's data is malformed or has no labels, or the text for `retention` cannot be read or is too
            short.
        MismatchError: The bases, the adaptations and the task do not fit together, or an output is infinite or NaN.
        OutcomeError: `out` is not a folder, or holds something other than a diagnosis.
        RecipeError: The bases are encoders whose tokenizer has no mask token.
    """
    options = questions or Questions()
    if out is not None:
        _check_output_folder(Path(out))
    counterpart = options.counterparts[0] if options.counterparts else None
    with load_pair(upgrade, adaptation, task, recipe=recipe, force=force, progress=progress) as direct:
        pair = direct
        if counterpart is not None:
            model = load_counterpart(counterpart, upgrade.new, direct.data)
            new = Deployment(model, direct.upgrade.new, direct.data, direct.precision, progress)
            pair = dataclasses.replace(direct, new=new)
        context = QuestionContext(upgrade, direct, pair, options, answers={})
        left_out, seconds = _answer_all(context)
    result = Diagnosis(
        task=pair.data.name,
        metric=pair.data.metric,
        labels=tuple(pair.data.labels),
        old_base=upgrade.old.name,
        new_base=upgrade.new.name,
        adaptation=str(pair.adaptation.path),
        kind=pair.adaptation.kind,
        compared="direct" if counterpart is None else counterpart,
        answers=context.answers,
        left_out=left_out,
        seconds=seconds,
        fingerprints={
            "old_base": upgrade.old.fingerprint,
            "new_base": upgrade.new.fingerprint,
            "adaptation": pair.adaptation.fingerprint,
        },
        versions=versions(),
    )
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / DIAGNOSIS_FILE, dataclasses.asdict(result))
    return result


def _answer_all(context: QuestionContext) -> tuple[dict[str, str], dict[str, float]]:
    """Add the answers to the context; return the reason per question left out, and the seconds per question."""
    left_out: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for question in all_questions():
        start_time = time.perf_counter()
        try:
            answer = question.answer(context)
        except MismatchError as error:
            if question.is_required:
                raise
            left_out[question.name] = str(error)
        else:
            if answer is None:  # the options do not ask the question
                continue
            context.answers[question.name] = answer
        seconds[question.name] = round(time.perf_counter() - start_time, 2)
    return left_out, seconds


def _check_output_folder(out: Path) -> None:
    """Refuse a path that is neither free nor a folder with a diagnosis alone."""
    check_output_path(out)
    if out.exists() and not (out.is_dir() and all(file.name == DIAGNOSIS_FILE for file in out.iterdir())):
        raise OutcomeError(f"{out}: holds something other than a diagnosis. Choose another --out or remove it.")
