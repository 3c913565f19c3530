"""Everything there is to ask of an upgrade and one adaptation, in one record."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adaptation.outcome import versions
from regraft.checkpoint import check_place, to_json, write_atomic
from regraft.diagnosis.pair import load_counterpart, load_pair
from regraft.diagnosis.question import Asked, Questions, all_questions
from regraft.diagnosis.record import Diagnosis
from regraft.errors import MismatchError, OutcomeError
from regraft.model import Deployment
from regraft.progress import Progress, silent
from regraft.recipe import Recipe

if TYPE_CHECKING:
    from regraft.adaptation import Adaptation
    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade

RECORD = "diagnosis.json"


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
    """Ask everything of an upgrade and an adaptation.

    Args:
        upgrade: The old and the new base.
        adaptation: What was tuned on the old base, or its folder.
        task: A task file, a `Task` or its data.
        out: A folder for `diagnosis.json`, which `regraft report` shows; None to write nothing.
        questions: What else to look at.
        recipe: Whose seed and precision to use.
        force: Take the old base in spite of another fingerprint.
        progress: Told of each piece of work.

    Returns:
        What was found. A question that this kind of model does not answer is in `left_out`, with the reason.

    Raises:
        CheckpointError: A file of weights is not whole.
        DataError: The task's data cannot be used.
        MismatchError: Bases, adaptations and task do not belong together.
        OutcomeError: `out` holds something else.
    """
    options, recipe = questions or Questions(), recipe or Recipe()
    if out is not None:
        _check_place(Path(out))
    left_out: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with load_pair(upgrade, adaptation, task, recipe=recipe, force=force, progress=progress) as direct:
        pair, compared = direct, next(iter(options.counterparts), None)
        if compared is not None:
            model = load_counterpart(compared, upgrade.new, direct.data)
            new = Deployment(model, direct.upgrade.new, direct.data, direct.precision, progress)
            pair = dataclasses.replace(direct, new=new)
        asked = Asked(upgrade, direct, pair, options, {})
        for question in all_questions():
            started, answer = time.perf_counter(), None
            try:
                answer = question.ask(asked)
            except MismatchError as error:
                if question.is_required:
                    raise
                left_out[question.name] = str(error)
            if answer is not None:
                asked.answers[question.name] = answer
            if answer is not None or question.name in left_out:
                seconds[question.name] = round(time.perf_counter() - started, 2)
    result = Diagnosis(
        task=pair.data.name,
        metric=pair.data.metric,
        labels=tuple(pair.data.labels),
        old_base=upgrade.old.name,
        new_base=upgrade.new.name,
        adaptation=str(pair.adaptation.path),
        kind=pair.adaptation.kind,
        compared="direct" if compared is None else compared,
        answers=asked.answers,
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
        write_atomic(Path(out) / RECORD, to_json(dataclasses.asdict(result), RECORD) + "\n")
    return result


def _check_place(out: Path) -> None:
    check_place(out)
    if out.exists() and not (out.is_dir() and all(file.name == RECORD for file in out.iterdir())):
        raise OutcomeError(f"{out}: holds something else than a diagnosis. Choose another --out or remove it.")
