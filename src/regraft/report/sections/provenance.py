"""Where it all comes from, what was left out and why, and how to make it again."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from regraft.report.page import Block, Commands, Section, Table
from regraft.report.wording import seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from regraft.report.find import Found
    from regraft.report.standings import Setting

TASK_FILE = "TASK.yaml"
_RECIPE = ("steps", "batch_size", "learning_rate", "warmup", "eval_every", "save_every", "precision")


def provenance_sections(settings: list[Setting], one: tuple[Path, dict[str, Any]] | None) -> list[Section]:
    """Show bases, fingerprints, versions, recipes and the commands.

    Args:
        settings: The part's outcomes.
        one: Its diagnosis, with the folder it lies in.

    Returns:
        The section.
    """
    outcomes = [found for setting in settings for found in setting.outcomes]
    blocks: list[Block] = []
    if one:
        blocks += _diagnosis(one[1])
    if outcomes:
        blocks += _outcomes(outcomes)
    versions = [one[1]["versions"]] if one else []
    versions += [found.record["versions"] for found in outcomes]
    if rows := _versions(versions):
        blocks.append(Table("Versions", ("package", "version"), rows, prose=2))
    commands = [_check_command(*one)] if one else []
    commands += [command for found in outcomes if (command := _outcome_command(found))]
    if commands:
        blocks.append(Commands(f"To make it again, with your task file for {TASK_FILE}", tuple(commands)))
    if not blocks:
        return []
    lead = "What the figures come from. A fingerprint says whether weights are the very same."
    return [Section("provenance", "Provenance", lead, tuple(blocks))]


def _diagnosis(diagnosis: dict[str, Any]) -> list[Block]:
    marks = diagnosis["fingerprints"]
    rows = tuple(
        (what, diagnosis[name], marks.get(name, "–"))
        for what, name in (("old base", "old_base"), ("new base", "new_base"), ("adaptation", "adaptation"))
    )
    compared = "the old weights as they are" if diagnosis["compared"] == "direct" else diagnosis["compared"]
    rows += (("compared with", compared, "–"),)
    blocks: list[Block] = [Table("What was diagnosed", ("what", "name", "fingerprint"), rows, prose=3)]
    if diagnosis["left_out"]:
        reasons = tuple(sorted(diagnosis["left_out"].items()))
        blocks.append(Table("Left out, and why", ("question", "reason"), reasons, prose=2))
    if diagnosis["seconds"]:
        cost = [(name, seconds(value)) for name, value in diagnosis["seconds"].items()]
        cost.append(("all", seconds(sum(diagnosis["seconds"].values()))))
        blocks.append(Table("What the diagnosis cost", ("question", "time"), tuple(cost)))
    return blocks


def _outcomes(outcomes: list[Found]) -> list[Block]:
    bases: dict[tuple[str, ...], None] = {}
    for found in outcomes:
        source = found.record.get("recycled_from")
        if source:
            bases["old base", source["old_base"], source["old_base_fingerprint"]] = None
            bases["adaptation", source["adaptation"], source["fingerprint"]] = None
        bases["base", found.record["base"]["name"], found.record["base"]["fingerprint"]] = None
    rows = tuple(
        (found.record["method"], str(found.record["seed"]), str(found.path), _recipe(found.record["recipe"]))
        for found in outcomes
    )
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


def _check_command(folder: Path, diagnosis: dict[str, Any]) -> str:
    words = ["regraft", "check", "--deep", "--old-base", diagnosis["old_base"], "--new-base", diagnosis["new_base"]]
    words += ["--adaptation", diagnosis["adaptation"], "--task", TASK_FILE]
    if diagnosis["compared"] != "direct":
        words += ["--counterpart", diagnosis["compared"]]
    for point in diagnosis["compatibility"][1:]:  # the first is the old base
        words += ["--checkpoint", point["name"]]
    if diagnosis["connectivity"]:
        words += ["--points", str(len(diagnosis["connectivity"]["mu"]))]
    if diagnosis["plane"]:
        words += ["--plane", str(len(diagnosis["plane"]["x"]))]
    return shlex.join([*words, "--out", str(folder)])


def _outcome_command(found: Found) -> str | None:
    record = found.record
    source, base = record.get("recycled_from"), record["base"]["name"]
    if source:
        words = ["regraft", "recycle", "--old-base", source["old_base"], "--new-base", base]
        words += ["--adaptation", source["adaptation"], "--method", record["method"]]
        options = (record.get("inputs") or {}).get("options") or {}
        for name, value in options.items() if isinstance(options, dict) else ():
            if isinstance(value, (str, int, float)) and value != "":
                words += ["-o", f"{name}={value}"]
    elif record["method"] == "tune":
        words = ["regraft", "tune", base, "--kind", record["kind"]]
    else:
        return None
    words += ["--task", TASK_FILE, "--seed", str(record["seed"])]
    for name in _RECIPE:
        if record["recipe"].get(name) is not None:
            words += [f"--{name.replace('_', '-')}", _plain(record["recipe"][name])]
    return shlex.join([*words, "--out", str(found.path)])
