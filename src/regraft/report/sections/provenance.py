"""The section on provenance: inputs, versions, unanswered questions, and commands that reproduce the figures."""

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


def provenance_sections(settings: list[Setting], folder_and_diagnosis: tuple[Path, Diagnosis] | None) -> list[Section]:
    """Show bases, fingerprints, versions, recipes and commands.

    Args:
        settings: The part's settings.
        folder_and_diagnosis: The folder of the part's diagnosis, and the diagnosis; None without a diagnosis.

    Returns:
        A single section; none if there are neither runs nor a diagnosis.
    """
    runs = [run for setting in settings for run in setting.runs]
    blocks: list[Block] = []
    versions: list[Mapping[str, str]] = []
    commands: list[str] = []
    if folder_and_diagnosis:
        folder, diagnosis = folder_and_diagnosis
        blocks += _diagnosis_tables(diagnosis)
        versions.append(diagnosis.versions)
        commands.append(_check_command(folder, diagnosis))
    if runs:
        blocks += _run_tables(runs)
        versions += [run.record.versions for run in runs]
        commands += [command for command in map(_run_command, runs) if command]
    version_rows = _version_rows(versions)
    if version_rows:
        blocks.append(Table("Versions", ("package", "version"), version_rows, text_columns=2))
    if commands:
        blocks.append(Commands(f"To make it again, with your task file for {TASK_FILE}", tuple(commands)))
    if not blocks:
        return []
    lead = "The inputs behind the figures. Weights with equal fingerprints are identical."
    return [Section("provenance", "Provenance", lead, tuple(blocks))]


def _diagnosis_tables(diagnosis: Diagnosis) -> list[Block]:
    """Return the tables of a diagnosis's inputs, unanswered questions and times."""
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
    """Return the table of the runs' bases and adaptations, and the table of the runs."""
    input_rows: list[tuple[str, ...]] = []
    for run in runs:
        source = run.record.recycled_from
        if source:
            input_rows.append(("old base", source.old_base, source.old_base_fingerprint))
            input_rows.append(("adaptation", source.adaptation, source.fingerprint))
        input_rows.append(("base", run.record.base.name, run.record.base.fingerprint))
    unique_rows = tuple(dict.fromkeys(input_rows))
    rows = tuple((run.record.method, str(run.record.seed), str(run.path), _recipe(run.record.recipe)) for run in runs)
    return [
        Table("Bases and adaptations of the outcomes", ("what", "name", "fingerprint"), unique_rows, text_columns=3),
        Table("Outcomes", ("method", "seed", "folder", "recipe"), rows, text_columns=4),
    ]


def _recipe(recipe: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {_format_value(recipe[name])}" for name in _RECIPE_FIELDS if recipe.get(name)
    )


def _format_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _version_rows(version_records: Iterable[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    """Merge the versions of several records: one row per package, with all its versions."""
    versions_by_package: dict[str, list[str]] = {}
    for record in version_records:
        for package, version in record.items():
            package_versions = versions_by_package.setdefault(package, [])
            if version not in package_versions:
                package_versions.append(version)
    return tuple((package, ", ".join(versions)) for package, versions in sorted(versions_by_package.items()))


def _check_command(folder: Path, diagnosis: Diagnosis) -> str:
    """Return the command that makes a diagnosis again in its folder, with the options that its record tells."""
    words = ["regraft", "check", "--deep", "--old-base", diagnosis.old_base, "--new-base", diagnosis.new_base]
    words += ["--adaptation", diagnosis.adaptation, "--task", TASK_FILE]
    if diagnosis.compared != "direct":
        words += ["--counterpart", diagnosis.compared]
    for point in diagnosis.answers.get("compatibility", ())[1:]:  # the first is the old base
        words += ["--checkpoint", point.name]
    segment = diagnosis.answers.get("connectivity")
    if segment:
        words += ["--points", str(len(segment.mu))]
    plane = diagnosis.answers.get("plane")
    if plane:
        words += ["--plane", str(len(plane.x))]
    return shlex.join([*words, "--out", str(folder)])


def _run_command(run: Run) -> str | None:
    """Return the command that reproduces a run; None if the run is neither of `recycle` nor of `tune`."""
    record = run.record
    source = record.recycled_from
    if source:
        words = ["regraft", "recycle", "--old-base", source.old_base, "--new-base", record.base.name]
        words += ["--adaptation", source.adaptation, "--method", record.method]
        options = record.inputs.get("options")
        if isinstance(options, dict):
            for name, value in options.items():
                if isinstance(value, (str, int, float)) and value != "":
                    words += ["-o", f"{name}={value}"]
    elif record.method == "tune":
        words = ["regraft", "tune", record.base.name, "--kind", record.kind]
    else:
        return None
    words += ["--task", TASK_FILE, "--seed", str(record.seed)]
    for name in _RECIPE_FIELDS:
        if record.recipe.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", _format_value(record.recipe[name])]
    return shlex.join([*words, "--out", str(run.path)])
