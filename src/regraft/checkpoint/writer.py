"""Writes named tensors as safetensors, piece by piece on every core: what is in memory is a few megabytes."""

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
from regraft.checkpoint.reader import INDEX, Checkpoint
from regraft.errors import CheckpointError, DiskFullError
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

SHARD_BYTES = 5 * 10**9


def cores() -> int:
    """Return how many cores this process may use.

    Returns:
        Their number.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def byte_size(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    """Return the bytes a tensor takes on disk.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: A name in it.

    Returns:
        The bytes.
    """
    return ITEM_BYTES[dtype_of(tensors, name)] * math.prod(shape_of(tensors, name))


def plan_shards(tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Divide tensors into files no larger than a given size, but for a tensor that is larger by itself.

    Args:
        tensors: What is to be written.
        shard_bytes: The size.

    Returns:
        The names in each file, by the file's name: `model.safetensors` if one is enough.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        size = byte_size(tensors, name)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES, progress: Progress = silent
) -> None:
    """Write tensors into a folder as transformers does: one file, or shards and their index.

    A shard that an interrupted call left is not written again if it holds the same numbers.

    Args:
        folder: Where to; it exists.
        tensors: A checkpoint, derived tensors or a state dict.
        shard_bytes: The largest size of a file.
        progress: Told of each piece, in bytes.

    Raises:
        DiskFullError: The disk has not enough room.
        OutcomeError: A file cannot be written.
    """
    shards = plan_shards(tensors, shard_bytes)
    todo = {file: names for file, names in shards.items() if not _holds(folder / file, tensors, names, progress)}
    total = sum(byte_size(tensors, name) for names in shards.values() for name in names)
    missing = sum(byte_size(tensors, name) for names in todo.values() for name in names)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DiskFullError(f"{folder}: {missing:,} bytes are to be written, the disk has {free:,} left: make room.")
    done = total - missing
    for file, names in todo.items():
        before = done

        def report(stage: str, part: int, _: int, figures: Mapping[str, float], before: int = before) -> None:
            progress(stage, before + part, total, figures)

        write_safetensors(folder / file, tensors, names, report)
        done += sum(byte_size(tensors, name) for name in names)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


def matches_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES, progress: Progress = silent
) -> bool:
    """Compare a folder with what `write_checkpoint` would write into it, every number.

    Args:
        folder: A folder that was written before.
        tensors: A checkpoint, derived tensors or a state dict.
        shard_bytes: The largest size of a file.
        progress: Told of each piece, in bytes.

    Returns:
        Whether it would be the same.
    """
    shards = plan_shards(tensors, shard_bytes)
    return all(_holds(folder / file, tensors, names, progress) for file, names in shards.items())


def write_safetensors(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> None:
    """Write one safetensors file.

    Args:
        file: Where to; seen whole or not at all.
        tensors: A checkpoint, derived tensors or a state dict.
        names: Which of them; None for all.
        progress: Told of each piece, in bytes.

    Raises:
        CheckpointError: A derived tensor has another size than announced.
        DiskFullError: The disk is full.
        OutcomeError: The file cannot be written.
    """
    order = sorted(tensors if names is None else names, key=lambda n: (-ITEM_BYTES[dtype_of(tensors, n)], n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for name in order:
        starts[name], end = position, position + byte_size(tensors, name)
        shape = list(shape_of(tensors, name))
        header[name] = {"dtype": dtype_of(tensors, name), "shape": shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    first = 8 + len(encoded)
    with replace_atomically(file, synced=False) as beside, beside.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        stream.flush()

        def put(name: str, start: int, data: torch.Tensor) -> None:
            view, offset = data.numpy().data, first + starts[name] + start * ITEM_BYTES[dtype_of(tensors, name)]
            while view:
                written = os.pwrite(stream.fileno(), view, offset)
                view, offset = view[written:], offset + written

        _for_each_piece(tensors, order, put, file, progress, "write")


def _for_each_piece(
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str],
    use: Callable[[str, int, torch.Tensor], None],
    file: Path,
    progress: Progress,
    stage: str,
) -> None:
    """Let each core compute a piece and use its bytes until none is left."""
    import torch

    todo, lock, done = _pieces(tensors, names), threading.Lock(), 0
    total = sum(byte_size(tensors, name) for name in names)

    def work() -> None:
        nonlocal todo
        try:
            compute()
        except BaseException:
            todo = iter(())  # the others end with the piece they are at
            raise

    def compute() -> None:
        nonlocal done
        while True:
            with lock:
                task = next(todo, None)
            if task is None:
                return
            name, start, count = task
            data = flat_slice(tensors, name, start, count).to(torch_dtype(dtype_of(tensors, name))).contiguous()
            if len(data) != count:
                raise CheckpointError(f"{file}: tensor {name!r} has {len(data):,} numbers, expected {count:,}.")
            data = data.cpu().view(torch.uint8)
            use(name, start, data)
            with lock:
                done += len(data)
                progress(stage, done, total, {})

    with _one_thread_each(), ThreadPoolExecutor(cores()) as pool:
        for worker in [pool.submit(work) for _ in range(cores())]:
            worker.result()


def _pieces(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    for name in names:
        count = math.prod(shape_of(tensors, name))
        whole = isinstance(tensors, DerivedTensors) and not tensors.specs[name].elementwise
        size = count if whole else CHUNK_ELEMENTS
        yield from ((name, start, min(size, count - start)) for start in range(0, count, max(size, 1)))


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch from dividing each piece among threads of its own: the pieces are already divided."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _DiffersError(Exception):
    """A file holds another number than it would be written with."""


def _holds(file: Path, tensors: Mapping[str, torch.Tensor], names: Sequence[str], progress: Progress) -> bool:
    """Whether a file holds these tensors, to the last byte: a header alone says nothing of the data behind it."""
    import torch

    if not file.is_file():
        return False
    try:
        stored = Checkpoint.open(file)
        same = {n: (i.dtype, i.shape) for n, i in stored.tensors.items()} == {
            n: (dtype_of(tensors, n), shape_of(tensors, n)) for n in names
        }

        def compare(name: str, start: int, data: torch.Tensor) -> None:
            count = len(data) // ITEM_BYTES[dtype_of(tensors, name)]
            if not stored.flat_slice(name, start, count).view(torch.uint8).equal(data):
                raise _DiffersError

        if same:
            _for_each_piece(tensors, names, compare, file, progress, "compare")
    except (CheckpointError, _DiffersError):
        return False
    return same
