"""Puts the page together: a part a task, and one more for each further diagnosis of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.report.page import Page, Part
from regraft.report.sections.distance import distance_sections
from regraft.report.sections.loss import loss_sections
from regraft.report.sections.methods import method_sections
from regraft.report.sections.provenance import provenance_sections
from regraft.report.sections.regressions import regression_sections
from regraft.report.sections.similarity import similarity_sections
from regraft.report.sections.summary import outcome_card, upgrade_sections, verdict_card
from regraft.report.standings import Setting, settings_by_task
from regraft.report.wording import base_name, number

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.report.find import Runs


def build_page(runs: Runs) -> Page:
    """Build the page.

    Args:
        runs: What was found.

    Returns:
        The page; its figures are drawn and not yet saved.
    """
    import regraft

    settings = settings_by_task(runs)
    diagnoses: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder, content in runs.diagnoses.items():
        diagnoses.setdefault(content["task"], []).append((folder, content))
    parts: list[Part] = []
    for task in dict.fromkeys([*diagnoses, *settings]):
        several: list[tuple[Path, dict[str, Any]] | None] = [*diagnoses.get(task, [])] or [None]
        for place, one in enumerate(several):
            name = f"part-{len(parts) + 1}"
            title = task if place == 0 or one is None else f"{task}: {base_name(one[1]['adaptation'])}"
            parts.append(_part(name, title, settings.get(task, []) if place == 0 else [], one))
    title = f"What the upgrade did to {parts[0].title}" if len(parts) == 1 else "What the upgrade did"
    return Page(title, tuple(parts), regraft.__version__)


def _part(name: str, title: str, settings: list[Setting], one: tuple[Path, dict[str, Any]] | None) -> Part:
    diagnosis = one[1] if one else None
    sections = [*method_sections(settings, name)]
    if diagnosis:
        sections = [
            *upgrade_sections(diagnosis),
            *sections,
            *loss_sections(diagnosis, name),
            *similarity_sections(diagnosis, name),
            *distance_sections(diagnosis, name),
            *regression_sections(diagnosis, name),
        ]
    sections += provenance_sections(settings, one)
    card = verdict_card(diagnosis) if diagnosis else outcome_card(settings)
    return Part(name, title, _about(settings, diagnosis), card, tuple(sections))


def _about(settings: list[Setting], diagnosis: dict[str, Any] | None) -> str:
    if diagnosis:
        check = diagnosis["check"]
        told = f"{base_name(diagnosis['old_base'])} → {base_name(diagnosis['new_base'])}"
        told += f" · {diagnosis['kind']} · {check['examples']:,} examples of {check['split']}"
        return f"{told} · {diagnosis['metric']} {number(check['old'])} before"
    count = sum(len(setting.standings) for setting in settings)
    return f"{settings[0].metric} on {settings[0].split} · {count} method{'' if count == 1 else 's'}"
