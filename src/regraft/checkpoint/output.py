"""A checkpoint folder made from others: tensors, and the small files that belong to them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.derived import CHUNK_ELEMENTS, DerivedTensors
from regraft.checkpoint.file import write_atomic
from regraft.checkpoint.folder import check_output_path, publish, resumable_folder, working_folder
from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.quantised import without_quantisation
from regraft.checkpoint.writer import SHARD_BYTES, byte_size, cores, matches_checkpoint, plan_shards, write_checkpoint
from regraft.errors import CheckpointError, DiskFullError, OutcomeError
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

COMPANIONS = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.tiktoken")
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "tekken.json", "*.model",
    "*.spm", "*.jinja", "*.tiktoken",
)  # fmt: skip
RECORD = "regraft.json"
RESULTS = "results"
NOT_COPIED = (RECORD, "lineage.json", "pretraining.json", "outcome.json", "adapter_config.json")


@dataclass(frozen=True)
class WritePlan:
    """What writing a checkpoint takes.

    Args:
        num_tensors: How many tensors.
        num_files: How many files of tensors.
        disk_bytes: Bytes on disk.
        read_bytes: Bytes that are read.
        memory_bytes: Bytes in memory for tensors, beside what Python and torch take.
        free_bytes: Bytes the disk has left.
    """

    num_tensors: int
    num_files: int
    disk_bytes: int
    read_bytes: int
    memory_bytes: int
    free_bytes: int


def plan_checkpoint(tensors: Mapping[str, torch.Tensor], out: Path, shard_bytes: int = SHARD_BYTES) -> WritePlan:
    """Foresee what writing takes, and refuse if the disk has not enough room.

    Args:
        tensors: What is to be written.
        out: Where to.
        shard_bytes: The largest size of a file.

    Returns:
        The plan.

    Raises:
        DiskFullError: The disk has not enough room.
        OutcomeError: No folder can be made at `out`.
    """
    check_output_path(out)
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    disk = sum(byte_size(tensors, name) for name in tensors)
    free = shutil.disk_usage(parent).free
    plan = WritePlan(
        num_tensors=len(tensors),
        num_files=len(plan_shards(tensors, shard_bytes)),
        disk_bytes=disk,
        read_bytes=sum(_read(tensors, name) for name in tensors),
        memory_bytes=max((_memory(tensors, name) for name in tensors), default=0),
        free_bytes=free,
    )
    if disk > free + _kept(out):
        raise DiskFullError(f"{out}: {disk:,} bytes are to be written, the disk has {free:,} left: make room.")
    return plan


def write_folder(
    tensors: Mapping[str, torch.Tensor],
    out: Path,
    template: Path,
    provenance: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
    *,
    write_tokenizer: Callable[[Path], None] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder, completely or not at all; an interrupted call resumes at the shard it had reached.

    Args:
        tensors: The tensors.
        out: The output folder. If it exists with the same provenance, nothing is done.
        template: The folder whose config and tokenizer files are copied.
        provenance: The inputs of the tensors, as JSON.
        shard_bytes: The maximal size of a file.
        progress: Called for each chunk, in bytes.
        write_tokenizer: Writes tokenizer and config files into a folder, if the vocabulary differs from the template's.
        config: Settings of `config.json` to change.

    Raises:
        DiskFullError: The disk has not enough room.
        OutcomeError: Something else is at `out`, or it cannot be written.
    """
    provenance = {**provenance, "shard_bytes": shard_bytes}
    if _is_written(out, provenance, tensors, shard_bytes, progress):
        return
    plan_checkpoint(tensors, out, shard_bytes)
    with resumable_folder(out, provenance) as work:
        if _is_written(out, provenance, tensors, shard_bytes, progress):  # another process has made it since
            return
        whole = work / "checkpoints" / "whole"
        whole.mkdir(parents=True, exist_ok=True)
        write_checkpoint(whole, tensors, shard_bytes, progress)
        copy_auxiliary_files(template, whole, COMPANIONS)
        if (whole / "config.json").is_file():
            settings = read_json(whole / "config.json")
            changed = without_quantisation(settings | dict(config or {}))
            if changed != settings:
                write_atomic(whole / "config.json", json.dumps(changed, indent=2) + "\n")
        if write_tokenizer:
            write_tokenizer(whole)
        write_record(whole, provenance)
        publish(whole, out)


