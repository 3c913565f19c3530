"""Writing a checkpoint folder: tensors, and copies of the config and tokenizer files that belong to them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.derived import CHUNK_ELEMENTS, DerivedTensors
from regraft.checkpoint.file import equals_json, write_atomic
from regraft.checkpoint.folder import CHECKPOINTS, check_output_path, publish, resumable_folder, working_folder
from regraft.checkpoint.header import ITEM_BYTES
from regraft.checkpoint.hub import AUXILIARY_FILES
from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.quantised import without_quantisation
from regraft.checkpoint.writer import SHARD_BYTES, byte_size, cores, matches_checkpoint, plan_shards, write_checkpoint
from regraft.errors import CheckpointError, DiskFullError, OutcomeError
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.jinja",
    "*.tiktoken",
)
"""Patterns of the files of a tokenizer."""
RECORD = "regraft.json"
"""The file with the provenance of a folder, and with its results."""
RESULTS = "results"
"""The key of the results in the record; all other keys are the provenance."""
NOT_COPIED = (RECORD, "lineage.json", "pretraining.json", "outcome.json", "adapter_config.json")
"""The records of how a folder was made, which are wrong for a copy, and the config of an adapter."""


@dataclass(frozen=True)
class WritePlan:
    """The resources that writing a checkpoint needs.

    Args:
        num_tensors: The number of tensors.
        num_files: The number of safetensors files that they are written to.
        disk_bytes: The bytes of the tensors to write.
        read_bytes: The bytes of the stored tensors to read.
        memory_bytes: An estimate of the memory for tensors, in addition to Python and torch.
        free_bytes: The free space on the output's disk.
    """

    num_tensors: int
    num_files: int
    disk_bytes: int
    read_bytes: int
    memory_bytes: int
    free_bytes: int


def plan_checkpoint(tensors: Mapping[str, torch.Tensor], out: Path, shard_bytes: int = SHARD_BYTES) -> WritePlan:
    """Compute the resources that writing a checkpoint needs, and check the disk's free space.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        out: The output folder, which need not exist.
        shard_bytes: The maximal size of the tensors in a file, in bytes; a larger tensor is alone in its file.

    Raises:
        DiskFullError: The disk has not enough free space.
        OutcomeError: The output folder cannot be created.
    """
    check_output_path(out)
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    disk_bytes = sum(byte_size(tensors, name) for name in tensors)
    free_bytes = shutil.disk_usage(parent).free
    plan = WritePlan(
        num_tensors=len(tensors),
        num_files=len(plan_shards(tensors, shard_bytes)),
        disk_bytes=disk_bytes,
        read_bytes=sum(_read_bytes(tensors, name) for name in tensors),
        memory_bytes=max((_memory_bytes(tensors, name) for name in tensors), default=0),
        free_bytes=free_bytes,
    )
    if disk_bytes > free_bytes + _resumable_bytes(out):
        raise DiskFullError(
            f"{out}: {disk_bytes:,} bytes have to be written, but the disk has {free_bytes:,} left. Free some space."
        )
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
    changed_settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder, completely or not at all; an interrupted call resumes at the shard it had reached.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        out: The output folder. If it exists with the same provenance and content, nothing is done.
        template: The folder whose config and tokenizer files are copied.
        provenance: The inputs that the tensors were computed from; anything JSON can represent.
        shard_bytes: The maximal size of the tensors in a file, in bytes; a larger tensor is alone in its file.
        progress: Called for each chunk, in bytes.
        write_tokenizer: Writes tokenizer and config files into a folder, if the vocabulary differs from the template's.
        changed_settings: The settings of `config.json` to change, by name.

    Raises:
        CheckpointError: A computed tensor has infinite or NaN values, or differs in size from its specification.
        DiskFullError: The disk has not enough free space.
        OutcomeError: The output folder exists with a different provenance or content, cannot be written, or is being
            written by another process.
    """
    provenance = {**provenance, "shard_bytes": shard_bytes}
    if _is_written(out, provenance, tensors, shard_bytes, progress):
        return
    plan_checkpoint(tensors, out, shard_bytes)
    with resumable_folder(out, provenance) as work_folder:
        if _is_written(out, provenance, tensors, shard_bytes, progress):  # another process wrote it in the meantime
            return
        folder = work_folder / CHECKPOINTS / "whole"
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, tensors, shard_bytes, progress)
        copy_auxiliary_files(template, folder, AUXILIARY_FILES)
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            new_config = without_quantisation(config | dict(changed_settings or {}))
            if new_config != config:
                write_atomic(folder / "config.json", json.dumps(new_config, indent=2) + "\n")
        if write_tokenizer:
            write_tokenizer(folder)
        write_record(folder, provenance)
        publish(folder, out)


