"""Diagnoses as regraft 0.1 wrote them: answers beside the other fields, some shares in percent, classes alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from regraft.checkpoint.record import Count, share_of
from regraft.diagnosis.question import Question, all_questions
from regraft.diagnosis.regressions import Flip, Regressions
from regraft.task.types.class_views import Calibration, ClassComparison, class_views

SCHEMA = 1
PERCENTAGES = {"check": "retained", "verdict": "predicted", "kept": "share"}
GUESS = "the most frequent class"  # of the only type of task that there was


@dataclasses.dataclass(frozen=True)
class ClassRegressions:
    """What changed from one classifier to the other.

    Args:
        split: As in `Regressions`.
        examples: As there.
        negative: As there.
        positive: As there.
        flips: As there.
        classes: Recall and flips by label.
        mcnemar: As there.
        noise: As there.
        calibration: Of the `old` and the `new` deployment.
    """

    split: str
    examples: Count
    negative: Count
    positive: Count
    flips: tuple[Flip, ...]
    classes: tuple[ClassComparison, ...]
    mcnemar: float
    noise: float | None
    calibration: dict[str, Calibration]


def renewed(content: dict[str, Any]) -> dict[str, Any]:
    """Put the answers where they are now.

    Args:
        content: What `diagnosis.json` holds.

    Returns:
        The same by today's fields; the figures are unchanged.
    """
    answers = {question.name: content.get(question.name) for question in all_questions()}
    if isinstance(checked := answers.get("check"), dict):
        answers["check"] = {**checked, "guess": GUESS}
    return {**content, "answers": answers}


def record_of(question: Question[Any]) -> Any:
    """Return the type of a question's answer.

    Args:
        question: The question.

    Returns:
        A dataclass, or a tuple of some.
    """
    return ClassRegressions if question.record is Regressions else question.record


def converted(name: str, answer: Any) -> Any:
    """Convert an answer to today's record.

    Args:
        name: Its question.
        answer: As it was read by `record_of`.

    Returns:
        The same figures.
    """
    if isinstance(answer, ClassRegressions):
        views = class_views(answer.classes, answer.calibration)
        return Regressions(
            answer.split, answer.examples, answer.negative, answer.positive, answer.flips, views, answer.mcnemar,
            answer.noise,
        )  # fmt: skip
    if name in PERCENTAGES:
        field = PERCENTAGES[name]
        return dataclasses.replace(answer, **{field: share_of(getattr(answer, field))})
    return answer