def is_up_to_date(
    out: Path, provenance: Mapping[str, Any], renew: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> bool:
    """Return whether a folder is there already, made from the same; ask before the work.

    Args:
        out: The folder.
        provenance: What it would be made from, as JSON.
        renew: Returns a record of regraft 0.1 as it would be written today.

    Returns:
        Whether it is there.

    Raises:
        OutcomeError: Something else is there.
    """
    check_output_path(out)
    if not out.exists():
        return False
    try:
        record = read_json(out / RECORD)
        recorded = {key: record[key] for key in record if key != RESULTS}
        expected = json.loads(json.dumps(provenance))
        if recorded == expected or renew(recorded) == expected:
            return True
    except (CheckpointError, TypeError):
        pass  # nothing that regraft wrote as a whole
    raise OutcomeError(f"{out}: exists and was made from something else. Choose another --out or remove it.")


def write_record(folder: Path, provenance: Mapping[str, Any], results: Mapping[str, float] | None = None) -> None:
    """Write what a folder is made from into it, for `is_up_to_date`.

    Args:
        folder: The folder.
        provenance: What it is made from, as JSON.
        results: Figures to tell again where nothing is done.
    """
    content = {**provenance, RESULTS: dict(results)} if results else dict(provenance)
    write_atomic(folder / RECORD, json.dumps(content, sort_keys=True, indent=2) + "\n")


def read_results(folder: Path) -> dict[str, float]:
    """Read the figures that `write_record` wrote beside what a folder is made from.

    Args:
        folder: The folder, for which `is_up_to_date` is true.

    Returns:
        The figures.
    """
    results: dict[str, float] = json.loads((folder / RECORD).read_text(encoding="utf-8")).get(RESULTS, {})
    return results


def _is_written(
    out: Path, provenance: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], shard_bytes: int, progress: Progress
) -> bool:
    """Look for the result; its every number is compared, as fingerprints are of samples and disks lose data."""
    if not is_up_to_date(out, provenance):
        return False
    if not matches_checkpoint(out, tensors, shard_bytes, progress):
        raise OutcomeError(
            f"{out}: exists and holds other numbers than would be written now: what it was made from has changed, or "
            "it was damaged. Choose another --out or remove it."
        )
    return True


def copy_auxiliary_files(source: Path, into: Path, patterns: tuple[str, ...]) -> None:
    """Copy the small files that belong to a checkpoint.

    Args:
        source: The folder they are in.
        into: Where to.
        patterns: Which, as `*.json`; indexes of shards, code, and records of how a folder was made are left out.
    """
    for pattern in patterns:
        for file in source.glob(pattern):
            left_out = file.name.endswith((".index.json", ".py")) or file.name in NOT_COPIED
            if file.is_file() and not left_out:
                shutil.copyfile(file, into / file.name)


def _kept(out: Path) -> int:
    """Count the bytes that an interrupted run left and the next one goes on from."""
    return sum(file.stat().st_size for file in working_folder(out).rglob("*.safetensors"))


def _read(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    if not isinstance(tensors, DerivedTensors):
        return byte_size(tensors, name)
    return sum(_read(source, operand) for source, operand in tensors.specs[name].operands)


def _memory(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    """Estimate what computing takes: the operands, each also in float64, and the result, per core."""
    if not isinstance(tensors, DerivedTensors):
        return byte_size(tensors, name)
    entry = tensors.specs[name]
    if entry.elementwise:
        return CHUNK_ELEMENTS * 8 * (2 * len(entry.operands) + 2) * cores()
    return 3 * (byte_size(tensors, name) + sum(byte_size(source, operand) for source, operand in entry.operands))
