"""The inputs and the output of the commands of `regraft weights`."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError, OutcomeError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from regraft.checkpoint import Checkpoint, DerivedTensors
    from regraft.weights import RowMatch

OPTIONS = {"new": "--new-base", "old": "--old-base", "tuned": "--adaptation", "adapter": "--adaptation"}
"""The option that names the checkpoint of a role; for other roles, `--` and the role."""


def open_checkpoints(paths: Mapping[str, str], check_finite: bool, as_stored: bool = False) -> dict[str, Checkpoint]:
    """Open a command's checkpoints.

    Args:
        paths: Folders, files or hub ids, by the checkpoints' roles.
        check_finite: Refuse infinite and NaN values.
        as_stored: Read quantised weights as their stored codes.

    Returns:
        The checkpoints, by role.
    """
    from regraft.checkpoint import Checkpoint
    from regraft.checkpoint import check_finite as check
    from regraft.cli.terminal import show_progress

    checkpoints = {role: Checkpoint.open(path, as_stored=as_stored) for role, path in paths.items()}
    if check_finite:
        with show_progress() as progress:
            for checkpoint in checkpoints.values():
                check(checkpoint, progress)
    return checkpoints


def name_tensors(checkpoints: dict[str, Checkpoint]) -> dict[str, Mapping[str, torch.Tensor]]:
    """Return tensors under the names of their transformers classes, or else under their stored names.

    A reason for stored names, such as an unknown class, is printed.

    Args:
        checkpoints: A command's checkpoints, by role.

    Returns:
        For each role, the tensors by name.

    Raises:
        CheckpointError: Some checkpoints are adapters and some are models.
    """
    from regraft.cli.terminal import print_text
    from regraft.naming import name_consistently

    folders = [checkpoint.folder for checkpoint in checkpoints.values()]
    adapters = [folder for folder in folders if (folder / "adapter_config.json").is_file()]
    if adapters and len(adapters) < len(folders):
        raise CheckpointError(
            f"{adapters[0]}: is an adapter, but another checkpoint is a model. Merge the adapter into its base first "
            "(regraft weights merge-lora)."
        )
    tensors, reason = name_consistently(checkpoints)
    if reason:
        print_text(reason)
    return tensors


def upgraded_settings(checkpoints: Mapping[str, Checkpoint], has_class: bool, has_same_ids: bool) -> dict[str, Any]:
    """Return the settings of `config.json` that a graft takes from the new base; see `transformers_folder`.

    Args:
        checkpoints: The new base (`new`), the fine-tune (`tuned`) and the old base (`old`).
        has_class: Whether transformers has a class for them, which knows the settings that config files leave out.
        has_same_ids: Whether every token has the same id in all three.

    Returns:
        The changed settings; empty if nothing changed, or if a checkpoint without class has no `config.json`.
    """
    from regraft import transformers_folder
    from regraft.base import is_causal
    from regraft.checkpoint import read_json

    ordered = [checkpoints[role] for role in ("tuned", "old", "new")]
    if has_class:
        loaded_configs = [transformers_folder.read_config(checkpoint) for checkpoint in ordered]
        configs = [config.to_dict() for config in loaded_configs]
        is_decoder = is_causal(loaded_configs[1])
    elif all((checkpoint.folder / "config.json").is_file() for checkpoint in ordered):
        configs = [read_json(checkpoint.folder / "config.json") for checkpoint in ordered]
        is_decoder = True  # unknown without a class: keep the fine-tune's `pad_token_id`
    else:
        return {}
    return transformers_folder.upgraded_settings(*configs, is_decoder=is_decoder, has_same_ids=has_same_ids)


def check_separate(out: Path, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Check that the output folder is not one of the inputs.

    Args:
        out: The output folder.
        checkpoints: A command's inputs, by role.

    Raises:
        OutcomeError: The output folder is the folder of an input.
    """
    for role, checkpoint in checkpoints.items():
        if out.resolve() == checkpoint.folder.resolve():
            raise OutcomeError(f"{out}: is the folder of {OPTIONS.get(role, f'--{role}')}. Choose another --out.")


