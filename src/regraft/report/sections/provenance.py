"""Where it all comes from, what was left out and why, and how to make it again."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from regraft.report.page import Block, Commands, Section, Table
from regraft.report.wording import NONE, seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from regraft.diagnosis import Diagnosis
    from regraft.report.find import Run
    from regraft.report.summaries import Setting

TASK_FILE = "TASK.yaml"
AS_THEY_ARE = "the old weights as they are"
_RECIPE = ("steps", "batch_size", "learning_rate", "warmup", "eval_every", "save_every", "precision")


def provenance_sections(settings: list[Setting], diagnosed: tuple[Path, Diagnosis] | None) -> list[Section]:
    """Show bases, fingerprints, versions, recipes and the commands.

    Args:
        settings: The part's outcomes.
        diagnosed: Its diagnosis, with the folder it lies in.

    Returns:
        The section.
    """
    runs = [run for setting in settings for run in setting.outcomes]
    blocks: list[Block] = []
    if diagnosed:
        blocks += _diagnosis(diagnosed[1])
    if runs:
        blocks += _outcomes(runs)
    versions = [diagnosed[1].versions] if diagnosed else []
    versions += [run.record.versions for run in runs]
    if rows := _versions(versions):
        blocks.append(Table("Versions", ("package", "version"), rows, prose=2))
    commands = [_check_command(*diagnosed)] if diagnosed else []
    commands += [command for run in runs if (command := _outcome_command(run))]
    if commands:
        blocks.append(Commands(f"To make it again, with your task file for {TASK_FILE}", tuple(commands)))
    if not blocks:
        return []
    lead = "What the figures come from. A fingerprint says whether weights are the very same."
    return [Section("provenance", "Provenance", lead, tuple(blocks))]


def _diagnosis(diagnosis: Diagnosis) -> list[Block]:
    marks = diagnosis.fingerprints
    rows = (
        ("old base", diagnosis.old_base, marks.get("old_base", NONE)),
        ("new base", diagnosis.new_base, marks.get("new_base", NONE)),
        ("adaptation", diagnosis.adaptation, marks.get("adaptation", NONE)),
        ("compared with", AS_THEY_ARE if diagnosis.compared == "direct" else diagnosis.compared, NONE),
    )
    blocks: list[Block] = [Table("What was diagnosed", ("what", "name", "fingerprint"), rows, prose=3)]
    if diagnosis.left_out:
        reasons = tuple(sorted(diagnosis.left_out.items()))
        blocks.append(Table("Left out, and why", ("question", "reason"), reasons, prose=2))
    if diagnosis.seconds:
        cost = [(name, seconds(value)) for name, value in diagnosis.seconds.items()]
        cost.append(("all", seconds(sum(diagnosis.seconds.values()))))
        blocks.append(Table("What the diagnosis cost", ("question", "time"), tuple(cost)))
    return blocks


def _outcomes(runs: list[Run]) -> list[Block]:
    bases: dict[tuple[str, ...], None] = {}
    for record in (run.record for run in runs):
        if source := record.recycled_from:
            bases["old base", source.old_base, source.old_base_fingerprint] = None
            bases["adaptation", source.adaptation, source.fingerprint] = None
        bases["base", record.base.name, record.base.fingerprint] = None
    rows = tuple((run.record.method, str(run.record.seed), str(run.path), _recipe(run.record.recipe)) for run in runs)
    return [
        Table("Bases and adaptations of the outcomes", ("what", "name", "fingerprint"), tuple(bases), prose=3),
        Table("Outcomes", ("method", "seed", "folder", "recipe"), rows, prose=4),
    ]


def _recipe(recipe: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_plain(recipe[name])}" for name in _RECIPE if recipe.get(name))


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _versions(several: Iterable[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    known: dict[str, dict[str, None]] = {}
    for versions in several:
        for package, version in versions.items():
            known.setdefault(package, {})[version] = None
    return tuple((package, ", ".join(versions)) for package, versions in sorted(known.items()))


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


def _outcome_command(run: Run) -> str | None:
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
    for name in _RECIPE:
        if record.recipe.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", _plain(record.recipe[name])]
    return shlex.join([*words, "--out", str(run.path)])
