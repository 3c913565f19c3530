"""What `diagnosis.json` holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.record import read_record, share_of
from regraft.diagnosis.question import every_question
from regraft.errors import OutcomeError

if TYPE_CHECKING:
    from regraft.diagnosis.check import Check
    from regraft.diagnosis.verdict import Verdict

SCHEMA = 2  # regraft 0.1 wrote 1: answers beside the other fields, and some of their shares in percent
PERCENTAGES = {"check": "retained", "verdict": "predicted", "kept": "share"}
REMEDY = "regraft check --deep"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a diagnosis found.

    Args:
        task: The task's name.
        metric: Its metric.
        labels: Its labels, in the order of the heads.
        old_base: The old base.
        new_base: The new one.
        adaptation: What was tuned on the old base.
        kind: Its kind.
        compared: What the old deployment was compared with: `direct`, or an outcome.
        answers: By question its answer, as `answers["connectivity"].barrier`; without what was left out or not asked.
        left_out: Why a question was not answered, by its name.
        seconds: What each took.
        fingerprints: Of both bases and the adaptation.
        versions: Of the libraries.
        schema: Of this record.
    """

    task: str
    metric: str
    labels: tuple[str, ...]
    old_base: str
    new_base: str
    adaptation: str
    kind: str
    compared: str
    answers: dict[str, Any]
    left_out: dict[str, str]
    seconds: dict[str, float]
    fingerprints: dict[str, str]
    versions: dict[str, str]
    schema: int = SCHEMA

    @property
    def check(self) -> Check:
        """The old weights on the new base as they are."""
        answer: Check = self.answers["check"]
        return answer

    @property
    def verdict(self) -> Verdict:
        """What to do."""
        answer: Verdict = self.answers["verdict"]
        return answer


def read_diagnosis(content: dict[str, Any], file: str) -> Diagnosis:
    """Read a diagnosis.

    Args:
        content: What `diagnosis.json` holds.
        file: Its name, for the message.

    Returns:
        The diagnosis, without answers to questions that this regraft does not know.

    Raises:
        OutcomeError: It has another schema, or a field is missing, of another type or of another shape.
    """
    schema = content.get("schema")
    if schema not in (1, SCHEMA):
        raise OutcomeError(
            f"{file}: has schema {schema!r:.40}, this regraft reads 1 and {SCHEMA}. Make it again with this regraft's "
            f"`{REMEDY}`."
        )
    if schema == 1:
        content = {**content, "answers": {question.name: content.get(question.name) for question in every_question()}}
    diagnosis = read_record(Diagnosis, content, file, REMEDY)
    answers = {}
    for question in every_question():
        answer = diagnosis.answers.get(question.name)
        if answer:
            answers[question.name] = read_record(question.record, answer, f"{file}: {question.name}", REMEDY)
        elif question.is_required:
            raise OutcomeError(f"{file}: {question.name}: is missing. Make it again with `{REMEDY}`.")
    for name, field in PERCENTAGES.items() if schema == 1 else ():
        if name in answers:
            share = share_of(getattr(answers[name], field))
            answers[name] = dataclasses.replace(answers[name], **{field: share})
    return dataclasses.replace(diagnosis, answers=answers, schema=SCHEMA)
