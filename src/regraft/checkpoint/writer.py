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

from regraft.checkpoint.derived import PIECE, Derived, dtype_of, piece, shape_of
from regraft.checkpoint.header import ITEM_BYTES, read_header, torch_dtype
from regraft.checkpoint.reader import INDEX
from regraft.errors import CheckpointError
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

SHARD_BYTES = 5 * 10**9


def cores() -> int:
    """Tell how many cores this process may use.

    Returns:
        Their number.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def size_of(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    """Give the bytes a tensor takes on disk.

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
        size = size_of(tensors, name)
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

    A shard that is there already, left by an interrupted call with the same tensors, is not written again.

    Args:
        folder: Where to; it exists.
        tensors: A checkpoint, derived tensors or a state dict.
        shard_bytes: The largest size of a file.
        progress: Told of each piece, in bytes.

    Raises:
        CheckpointError: The disk has not enough room, or cannot be written.
    """
    shards = plan_shards(tensors, shard_bytes)
    todo = {file: names for file, names in shards.items() if not _is_there(folder / file, tensors, names)}
    total = sum(size_of(tensors, name) for names in shards.values() for name in names)
    missing = sum(size_of(tensors, name) for names in todo.values() for name in names)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise CheckpointError(f"{folder}: {missing:,} bytes are to be written, the disk has {free:,} left: make room.")
    done = total - missing
    for file, names in todo.items():
        before = done

        def report(stage: str, part: int, _: int, figures: Mapping[str, float], before: int = before) -> None:
            progress(stage, before + part, total, figures)

        write_safetensors(folder / file, tensors, names, report)
        done += sum(size_of(tensors, name) for name in names)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
        CheckpointError: A derived tensor has another size than announced, or the disk cannot be written.
    """
    order = sorted(tensors if names is None else names, key=lambda n: (-ITEM_BYTES[dtype_of(tensors, n)], n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for name in order:
        starts[name], end = position, position + size_of(tensors, name)
        shape = list(shape_of(tensors, name))
        header[name] = {"dtype": dtype_of(tensors, name), "shape": shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    beside = file.with_name(f".{file.name}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little"))
            stream.write(encoded)
            stream.flush()
            first = 8 + len(encoded)
            _write_pieces(stream.fileno(), first, tensors, starts, file, position, progress)
        os.replace(beside, file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written ({error.strerror or error}).") from error
    finally:
        beside.unlink(missing_ok=True)


def _write_pieces(
    descriptor: int,
    first: int,
    tensors: Mapping[str, torch.Tensor],
    starts: Mapping[str, int],
    file: Path,
    total: int,
    progress: Progress,
) -> None:
    """Let each core compute a piece and put it into its place until none is left."""
    import torch

    todo, lock, done = _pieces(tensors, starts), threading.Lock(), 0

    def work() -> None:
        nonlocal todo
        try:
            put()
        except BaseException:
            todo = iter(())  # the others end with the piece they are at
            raise

    def put() -> None:
        nonlocal done
        while True:
            with lock:
                task = next(todo, None)
            if task is None:
                return
            name, start, count = task
            data = piece(tensors, name, start, count).to(torch_dtype(dtype_of(tensors, name))).contiguous()
            if len(data) != count:
                raise CheckpointError(f"{file}: tensor {name!r} has {len(data):,} numbers, expected {count:,}.")
            view = data.cpu().view(torch.uint8).numpy().data
            place, size = first + starts[name] + start * data.element_size(), len(view)
            while view:
                written = os.pwrite(descriptor, view, place)
                view, place = view[written:], place + written
            with lock:
                done += size
                progress("write", done, total, {})

    with _one_thread_each(), ThreadPoolExecutor(cores()) as pool:
        for worker in [pool.submit(work) for _ in range(cores())]:
            worker.result()


def _pieces(tensors: Mapping[str, torch.Tensor], starts: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    for name in starts:
        count = math.prod(shape_of(tensors, name))
        whole = isinstance(tensors, Derived) and not tensors.entries[name].elementwise
        size = count if whole else PIECE
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


def _is_there(file: Path, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> bool:
    if not file.is_file():
        return False
    try:
        found = read_header(file)
    except CheckpointError:
        return False
    return {n: (i.dtype, i.shape) for n, i in found.items()} == {
        n: (dtype_of(tensors, n), shape_of(tensors, n)) for n in names
    }
