"""What `diagnosis.json` holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.record import read_record
from regraft.diagnosis import schema_1
from regraft.diagnosis.question import all_questions
from regraft.errors import OutcomeError

if TYPE_CHECKING:
    from regraft.diagnosis.check import Check
    from regraft.diagnosis.verdict import Verdict

SCHEMA = 2
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
    if schema not in (schema_1.SCHEMA, SCHEMA):
        raise OutcomeError(
            f"{file}: has schema {schema!r:.40}, this regraft reads {schema_1.SCHEMA} and {SCHEMA}. Make it again with "
            f"this regraft's `{REMEDY}`."
        )
    is_old = schema == schema_1.SCHEMA
    content = schema_1.renewed(content) if is_old else content
    stored: Any = content.get("answers")
    if isinstance(stored, dict):  # each is read by itself
        content = {**content, "answers": {}}
    diagnosis = read_record(Diagnosis, content, file, REMEDY)
    answers = {}
    for question in all_questions():
        answer = stored.get(question.name)
        if answer not in (None, []):  # regraft 0.1 wrote an empty list where no checkpoint was named
            record, where = schema_1.record_of(question) if is_old else question.record, f"{file}: {question.name}"
            answers[question.name] = read_record(record, answer, where, REMEDY)
        elif question.is_required:
            raise OutcomeError(f"{file}: {question.name}: is missing. Make it again with `{REMEDY}`.")
    if is_old:
        answers = {name: schema_1.converted(name, answer) for name, answer in answers.items()}
    return dataclasses.replace(diagnosis, answers=answers, schema=SCHEMA)
