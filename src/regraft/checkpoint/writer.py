"""Writing tensors as safetensors on all cores, chunk by chunk where a tensor can be computed in slices."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from regraft.checkpoint.derived import CHUNK_ELEMENTS, DerivedTensors, dtype_of, flat_slice, shape_of
from regraft.checkpoint.file import replace_atomically, write_atomic
from regraft.checkpoint.header import ITEM_BYTES, LENGTH_BYTES, torch_dtype
from regraft.checkpoint.reader import INDEX, MODEL_FILE, Checkpoint, chunk_ranges
from regraft.errors import CheckpointError, DiskFullError
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

SHARD_BYTES = 5 * 10**9  # the default of transformers up to version 4
"""The default maximal size of a file of weights, in bytes."""
LARGEST_ITEM_BYTES = max(ITEM_BYTES.values())
"""The size of an element of the widest dtype, to which the data of a file is aligned."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def byte_size(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    """Return the number of bytes of a tensor on disk.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: The tensor's name in `tensors`.
    """
    return ITEM_BYTES[dtype_of(tensors, name)] * math.prod(shape_of(tensors, name))


def plan_shards(tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Divide tensors into files of at most a given size.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        shard_bytes: The maximal size of the tensors in a file, in bytes; a larger tensor is alone in its file.

    Returns:
        The names of the tensors by the file's name; a single file is `model.safetensors`.
    """
    shards: list[list[str]] = [[]]
    planned_bytes = 0
    for name in sorted(tensors):
        tensor_bytes = byte_size(tensors, name)
        if shards[-1] and planned_bytes + tensor_bytes > shard_bytes:
            shards.append([])
            planned_bytes = 0
        shards[-1].append(name)
        planned_bytes += tensor_bytes
    if len(shards) == 1:
        return {MODEL_FILE: shards[0]}
    return {f"model-{index:05d}-of-{len(shards):05d}.safetensors": names for index, names in enumerate(shards, 1)}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES, progress: Progress = silent
) -> None:
    """Write tensors into a folder as transformers does: one file, or shards and their index.

    A shard that an interrupted call has written is not written again if it has the same content.

    Args:
        folder: An existing folder, which may have shards of an interrupted call.
        tensors: A checkpoint, derived tensors or a state dict.
        shard_bytes: The maximal size of the tensors in a file, in bytes; a larger tensor is alone in its file.
        progress: Called for each chunk, in bytes.

    Raises:
        CheckpointError: A computed tensor has infinite or NaN values, or differs in size from its specification.
        DiskFullError: The disk has not enough free space.
        OutcomeError: A file cannot be written.
    """
    shards = plan_shards(tensors, shard_bytes)
    remaining = {file: names for file, names in shards.items() if not _matches(folder / file, tensors, names, progress)}
    total_bytes = sum(byte_size(tensors, name) for names in shards.values() for name in names)
    remaining_bytes = sum(byte_size(tensors, name) for names in remaining.values() for name in names)
    free_bytes = shutil.disk_usage(folder).free
    if remaining_bytes > free_bytes:
        raise DiskFullError(
            f"{folder}: {remaining_bytes:,} bytes have to be written, but the disk has {free_bytes:,} left. Free some "
            "space."
        )
    written_bytes = total_bytes - remaining_bytes
    for file, names in remaining.items():

        def report(
            stage: str, file_bytes: int, total: int, figures: Mapping[str, float], previous_bytes: int = written_bytes
        ) -> None:
            progress(stage, previous_bytes + file_bytes, total_bytes, figures)

        write_safetensors(folder / file, tensors, names, report)
        written_bytes += sum(byte_size(tensors, name) for name in names)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


def matches_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES, progress: Progress = silent
) -> bool:
    """Return whether a folder has the tensors that `write_checkpoint` would write, in the same files, byte by byte.

    Args:
        folder: The folder to compare.
        tensors: A checkpoint, derived tensors or a state dict.
        shard_bytes: The maximal size of the tensors in a file, in bytes; a larger tensor is alone in its file.
        progress: Called for each chunk, in bytes.
    """
    shards = plan_shards(tensors, shard_bytes)
    return all(_matches(folder / file, tensors, names, progress) for file, names in shards.items())


