"""A checkpoint on disk as a lazy, read-only mapping from names to tensors."""

from __future__ import annotations

import functools
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.checkpoint.header import ITEM_BYTES, MAX_TENSORS, StoredTensor, read_header, torch_dtype
from regraft.checkpoint.hub import find_path
from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.quantised import QuantisedTensor, dequantised, parts
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    import torch

NAMES = ("model.safetensors", "adapter_model.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OF_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # pickles that hold no weights
# what else weights are stored as, which is not read
OTHER_FORMATS = (
    ("*.gguf", "of llama.cpp. Give the model that it was made from"),
    ("*.h5", "of TensorFlow. Load it with transformers 4, from_tf=True, and call save_pretrained"),
    ("*.msgpack", "of Flax. Load it with transformers 4, from_flax=True, and call save_pretrained"),
    ("*.onnx", "exported to ONNX. Give the model that it was made from"),
    ("onnx/*.onnx", "exported to ONNX. Give the model that it was made from"),
    ("openvino_model.*", "exported to OpenVINO. Give the model that it was made from"),
    (
        "*.safetensors",
        "none of these. If it holds all, as transformers writes it, rename it to model.safetensors",
    ),
)
INDEX = "model.safetensors.index.json"


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """Named tensors of a safetensors file or folder; shapes are known at once, data is read when asked for.

    Args:
        path: Where it was opened.
        tensors: What it holds, by name.
    """

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]):
        self.path = path
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | Path, *, as_stored: bool = False) -> Checkpoint:
        """Open a checkpoint and check that every byte it promises is there.

        Args:
            path: A safetensors file, a transformers or PEFT folder that holds one file or an index with shards, or a
                hub id with an optional `@revision`.
            as_stored: Whether codes and scales of a quantised checkpoint are presented, rather than its weights.

        Returns:
            The checkpoint; no tensor data has been read.

        Raises:
            CheckpointError: A file or shard is missing, truncated, malformed, or outside the folder; or the checkpoint
                is quantised in a way that is not read.
        """
        path = find_path(path)
        tensors = _read_tensors(path)
        config = (path if path.is_dir() else path.parent) / "config.json"
        is_adapter = all(info.file.name == NAMES[1] for info in tensors.values())  # its base's config may lie beside it
        settings = read_json(config) if config.is_file() and not is_adapter else {}
        return cls(path, tensors if as_stored else dequantised(path, tensors, settings))

    @property
    def folder(self) -> Path:
        """The folder that it is in."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def files(self) -> list[Path]:
        """The safetensors files that are read, sorted."""
        return sorted({part.file for info in self.tensors.values() for part in parts(info)})

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        return self.flat_slice(name, 0, math.prod(info.shape)).reshape(info.shape)

    def flat_slice(self, name: str, start: int, count: int) -> torch.Tensor:
        """Read some numbers of a tensor, laid out flat; safe to call from several threads.

        Args:
            name: The tensor's name.
            start: The first number.
            count: How many.

        Returns:
            A tensor of shape [count] that shares memory with nothing.

        Raises:
            CheckpointError: The file ends early: it was changed since it was opened.
        """
        info = self.tensors[name]
        if isinstance(info, QuantisedTensor):
            return info.numbers(self._read, start, count)
        return self._read(info, start, count)

    def _read(self, info: StoredTensor, start: int, count: int) -> torch.Tensor:
        import torch

        size = ITEM_BYTES[info.dtype]
        buffer = torch.empty(count * size, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        while done < len(view):
            read = os.preadv(self._descriptors[info.file], [view[done:]], info.start + start * size + done)
            if not read:
                raise CheckpointError(
                    f"{info.file}: ends inside tensor {info.name!r}: it was changed while it was read."
                )
            done += read
        return buffer.view(torch_dtype(info.dtype))

    @functools.cached_property
    def _descriptors(self) -> dict[Path, int]:
        found = {}
        for file in self.files:
            found[file] = descriptor = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors


def _read_tensors(path: Path) -> dict[str, StoredTensor]:
    if path.is_file():
        return read_header(path)
    if (path / INDEX).is_file():
        if (path / NAMES[0]).is_file():
            raise CheckpointError(
                f"{path}: holds {NAMES[0]} and {INDEX}, two checkpoints of which transformers would read the "
                "first. Remove what does not belong here."
            )
        return _read_sharded(path)
    for name in NAMES:
        if (path / name).is_file():
            return read_header(path / name)
    raise CheckpointError(f"{path}: holds none of {', '.join((*NAMES, INDEX))}. {_hint(path)}")


def _hint(folder: Path) -> str:
    """Say what a folder without a checkpoint holds, and what to do."""
    patterns = ("*", "snapshots/*", "*/*")  # those of a Trainer, of the hub's cache, of named adapters inside those
    below = [
        file.parent for pattern in patterns for name in (*NAMES, INDEX) for file in folder.glob(f"{pattern}/{name}")
    ]
    if folders := list(dict.fromkeys(str(inner.relative_to(folder)) for inner in sorted(below))):
        more = f" (or {', '.join(folders[1:4])})" if folders[1:] else ""
        return f"Its folder {folders[0]}{more} does: give that."
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles := [name for name in pickles if not name.startswith(OF_TRAINING)]:
        library = "PEFT" if "adapter" in pickles[0] else "transformers"
        return (
            f"{pickles[0]} is a pickle, which can run code and is not read: if you trust it, load it with {library} "
            "and call save_pretrained."
        )
    for pattern, what in OTHER_FORMATS:
        if files := sorted(folder.glob(pattern)):
            return f"{files[0].relative_to(folder)} is {what}."
    return (
        "Give the folder that save_pretrained wrote. If this is a repository of the hub whose weights are not in "
        "safetensors, load it with transformers and call save_pretrained."
    )


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    index_file = folder / INDEX
    try:
        weight_map = read_json(index_file)["weight_map"]
        items = sorted((name, shard) for name, shard in weight_map.items() if isinstance(shard, str))
        if not items or len(items) != len(weight_map):
            raise ValueError("no tensors, or files that are not names")
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_file}: not a safetensors index with a weight_map ({error!r:.200}).") from error
    if len(items) > MAX_TENSORS:
        raise CheckpointError(f"{index_file}: names {len(items):,} tensors; {MAX_TENSORS:,} are read of a checkpoint.")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted({shard for _, shard in items}):
        if "\0" in shard or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index_file}: names {shard!r:.200}, not a file of its own folder: refused.")
        if not _is_file(folder / shard):
            raise CheckpointError(f"{folder}: shard {shard:.200} named by {INDEX} is missing. Fetch it again.")
        shards[shard] = read_header(folder / shard)
    tensors = {}
    for name, shard in items:
        if name not in shards[shard]:
            raise CheckpointError(f"{folder}: {INDEX} says tensor {name!r:.200} is in {shard}, and it is not there.")
        tensors[name] = shards[shard][name]
    unlisted = [
        f"{name:.200} ({shard:.200})" for shard, found in shards.items() for name in found if name not in tensors
    ]
    if unlisted:
        raise CheckpointError(f"{folder}: {len(unlisted)} tensors are not in {INDEX}: {', '.join(unlisted[:5])}.")
    strangers = sorted(file.name for file in folder.glob("model-*-of-*.safetensors") if file.name not in shards)
    if strangers:
        raise CheckpointError(
            f"{folder}: {INDEX} does not name {', '.join(strangers[:4])}: shards of two checkpoints are mixed. Remove "
            "those that do not belong here."
        )
    return tensors


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
