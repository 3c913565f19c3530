"""Writing tensors as safetensors, in chunks on all cores, with a few megabytes in memory."""

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
from regraft.checkpoint.header import ITEM_BYTES, torch_dtype
from regraft.checkpoint.reader import INDEX, Checkpoint, chunk_ranges
from regraft.errors import CheckpointError, DiskFullError
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

SHARD_BYTES = 5 * 10**9  # the default of transformers up to version 4


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def byte_size(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    """Return the number of bytes of a tensor on disk.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: The tensor's name.
    """
    return ITEM_BYTES[dtype_of(tensors, name)] * math.prod(shape_of(tensors, name))


def plan_shards(tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Divide tensors into files of at most a given size, unless a single tensor is larger.

    Args:
        tensors: The tensors to write.
        shard_bytes: The maximal size of a file.

    Returns:
        The tensors' names by the name of their file, which is `model.safetensors` if one file is enough.
    """
    shards: list[list[str]] = [[]]
    shard_size = 0
    for name in sorted(tensors):
        size = byte_size(tensors, name)
        if shards[-1] and shard_size + size > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(name)
        shard_size += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES, progress: Progress = silent
) -> None:
    """Write tensors into a folder as transformers does: one file, or shards and their index.

    A shard that an interrupted call has written is not written again if it has the same content.

    Args:
        folder: An existing folder.
        tensors: A checkpoint, derived tensors or a state dict.
        shard_bytes: The maximal size of a file.
        progress: Called for each chunk, in bytes.

    Raises:
        DiskFullError: The disk has not enough space.
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
            stage: str, written_here: int, _: int, figures: Mapping[str, float], written_before: int = written_bytes
        ) -> None:
            progress(stage, written_before + written_here, total_bytes, figures)

        write_safetensors(folder / file, tensors, names, report)
        written_bytes += sum(byte_size(tensors, name) for name in names)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


def matches_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES, progress: Progress = silent
) -> bool:
    """Return whether a folder already has what `write_checkpoint` would write, byte by byte.

    Args:
        folder: The folder.
        tensors: A checkpoint, derived tensors or a state dict.
        shard_bytes: The maximal size of a file.
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
        file: The file, which never exists incomplete.
        tensors: A checkpoint, derived tensors or a state dict.
        names: The names of the tensors to write; None for all.
        progress: Called for each chunk, in bytes.

    Raises:
        CheckpointError: A derived tensor has another size than its specification.
        DiskFullError: The disk is full.
        OutcomeError: The file cannot be written.
    """
    order = sorted(tensors if names is None else names, key=lambda name: (-ITEM_BYTES[dtype_of(tensors, name)], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = {}
    position = 0
    for name in order:
        starts[name], end = position, position + byte_size(tensors, name)
        shape = list(shape_of(tensors, name))
        header[name] = {"dtype": dtype_of(tensors, name), "shape": shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data_start = 8 + len(encoded)
    with replace_atomically(file, synced=False) as temporary, temporary.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        stream.flush()

        def write_chunk(name: str, start: int, data: torch.Tensor) -> None:
            view = data.numpy().data
            offset = data_start + starts[name] + start * ITEM_BYTES[dtype_of(tensors, name)]
            while view:
                num_written = os.pwrite(stream.fileno(), view, offset)
                view = view[num_written:]
                offset = offset + num_written

        _for_each_chunk(tensors, order, write_chunk, file, progress, "write")


def _for_each_chunk(
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str],
    use: Callable[[str, int, torch.Tensor], None],
    file: Path,
    progress: Progress,
    stage: str,
) -> None:
    """Compute the chunks of tensors on all cores, and call a function with the bytes of each."""
    import torch

    chunks = _chunks(tensors, names)
    lock = threading.Lock()
    num_written = 0
    total = sum(byte_size(tensors, name) for name in names)

    def work() -> None:
        nonlocal chunks
        try:
            process_chunks()
        except BaseException:
            chunks = iter(())  # the other threads stop after their current chunk
            raise

    def process_chunks() -> None:
        nonlocal num_written
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
            use(name, start, data)
            with lock:
                num_written += len(data)
                progress(stage, num_written, total, {})

    with _single_torch_thread(), ThreadPoolExecutor(cores()) as pool:
        for worker in [pool.submit(work) for _ in range(cores())]:
            worker.result()


def _chunks(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    for name in names:
        size = math.prod(shape_of(tensors, name))
        is_divisible = not isinstance(tensors, DerivedTensors) or tensors.specs[name].elementwise
        chunk_size = CHUNK_ELEMENTS if is_divisible else max(size, 1)
        yield from ((name, start, count) for start, count in chunk_ranges(size, chunk_size))


@contextlib.contextmanager
def _single_torch_thread() -> Iterator[None]:
    """Make torch use one thread for each chunk, because the chunks are already divided among threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _DifferenceError(Exception):
    """The content of a file differs from what would be written."""


def _matches(file: Path, tensors: Mapping[str, torch.Tensor], names: Sequence[str], progress: Progress) -> bool:
    """Return whether a file has exactly these tensors; all bytes are compared, because a header may lack its data."""
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