def write_safetensors(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> None:
    """Write a safetensors file.

    Args:
        file: The file to write, which never exists incomplete.
        tensors: A checkpoint, derived tensors or a state dict.
        names: The names of the tensors to write; None for all.
        progress: Called for each chunk, in bytes.

    Raises:
        CheckpointError: A computed tensor has infinite or NaN values, or differs in size from its specification.
        DiskFullError: The disk is full.
        OutcomeError: The file cannot be written.
    """
    item_bytes = {name: ITEM_BYTES[dtype_of(tensors, name)] for name in (tensors if names is None else names)}
    ordered_names = sorted(item_bytes, key=lambda name: (-item_bytes[name], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = {}
    position = 0
    for name in ordered_names:
        starts[name] = position
        position += byte_size(tensors, name)
        header[name] = {
            "dtype": dtype_of(tensors, name),
            "shape": list(shape_of(tensors, name)),
            "data_offsets": [starts[name], position],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % LARGEST_ITEM_BYTES)  # aligns the data, whose largest items come first
    data_start = LENGTH_BYTES + len(encoded)
    with replace_atomically(file, synced=False) as temporary, temporary.open("wb") as stream:
        stream.write(len(encoded).to_bytes(LENGTH_BYTES, "little"))
        stream.write(encoded)
        stream.flush()

        def write_chunk(name: str, start: int, data: torch.Tensor) -> None:
            view = data.numpy().data
            offset = data_start + starts[name] + start * item_bytes[name]
            while view:
                num_written = os.pwrite(stream.fileno(), view, offset)
                view = view[num_written:]
                offset += num_written

        _for_each_chunk(tensors, ordered_names, write_chunk, file, progress, "write")


def _for_each_chunk(
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str],
    process: Callable[[str, int, torch.Tensor], None],
    file: Path,
    progress: Progress,
    stage: str,
) -> None:
    """Compute the chunks of tensors on all cores, and call `process` with the name, start and bytes of each chunk."""
    import torch

    chunks = _chunks(tensors, names)
    lock = threading.Lock()
    processed_bytes = 0
    total_bytes = sum(byte_size(tensors, name) for name in names)

    def run_worker() -> None:
        nonlocal chunks
        try:
            process_chunks()
        except BaseException:
            chunks = iter(())  # the other threads stop after their current chunk
            raise

    def process_chunks() -> None:
        """Compute and process chunks until none remain."""
        nonlocal processed_bytes
        while True:
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            name, start, count = chunk
            data = flat_slice(tensors, name, start, count).to(torch_dtype(dtype_of(tensors, name))).contiguous()
            if len(data) != count:
                raise CheckpointError(f"{file}: tensor {name!r} has {len(data):,} elements, expected {count:,}.")
            data = data.cpu().view(torch.uint8)
            process(name, start, data)
            with lock:
                processed_bytes += len(data)
                progress(stage, processed_bytes, total_bytes, {})

    with _single_torch_thread(), ThreadPoolExecutor(cores()) as pool:
        for worker in [pool.submit(run_worker) for _ in range(cores())]:
            worker.result()


def _chunks(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield the name, the first element and the number of elements of each chunk."""
    for name in names:
        num_elements = math.prod(shape_of(tensors, name))
        is_divisible = not isinstance(tensors, DerivedTensors) or tensors.specs[name].elementwise
        chunk_length = CHUNK_ELEMENTS if is_divisible else max(num_elements, 1)
        for start, count in chunk_ranges(num_elements, chunk_length):
            yield name, start, count


@contextlib.contextmanager
def _single_torch_thread() -> Iterator[None]:
    """Make torch use one thread per chunk, because several chunks are computed at the same time."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class _DifferenceError(Exception):
    """The content of a file differs from what would be written."""


def _matches(file: Path, tensors: Mapping[str, torch.Tensor], names: Sequence[str], progress: Progress) -> bool:
    """Return whether a file has exactly these tensors; compare all bytes, because the data may be incomplete."""
    import torch

    if not file.is_file():
        return False
    try:
        stored = Checkpoint.open(file)
        stored_specs = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.tensors.items()}
        if stored_specs != {name: (dtype_of(tensors, name), shape_of(tensors, name)) for name in names}:
            return False

        def compare(name: str, start: int, data: torch.Tensor) -> None:
            count = len(data) // ITEM_BYTES[dtype_of(tensors, name)]
            if not stored.flat_slice(name, start, count).view(torch.uint8).equal(data):
                raise _DifferenceError

        _for_each_chunk(tensors, names, compare, file, progress, "compare")
    except (CheckpointError, _DifferenceError):
        return False
    return True
