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
from regraft.checkpoint.quantised import pair_with_scales
from regraft.checkpoint.quantised_tensor import QuantisedTensor, stored_parts
from regraft.errors import MAX_LISTED, CheckpointError

if TYPE_CHECKING:
    import torch

MODEL_FILE = "model.safetensors"
"""The file of a model's weights, if one file has them all."""
ADAPTER_FILE = "adapter_model.safetensors"
"""The file of a PEFT adapter's weights."""
INDEX = "model.safetensors.index.json"
"""The file that names the shard of each tensor, if several files have a model's weights."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Patterns of files that are not read, because loading a pickle can run code."""
TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""The beginnings of the names of pickles without weights, which a Trainer writes."""
UNSUPPORTED_FILES = (
    ("*.gguf", "a model of llama.cpp. Use the model that it was converted from"),
    ("*.h5", "a model of TensorFlow. Load it with transformers 4, from_tf=True, and call save_pretrained"),
    ("*.msgpack", "a model of Flax. Load it with transformers 4, from_flax=True, and call save_pretrained"),
    ("*.onnx", "a model exported to ONNX. Use the model that it was exported from"),
    ("onnx/*.onnx", "a model exported to ONNX. Use the model that it was exported from"),
    ("openvino_model.*", "a model exported to OpenVINO. Use the model that it was exported from"),
    ("*.safetensors", "not called model.safetensors. If it has all tensors, as transformers writes them, rename it"),
)
"""Patterns of weight files with other formats or names, each with a description and a remedy."""


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a safetensors file or folder by name, each of which is read on access.

    Args:
        path: The file or folder.
        tensors: The dtype, shape and position of each tensor, by name.
    """

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]):
        self.path = path
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | Path, *, as_stored: bool = False) -> Checkpoint:
        """Open a checkpoint, and check that its files are complete.

        Args:
            path: A safetensors file, a transformers or PEFT folder with one file or an index and shards, or a hub id
                with an optional `@revision`.
            as_stored: Whether a quantised checkpoint has its codes and scales as tensors, rather than its weights.

        Returns:
            The checkpoint, of which only headers and configs have been read.

        Raises:
            CheckpointError: There is no such checkpoint; a file or shard is missing, truncated, malformed or outside
                the folder; or the quantisation is unsupported.
        """
        path = find_path(path)
        tensors = _read_tensors(path)
        config_file = (path if path.is_dir() else path.parent) / "config.json"
        # The config beside an adapter may be the base's.
        is_adapter = all(tensor.file.name == ADAPTER_FILE for tensor in tensors.values())
        config = read_json(config_file) if config_file.is_file() and not is_adapter else {}
        return cls(path, tensors if as_stored else pair_with_scales(path, tensors, config))

    @property
    def folder(self) -> Path:
        """The folder that has the files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted by path."""
        return sorted({part.file for tensor in self.tensors.values() for part in stored_parts(tensor)})

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.tensors[name].shape
        return self.flat_slice(name, 0, math.prod(shape)).reshape(shape)

    def flat_slice(self, name: str, start: int, count: int) -> torch.Tensor:
        """Read a slice of a flattened tensor; threads may call this concurrently.

        Args:
            name: The tensor's name in this mapping.
            start: The index of the first element.
            count: The number of elements.

        Returns:
            [count], in newly allocated memory.

        Raises:
            CheckpointError: The file was truncated after it was opened.
        """
        tensor = self.tensors[name]
        if isinstance(tensor, QuantisedTensor):
            return tensor.dequantise(self._read, start, count)
        return self._read(tensor, start, count)

    def _read(self, tensor: StoredTensor, start: int, count: int) -> torch.Tensor:
        """Read a slice of a flattened tensor as it is stored."""
        import torch

        item_bytes = ITEM_BYTES[tensor.dtype]
        buffer = torch.empty(count * item_bytes, dtype=torch.uint8)
        view = buffer.numpy().data
        position = 0
        while position < len(view):
            offset = tensor.start + start * item_bytes + position
            num_read = os.preadv(self._descriptors[tensor.file], [view[position:]], offset)
            if not num_read:
                raise CheckpointError(
                    f"{tensor.file}: ends inside tensor {tensor.name!r}: it was changed while it was read. Copy it "
                    "again."
                )
            position += num_read
        return buffer.view(torch_dtype(tensor.dtype))

    @functools.cached_property
    def _descriptors(self) -> dict[Path, int]:
        descriptors = {}
        for file in self.files:
            descriptors[file] = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptors[file])
        return descriptors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors


