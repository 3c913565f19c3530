"""The inputs and versions behind the figures, what was left out and why, and the commands to reproduce them."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from regraft.report.page import Block, Commands, Section, Table
from regraft.report.wording import MISSING, duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from regraft.diagnosis import Diagnosis
    from regraft.report.find import Run
    from regraft.report.summaries import Setting

TASK_FILE = "TASK.yaml"
_RECIPE_FIELDS = ("steps", "batch_size", "learning_rate", "warmup", "eval_every", "save_every", "precision")


def provenance_sections(settings: list[Setting], diagnosed: tuple[Path, Diagnosis] | None) -> list[Section]:
    """Show bases, fingerprints, versions, recipes and commands.

    Args:
        settings: The part's settings.
        diagnosed: The part's diagnosis and its folder; None without a diagnosis.

    Returns:
        The section; none if there is nothing to show.
    """
    runs = [run for setting in settings for run in setting.runs]
    blocks: list[Block] = []
    versions: list[Mapping[str, str]] = []
    commands: list[str] = []
    if diagnosed:
        folder, diagnosis = diagnosed
        blocks += _diagnosis_tables(diagnosis)
        versions.append(diagnosis.versions)
        commands.append(_check_command(folder, diagnosis))
    if runs:
        blocks += _run_tables(runs)
        versions += [run.record.versions for run in runs]
        commands += [command for run in runs if (command := _run_command(run))]
    if rows := _version_rows(versions):
        blocks.append(Table("Versions", ("package", "version"), rows, text_columns=2))
    if commands:
        blocks.append(Commands(f"To make it again, with your task file for {TASK_FILE}", tuple(commands)))
    if not blocks:
        return []
    lead = "The inputs behind the figures. Weights with equal fingerprints are identical."
    return [Section("provenance", "Provenance", lead, tuple(blocks))]


def _diagnosis_tables(diagnosis: Diagnosis) -> list[Block]:
    compared = "the old weights as they are" if diagnosis.compared == "direct" else diagnosis.compared
    fingerprints = diagnosis.fingerprints
    rows = (
        ("old base", diagnosis.old_base, fingerprints.get("old_base", MISSING)),
        ("new base", diagnosis.new_base, fingerprints.get("new_base", MISSING)),
        ("adaptation", diagnosis.adaptation, fingerprints.get("adaptation", MISSING)),
        ("compared with", compared, MISSING),
    )
    blocks: list[Block] = [Table("What was diagnosed", ("what", "name", "fingerprint"), rows, text_columns=3)]
    if diagnosis.left_out:
        reasons = tuple(sorted(diagnosis.left_out.items()))
        blocks.append(Table("Left out, and why", ("question", "reason"), reasons, text_columns=2))
    if diagnosis.seconds:
        times = [(name, duration(seconds)) for name, seconds in diagnosis.seconds.items()]
        times.append(("all", duration(sum(diagnosis.seconds.values()))))
        blocks.append(Table("What the diagnosis cost", ("question", "time"), tuple(times)))
    return blocks


def _run_tables(runs: list[Run]) -> list[Block]:
    inputs: dict[tuple[str, ...], None] = {}  # the keys are an ordered set: many runs have the same bases
    for record in (run.record for run in runs):
        if source := record.recycled_from:
            inputs["old base", source.old_base, source.old_base_fingerprint] = None
            inputs["adaptation", source.adaptation, source.fingerprint] = None
        inputs["base", record.base.name, record.base.fingerprint] = None
    rows = tuple((run.record.method, str(run.record.seed), str(run.path), _recipe(run.record.recipe)) for run in runs)
    return [
        Table("Bases and adaptations of the outcomes", ("what", "name", "fingerprint"), tuple(inputs), text_columns=3),
        Table("Outcomes", ("method", "seed", "folder", "recipe"), rows, text_columns=4),
    ]


def _recipe(recipe: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {_format_value(recipe[name])}" for name in _RECIPE_FIELDS if recipe.get(name)
    )


def _format_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _version_rows(version_records: Iterable[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    """Merge the versions of several records: a row for each package, with every version of it."""
    versions_by_package: dict[str, dict[str, None]] = {}
    for versions in version_records:
        for package, version in versions.items():
            versions_by_package.setdefault(package, {})[version] = None
    return tuple((package, ", ".join(versions)) for package, versions in sorted(versions_by_package.items()))


def _check_command(folder: Path, diagnosis: Diagnosis) -> str:
    words = ["regraft", "check", "--deep", "--old-base", diagnosis.old_base, "--new-base", diagnosis.new_base]
    words += ["--adaptation", diagnosis.adaptation, "--task", TASK_FILE]
    if diagnosis.compared != "direct":
        words += ["--counterpart", diagnosis.compared]
    for point in diagnosis.answers.get("compatibility", ())[1:]:  # the first is the old base
        words += ["--checkpoint", point.name]
    if segment := diagnosis.answers.get("connectivity"):
        words += ["--points", str(len(segment.mu))]
    if plane := diagnosis.answers.get("plane"):
        words += ["--plane", str(len(plane.x))]
    return shlex.join([*words, "--out", str(folder)])


def _run_command(run: Run) -> str | None:
    """Return the command that makes a run again; None if it came neither from `recycle` nor from `tune`."""
    record = run.record
    source, base = record.recycled_from, record.base.name
    if source:
        words = ["regraft", "recycle", "--old-base", source.old_base, "--new-base", base]
        words += ["--adaptation", source.adaptation, "--method", record.method]
        options = record.inputs.get("options") or {}
        for name, value in options.items() if isinstance(options, dict) else ():
            if isinstance(value, (str, int, float)) and value != "":
                words += ["-o", f"{name}={value}"]
    elif record.method == "tune":
        words = ["regraft", "tune", base, "--kind", record.kind]
    else:
        return None
    words += ["--task", TASK_FILE, "--seed", str(record.seed)]
    for name in _RECIPE_FIELDS:
        if record.recipe.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", _format_value(record.recipe[name])]
    return shlex.join([*words, "--out", str(run.path)])
