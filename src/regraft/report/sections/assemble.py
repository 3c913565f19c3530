"""Puts the page together: a part a task, and one more for each further diagnosis of it."""

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
from regraft.report.wording import base_name, number

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.diagnosis import Diagnosis
    from regraft.report.find import Runs
    from regraft.report.page import Section

    Diagnosed = tuple[Path, Diagnosis]


def build_page(runs: Runs) -> Page:
    """Build the page.

    Args:
        runs: What there is to report.

    Returns:
        The page; its figures are drawn and not yet saved.
    """
    import regraft

    settings = settings_by_task(runs)
    by_task: dict[str, list[Diagnosed]] = {}
    for folder, diagnosis in runs.diagnoses.items():
        by_task.setdefault(diagnosis.task, []).append((folder, diagnosis))
    parts: list[Part] = []
    for task in dict.fromkeys([*by_task, *settings]):
        diagnoses: list[Diagnosed | None] = [*by_task.get(task, [])] or [None]
        for number_of_task, diagnosed in enumerate(diagnoses):
            name, is_first = f"part-{len(parts) + 1}", number_of_task == 0
            title = task if is_first or diagnosed is None else f"{task}: {base_name(diagnosed[1].adaptation)}"
            parts.append(_part(name, title, settings.get(task, []) if is_first else [], diagnosed))
    title = f"What the upgrade did to {parts[0].title}" if len(parts) == 1 else "What the upgrade did"
    return Page(title, tuple(parts), regraft.__version__)


def _part(name: str, title: str, settings: list[Setting], diagnosed: Diagnosed | None) -> Part:
    diagnosis = diagnosed[1] if diagnosed else None
    ordered = [(methods.ORDER, methods.method_sections(settings, name))]
    if diagnosis:
        ordered += _answers(diagnosis, name)
    sections = [section for _, several in sorted(ordered, key=lambda entry: entry[0]) for section in several]
    sections += provenance_sections(settings, diagnosed)
    card = verdict_card(diagnosis) if diagnosis else outcome_card(settings)
    return Part(name, title, _about(settings, diagnosis), card, tuple(sections))


def _answers(diagnosis: Diagnosis, part: str) -> list[tuple[int, list[Section]]]:
    """Show each answer by the module that has its question's name, if there is one, with that module's place."""
    answers = []
    for question in all_questions():
        module, answer = f"{__package__}.{question.section or question.name}", diagnosis.answers.get(question.name)
        if answer is not None and importlib.util.find_spec(module):
            section = importlib.import_module(module)
            answers.append((section.ORDER, section.show(answer, diagnosis, part)))
    return answers


def _about(settings: list[Setting], diagnosis: Diagnosis | None) -> str:
    if diagnosis:
        check = diagnosis.check
        about = f"{base_name(diagnosis.old_base)} → {base_name(diagnosis.new_base)}"
        about += f" · {diagnosis.kind} · {check.examples:,} examples of {check.split}"
        return f"{about} · {diagnosis.metric} {number(check.old)} before"
    count = sum(len(setting.standings) for setting in settings)
    return f"{settings[0].metric} on {settings[0].split} · {count} method{'' if count == 1 else 's'}"