def write_result(
    tensors: DerivedTensors,
    out: Path,
    checkpoints: dict[str, Checkpoint],
    template: str,
    operation: dict[str, Any],
    shard_size: float,
    dry_run: bool,
    rows: RowMatch | None = None,
    config: dict[str, Any] | None = None,
    tokenizer_folder: Path | None = None,
) -> None:
    """Write a command's result as a checkpoint folder, or print what that would take.

    Args:
        tensors: The result, computed while it is written.
        out: The output folder.
        checkpoints: A command's inputs, by role.
        template: The role of the checkpoint whose config and tokenizer are copied.
        operation: The operation and its settings, for the provenance.
        shard_size: The largest size of a file, in GB.
        dry_run: Print what writing would take, and write nothing.
        rows: How the rows of the vocabularies match; None where they are the same.
        config: The settings that replace those of the template's `config.json`; None to keep all.
        tokenizer_folder: The folder to copy the tokenizer from; None for the template's.
    """
    from regraft.checkpoint import TOKENIZER_FILES, copy_auxiliary_files, fingerprint, plan_checkpoint, write_folder
    from regraft.cli.terminal import format_size, print_line, show_progress
    from regraft.vocabulary import write_vocabulary

    check_separate(out, checkpoints)
    require_finite("--shard-size", shard_size)
    shard_bytes = int(shard_size * 1e9)
    if dry_run:
        plan = plan_checkpoint(tensors, out, shard_bytes)
        print_line(
            f"{out}: {plan.num_tensors:,} tensors in {plan.num_files} files\n"
            f"reads {format_size(plan.read_bytes)}, writes {format_size(plan.disk_bytes)} "
            f"(disk: {format_size(plan.free_bytes)} left), needs {format_size(plan.memory_bytes)} of memory for "
            "tensors\nnothing was written (--dry-run)"
        )
        return
    write_tokenizer: Callable[[Path], None] | None = None
    if tokenizer_folder:
        write_tokenizer = partial(copy_auxiliary_files, tokenizer_folder, patterns=TOKENIZER_FILES)
    if rows:
        folders = {role: checkpoints[role].folder for role in ("new", "tuned", "old")}
        write_tokenizer = partial(write_vocabulary, **folders, match=rows)
    provenance = {**operation, **{role: fingerprint(checkpoint) for role, checkpoint in checkpoints.items()}}
    with show_progress() as progress:
        write_folder(
            tensors,
            out,
            checkpoints[template].folder,
            provenance,
            shard_bytes,
            progress,
            write_tokenizer=write_tokenizer,
            changed_settings=config,
        )
    print_line(f"checkpoint: {out}")


def parse_factors(entries: list[str]) -> dict[str, float]:
    """Parse the values of `--scale-for`.

    Args:
        entries: Texts of the form PATTERN=NUMBER.

    Returns:
        The factors, by pattern.

    Raises:
        RecipeError: An entry has a different form, or its number is infinite or NaN.
    """
    factors: dict[str, float] = {}
    for entry in entries:
        pattern, _, number = entry.rpartition("=")
        try:
            factor: float | None = float(number)
        except ValueError:
            factor = None
        if factor is None or not pattern:
            raise RecipeError(f"--scale-for takes PATTERN=NUMBER, found {entry!r}.")
        require_finite(f"--scale-for {pattern}", factor)
        factors[pattern] = factor
    return factors


def require_finite(option: str, number: float) -> None:
    """Check that the number of an option is neither infinite nor NaN.

    Args:
        option: The name of the option, as in `--scale`.
        number: The value of the option.

    Raises:
        RecipeError: The number is infinite or NaN.
    """
    if not math.isfinite(number):
        raise RecipeError(f"{option} takes a finite number, found {number}.")
