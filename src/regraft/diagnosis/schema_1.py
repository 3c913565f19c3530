"""Conversion of the diagnoses of regraft 0.1, which were of classification tasks only.

Their answers are at the top level of the JSON, and some shares are in percent.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from regraft.checkpoint.record import Count, percent_to_share
from regraft.diagnosis.question import Question, all_questions
from regraft.diagnosis.regressions import Flip, Regressions
from regraft.task.types.class_views import Calibration, ClassComparison, class_views

SCHEMA = 1
PERCENTAGES = {"check": "retained", "verdict": "predicted", "kept": "share"}
"""The field that schema 1 wrote in percent, by the name of the question."""
GUESS = "the most frequent class"  # of classification, the only task type of regraft 0.1


@dataclasses.dataclass(frozen=True)
class ClassRegressions:
    """The answer that became `Regressions`, for classification only.

    Args:
        split: As in `Regressions`.
        examples: As in `Regressions`.
        negative: As in `Regressions`.
        positive: As in `Regressions`.
        flips: As in `Regressions`.
        classes: Recall and flips of each label.
        mcnemar: As in `Regressions`.
        noise: As in `Regressions`.
        calibration: The calibration of the `old` and the `new` deployment.
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


def nest_answers(content: dict[str, Any]) -> dict[str, Any]:
    """Copy the answers, which schema 1 had at the top level, to the key `answers`.

    Args:
        content: The parsed JSON of `diagnosis.json`.

    Returns:
        The JSON with the keys of schema 2 and the values of schema 1; `guess`, which schema 1 lacks, is added.
    """
    answers = {question.name: content.get(question.name) for question in all_questions()}
    check = answers.get("check")
    if isinstance(check, dict):
        answers["check"] = {**check, "guess": GUESS}
    return {**content, "answers": answers}


def record_of(question: Question[Any]) -> Any:
    """Return the type that a question's answer had in schema 1.

    Args:
        question: A question of a diagnosis.

    Returns:
        A dataclass, or the type of a tuple of them, as in `Question.record`.
    """
    return ClassRegressions if question.record is Regressions else question.record


def convert(name: str, answer: Any) -> Any:
    """Convert an answer of schema 1 to its question's record.

    Args:
        name: The question's name.
        answer: An instance of the type that `record_of` returns.

    Returns:
        An instance of `Question.record`.
    """
    if isinstance(answer, ClassRegressions):
        return Regressions(
            split=answer.split,
            examples=answer.examples,
            negative=answer.negative,
            positive=answer.positive,
            flips=answer.flips,
            views=class_views(answer.classes, answer.calibration),
            mcnemar=answer.mcnemar,
            noise=answer.noise,
        )
    if name in PERCENTAGES:
        field = PERCENTAGES[name]
        return dataclasses.replace(answer, **{field: percent_to_share(getattr(answer, field))})
    return answer