def chunk_ranges(length: int, chunk_length: int) -> Iterator[tuple[int, int]]:
    """Divide a length into chunks.

    Args:
        length: The length to divide, 0 or more.
        chunk_length: The length of all chunks but the last, which may be shorter.

    Yields:
        The start and the length of each chunk.
    """
    for start in range(0, length, chunk_length):
        yield start, min(chunk_length, length - start)


def _read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the headers of a file, or of the weight files of a folder."""
    if path.is_file():
        return read_header(path)
    if (path / INDEX).is_file():
        if (path / MODEL_FILE).is_file():
            raise CheckpointError(
                f"{path}: has both {MODEL_FILE} and {INDEX}, two checkpoints of which transformers would read the "
                "first. Remove the wrong one."
            )
        return _read_sharded(path)
    for name in (MODEL_FILE, ADAPTER_FILE):
        if (path / name).is_file():
            return read_header(path / name)
    raise CheckpointError(f"{path}: has none of {MODEL_FILE}, {ADAPTER_FILE}, {INDEX}. {_describe_content(path)}")


def _describe_content(folder: Path) -> str:
    """Describe the content of a folder without a checkpoint, with a remedy."""
    patterns = ("*", "snapshots/*", "*/*")  # folders of a Trainer, of the hub's cache, of named adapters in those
    weight_patterns = [f"{pattern}/{name}" for pattern in patterns for name in (MODEL_FILE, ADAPTER_FILE, INDEX)]
    checkpoints = sorted({file.parent.relative_to(folder) for name in weight_patterns for file in folder.glob(name)})
    if checkpoints:
        alternatives = f" (or {', '.join(map(str, checkpoints[1:MAX_LISTED]))})" if checkpoints[1:] else ""
        return f"Its folder {checkpoints[0]}{alternatives} has one: use that."
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    pickles = [name for name in pickles if not name.startswith(TRAINING_STATE)]
    if pickles:
        library = "PEFT" if "adapter" in pickles[0] else "transformers"
        return (
            f"{pickles[0]} is a pickle, which can run code and is not read. If you trust it, load it with {library} "
            "and call save_pretrained."
        )
    for pattern, description in UNSUPPORTED_FILES:
        files = sorted(folder.glob(pattern))
        if files:
            return f"{files[0].relative_to(folder)} is {description}."
    return (
        "Use the folder that save_pretrained wrote. If this is a repository of the hub without safetensors, load it "
        "with transformers and call save_pretrained."
    )


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of the shards that the index names, and check that index and shards have the same tensors."""
    weight_map = _read_weight_map(folder / INDEX)
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if not _is_file(folder / shard):
            raise CheckpointError(f"{folder}: shard {shard:.200}, which {INDEX} names, is missing. Download it again.")
        shards[shard] = read_header(folder / shard)
    tensors = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{folder}: {INDEX} says that tensor {name!r:.200} is in {shard}, but it is not. Use files that "
                "were saved together."
            )
        tensors[name] = shards[shard][name]
    _check_unlisted(folder, shards, tensors)
    return tensors


def _read_weight_map(index_file: Path) -> dict[str, str]:
    """Return the name of the shard of each tensor, sorted by tensor."""
    try:
        weight_map = read_json(index_file)["weight_map"]
        shard_names = {name: shard for name, shard in sorted(weight_map.items()) if isinstance(shard, str)}
        if not shard_names or len(shard_names) != len(weight_map):
            raise ValueError("no tensors, or a file name that is not a string")
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index_file}: not a safetensors index with a weight_map ({error!r:.200}). Copy it again."
        ) from error
    if len(shard_names) > MAX_TENSORS:
        raise CheckpointError(f"{index_file}: names {len(shard_names):,} tensors; at most {MAX_TENSORS:,} are read.")
    for shard in shard_names.values():
        if "\0" in shard or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index_file}: names {shard!r:.200}, which is not a file in the same folder.")
    return shard_names


def _check_unlisted(
    folder: Path, shards: Mapping[str, Mapping[str, StoredTensor]], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse tensors and shards that the index does not name."""
    unlisted = [
        f"{name:.200} ({shard:.200})" for shard, names in shards.items() for name in names if name not in tensors
    ]
    if unlisted:
        listed = ", ".join(unlisted[:MAX_LISTED])
        raise CheckpointError(
            f"{folder}: {len(unlisted)} tensors are not in {INDEX}: {listed}. Use files that were saved together."
        )
    unlisted_shards = sorted(file.name for file in folder.glob("model-*-of-*.safetensors") if file.name not in shards)
    if unlisted_shards:
        listed = ", ".join(unlisted_shards[:MAX_LISTED])
        raise CheckpointError(
            f"{folder}: {INDEX} does not name {listed}: shards of two checkpoints are mixed. Remove those that do not "
            "belong to it."
        )


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # the file system does not allow the name
        return False
