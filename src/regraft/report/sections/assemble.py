"""Assemble the page: one part per task, and one per further diagnosis of the task."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from regraft.diagnosis import all_questions
from regraft.report.page import Page, Part
from regraft.report.sections import methods
from regraft.report.sections.provenance import provenance_sections
from regraft.report.sections.summary import outcome_card, verdict_card
from regraft.report.summaries import Setting, settings_by_task
from regraft.report.wording import base_name, score_text
from regraft.task import find_metric

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.diagnosis import Diagnosis
    from regraft.report.find import ReportInputs
    from regraft.report.page import Section

    FolderAndDiagnosis = tuple[Path, Diagnosis]


def build_page(inputs: ReportInputs) -> Page:
    """Build the page from the records of a report.

    Args:
        inputs: The runs, comparisons and diagnoses.

    Returns:
        The page; the figures are drawn, but not yet saved.
    """
    import regraft

    settings = settings_by_task(inputs)
    diagnoses: dict[str, list[FolderAndDiagnosis]] = {}
    for folder, diagnosis in inputs.diagnoses.items():
        diagnoses.setdefault(diagnosis.task, []).append((folder, diagnosis))
    parts: list[Part] = []
    for task in dict.fromkeys([*diagnoses, *settings]):
        task_diagnoses = diagnoses.get(task, [])
        first = task_diagnoses[0] if task_diagnoses else None
        parts.append(_part(f"part-{len(parts) + 1}", task, settings.get(task, []), first))
        for folder, diagnosis in task_diagnoses[1:]:  # the runs are in the first part of the task
            title = f"{task}: {base_name(diagnosis.adaptation)}"
            parts.append(_part(f"part-{len(parts) + 1}", title, [], (folder, diagnosis)))
    title = f"What the upgrade did to {parts[0].title}" if len(parts) == 1 else "What the upgrade did"
    return Page(title, tuple(parts), regraft.__version__)


def _part(anchor: str, title: str, settings: list[Setting], folder_and_diagnosis: FolderAndDiagnosis | None) -> Part:
    """Build a part from the settings of a task, from a diagnosis, or from both."""
    diagnosis = folder_and_diagnosis[1] if folder_and_diagnosis else None
    ordered_sections = [(methods.ORDER, methods.method_sections(settings, anchor))]
    if diagnosis:
        ordered_sections += _answer_sections(diagnosis, anchor)
    sections: list[Section] = []
    for _, answer_sections in sorted(ordered_sections, key=lambda entry: entry[0]):
        sections += answer_sections
    sections += provenance_sections(settings, folder_and_diagnosis)
    card = verdict_card(diagnosis) if diagnosis else outcome_card(settings)
    return Part(anchor, title, _subtitle(settings, diagnosis), card, tuple(sections))


def _answer_sections(diagnosis: Diagnosis, prefix: str) -> list[tuple[int, list[Section]]]:
    """Return the order and the sections of each answer for whose question there is a module of sections."""
    ordered_sections = []
    for question in all_questions():
        module_name = f"{__package__}.{question.section or question.name}"
        answer = diagnosis.answers.get(question.name)
        if answer is not None and importlib.util.find_spec(module_name):
            module = importlib.import_module(module_name)
            ordered_sections.append((module.ORDER, module.show(answer, diagnosis, prefix)))
    return ordered_sections


def _subtitle(settings: list[Setting], diagnosis: Diagnosis | None) -> str:
    if diagnosis:
        check = diagnosis.check
        bases = f"{base_name(diagnosis.old_base)} → {base_name(diagnosis.new_base)}"
        examples = f"{check.examples:,} examples of {check.split}"
        subtitle = f"{bases} · {diagnosis.kind} · {examples}"
        if check.old is None:
            return subtitle
        return f"{subtitle} · {diagnosis.metric} {score_text(check.old, find_metric(diagnosis.metric))} before"
    num_methods = sum(len(setting.summaries) for setting in settings)
    return f"{settings[0].metric} on {settings[0].split} · {num_methods} method{'' if num_methods == 1 else 's'}"
