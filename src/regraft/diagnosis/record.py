"""The record of a diagnosis, and its reader from `diagnosis.json`."""

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

DIAGNOSIS_FILE = "diagnosis.json"
SCHEMA = 2
"""The current schema. Schema 1 is of regraft 0.1; see `schema_1`."""
REMEDY = "regraft check --deep"
"""The command that writes the record again, for error messages."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The answers to all questions about an upgrade and one adaptation.

    Args:
        task: The task's name.
        metric: The name of the task's metric.
        labels: The task's labels, in the order of the heads.
        old_base: The old base's path or hub id.
        new_base: The new base's path or hub id.
        adaptation: The folder of the adaptation tuned on the old base.
        kind: The adaptation's kind, such as `lora` or `full`.
        compared: What the questions that use a counterpart compared the old deployment with: `direct`, or the folder of
            the first counterpart.
        answers: The answer to each question by its name, as in `answers["connectivity"].barrier`; questions that were
            left out or not asked are missing.
        left_out: The reason why a question could not be answered, by the question's name.
        seconds: The time per question in seconds, by the question's name.
        fingerprints: The fingerprints of `old_base`, `new_base` and `adaptation`.
        versions: The versions of regraft and the libraries it computes with, by package.
        schema: The version of this record's format.
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
        """The effect of the upgrade on the adaptation, not tuned again."""
        answer: Check = self.answers["check"]
        return answer

    @property
    def verdict(self) -> Verdict:
        """The recommended action."""
        answer: Verdict = self.answers["verdict"]
        return answer


def read_diagnosis(content: dict[str, Any], file: str) -> Diagnosis:
    """Validate the content of `diagnosis.json`, and convert it if it is of schema 1.

    Args:
        content: The file's parsed JSON.
        file: The file's name for error messages.

    Returns:
        The diagnosis, without answers to questions that this version of regraft does not have.

    Raises:
        OutcomeError: The schema is unknown, or a field is missing or has the wrong type or shape.
    """
    schema = content.get("schema")
    if schema not in (schema_1.SCHEMA, SCHEMA):
        raise OutcomeError(
            f"{file}: has schema {schema!r:.40}, this regraft reads {schema_1.SCHEMA} and {SCHEMA}. Make it again with "
            f"this regraft's `{REMEDY}`."
        )
    is_schema_1 = schema == schema_1.SCHEMA
    if is_schema_1:
        content = schema_1.nest_answers(content)
    stored_answers: Any = content.get("answers")
    if isinstance(stored_answers, dict):  # each answer is validated below, by its question
        content = {**content, "answers": {}}
    diagnosis = read_record(Diagnosis, content, file, REMEDY)
    answers = {}
    for question in all_questions():
        answer = stored_answers.get(question.name)
        location = f"{file}: {question.name}"
        if answer in (None, []):  # regraft 0.1 wrote an empty list if no checkpoint was named
            if question.is_required:
                raise OutcomeError(f"{location}: is missing. Make it again with `{REMEDY}`.")
        elif is_schema_1:
            old_answer = read_record(schema_1.record_of(question), answer, location, REMEDY)
            answers[question.name] = schema_1.convert(question.name, old_answer)
        else:
            answers[question.name] = read_record(question.record, answer, location, REMEDY)
    return dataclasses.replace(diagnosis, answers=answers, schema=SCHEMA)