def is_up_to_date(
    out: Path, provenance: Mapping[str, Any], renew: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> bool:
    """Return whether a folder exists with a provenance; raise an error if it exists without it.

    Args:
        out: The output folder, which may exist.
        provenance: The inputs that it would be written from; anything JSON can represent.
        renew: Converts a record of regraft 0.1 to the current form.

    Raises:
        OutcomeError: The folder exists with a different provenance or none, or its path cannot be a folder.
    """
    check_output_path(out)
    if not out.exists():
        return False
    try:
        record = read_json(out / RECORD)
        recorded = {key: record[key] for key in record if key != RESULTS}
        if equals_json(recorded, provenance) or equals_json(renew(recorded), provenance):
            return True
    except (CheckpointError, TypeError):
        pass  # not a complete folder of regraft
    raise OutcomeError(f"{out}: exists, but was not made from the same inputs. Choose another --out or remove it.")


def write_record(folder: Path, provenance: Mapping[str, Any], results: Mapping[str, float] | None = None) -> None:
    """Write a folder's provenance into it, for `is_up_to_date`.

    Args:
        folder: An existing folder.
        provenance: The inputs that the folder was written from; anything JSON can represent.
        results: Numbers to print again when the folder is reused.
    """
    content = {**provenance, RESULTS: dict(results)} if results else dict(provenance)
    write_atomic(folder / RECORD, json.dumps(content, sort_keys=True, indent=2) + "\n")


def read_results(folder: Path) -> dict[str, float]:
    """Read the results that `write_record` wrote.

    Args:
        folder: A folder for which `is_up_to_date` is true.
    """
    results: dict[str, float] = json.loads((folder / RECORD).read_text(encoding="utf-8")).get(RESULTS, {})
    return results


def copy_auxiliary_files(source: Path, destination: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of a checkpoint that match patterns, except shard indexes, code, adapter configs and records.

    Args:
        source: The checkpoint's folder, of transformers or PEFT.
        destination: The folder to copy to, which must exist.
        patterns: Patterns of file names, such as `*.json`.
    """
    for pattern in patterns:
        for file in source.glob(pattern):
            is_excluded = file.name.endswith((".index.json", ".py")) or file.name in NOT_COPIED
            if file.is_file() and not is_excluded:
                shutil.copyfile(file, destination / file.name)


def _is_written(
    out: Path, provenance: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], shard_bytes: int, progress: Progress
) -> bool:
    """Return whether the folder exists; raise an error if its provenance or its content differs.

    All bytes are compared, because the fingerprints in a provenance are of samples.
    """
    if not is_up_to_date(out, provenance):
        return False
    if not matches_checkpoint(out, tensors, shard_bytes, progress):
        raise OutcomeError(
            f"{out}: exists, but its content differs from what would be written: its inputs have changed, or it was "
            "damaged. Choose another --out or remove it."
        )
    return True


def _resumable_bytes(out: Path) -> int:
    """Return the number of bytes that an interrupted run has written, from which this one resumes."""
    return sum(file.stat().st_size for file in working_folder(out).rglob("*.safetensors"))


def _read_bytes(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    """Return the number of bytes of the stored tensors that a tensor is computed from."""
    if not isinstance(tensors, DerivedTensors):
        return byte_size(tensors, name)
    return sum(_read_bytes(source, operand) for source, operand in tensors.specs[name].operands)


def _memory_bytes(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    """Estimate the memory of a computation: the operands and the result, also in float64."""
    if not isinstance(tensors, DerivedTensors):
        return byte_size(tensors, name)
    spec = tensors.specs[name]
    if spec.elementwise:  # each core computes a chunk
        return CHUNK_ELEMENTS * ITEM_BYTES["F64"] * 2 * (len(spec.operands) + 1) * cores()
    stored_bytes = byte_size(tensors, name) + sum(byte_size(source, operand) for source, operand in spec.operands)
    return 3 * stored_bytes  # float32 weights take twice their bytes in float64
