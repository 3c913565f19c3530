"""Named tensors made from others when they are asked for, whole or a piece at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.checkpoint.header import FLOATING, dtype_name, torch_dtype
from regraft.checkpoint.quantised import QuantisedTensor
from regraft.checkpoint.reader import Checkpoint
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 18


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is made.

    Args:
        dtype: Its safetensors dtype, as in `F32` or `BF16`.
        shape: Its size along each dimension.
        operands: What it is made from: a mapping, and a name in it.
        rule: Makes it from these, as tensors; by default it is a copy of the one there is.
        elementwise: Whether the rule gives the same on flat pieces of the operands as on the whole.
    """

    dtype: str
    shape: tuple[int, ...]
    operands: tuple[tuple[Mapping[str, torch.Tensor], str], ...]
    rule: Callable[..., torch.Tensor] = _same
    elementwise: bool = True


class DerivedTensors(Mapping[str, "torch.Tensor"]):
    """A read-only mapping whose tensors are computed; it holds none of them.

    Args:
        entries: How each is made, by name.
    """

    def __init__(self, entries: Mapping[str, TensorSpec]):
        self.specs = dict(entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.specs[name]
        if not entry.elementwise:
            result = entry.rule(*(tensors[operand] for tensors, operand in entry.operands))
            return _stored(result, name, entry).reshape(entry.shape)
        import torch

        whole = torch.empty(math.prod(entry.shape), dtype=torch_dtype(entry.dtype))
        for start in range(0, len(whole), CHUNK_ELEMENTS):
            whole[start : start + CHUNK_ELEMENTS] = flat_slice(
                self, name, start, min(CHUNK_ELEMENTS, len(whole) - start)
            )
        return whole.reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs


class GroupedTensors(DerivedTensors):
    """Derived tensors of which some are made several at a time.

    Args:
        entries: How each is made; of what is made in a group, only dtype, shape and operands count.
        groups: By name, the group it is made in; those that are made by themselves are not in it.
        make: Makes a group, by name.
    """

    RECENT = 4  # fused experts are two groups a layer, and at a layer's end two layers are being written

    def __init__(
        self,
        entries: Mapping[str, TensorSpec],
        groups: Mapping[str, tuple[str, ...]],
        make: Callable[[tuple[str, ...]], dict[str, torch.Tensor]],
    ):
        super().__init__(entries)
        self._groups, self._make = groups, make
        self._lock = threading.Lock()
        self._recent: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        group = self._groups.get(name)
        if group is None:
            return super().__getitem__(name)
        with self._lock:
            if group not in self._recent:
                while len(self._recent) >= self.RECENT:
                    del self._recent[next(iter(self._recent))]
                self._recent[group] = self._make(group)
            return self._recent[group][name].to(torch_dtype(self.specs[name].dtype))


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a tensor without reading it, where that is possible.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: A name in it.

    Returns:
        The shape.
    """
    if isinstance(tensors, Checkpoint):
        return tensors.tensors[name].shape
    return tensors.specs[name].shape if isinstance(tensors, DerivedTensors) else tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    """Return the safetensors dtype of a tensor without reading it, where that is possible.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: A name in it.

    Returns:
        The dtype, as in `F32` or `BF16`.
    """
    if isinstance(tensors, Checkpoint):
        return tensors.tensors[name].dtype
    return tensors.specs[name].dtype if isinstance(tensors, DerivedTensors) else dtype_name(tensors[name].dtype)


def output_dtype(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    """Return the dtype in which a result that takes the place of a tensor is written.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: A name in it.

    Returns:
        The tensor's own dtype; BF16 for a quantised one, which is computed in float32.
    """
    source, original = tensors, name
    while isinstance(source, DerivedTensors):
        entry = source.specs[original]
        if not entry.operands or (entry.elementwise and len(entry.operands) > 1):
            break  # arithmetic on several tensors, as a delta, has a dtype of its own; a conversion of names has not
        source, original = entry.operands[0]
    if isinstance(source, Checkpoint) and isinstance(source.tensors[original], QuantisedTensor):
        return "BF16"
    return dtype_of(tensors, name)


def flat_slice(tensors: Mapping[str, torch.Tensor], name: str, start: int, count: int) -> torch.Tensor:
    """Return some numbers of a tensor, laid out flat, reading and computing no more than these where that is possible.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: A name in it.
        start: The first number.
        count: How many.

    Returns:
        A tensor of shape [count].
    """
    if isinstance(tensors, Checkpoint):
        return tensors.flat_slice(name, start, count)
    if isinstance(tensors, DerivedTensors) and tensors.specs[name].elementwise:
        entry = tensors.specs[name]
        result = entry.rule(*(flat_slice(source, operand, start, count) for source, operand in entry.operands))
        return _stored(result, name, entry)
    return tensors[name].reshape(-1)[start : start + count]


def are_equal(first: Mapping[str, torch.Tensor], name: str, second: Mapping[str, torch.Tensor], other: str) -> bool:
    """Compare two tensors, a piece at a time.

    Args:
        first: A checkpoint, derived tensors or a state dict.
        name: A name in it.
        second: The same or another.
        other: A name in that.

    Returns:
        Whether they have the same dtype, shape and numbers.
    """
    import torch

    shape = shape_of(first, name)
    if shape != shape_of(second, other) or dtype_of(first, name) != dtype_of(second, other):
        return False
    size = math.prod(shape)
    return all(
        torch.equal(
            flat_slice(first, name, at, min(CHUNK_ELEMENTS, size - at)),
            flat_slice(second, other, at, min(CHUNK_ELEMENTS, size - at)),
        )
        for at in range(0, size, CHUNK_ELEMENTS)
    )


def _stored(result: torch.Tensor, name: str, entry: TensorSpec) -> torch.Tensor:
    """Round a result to the dtype it is stored in; what is copied may hold anything, as masks do."""
    result = result.to(torch_dtype(entry.dtype))
    is_computed = len(entry.operands) > 1 and entry.dtype in FLOATING and result.numel()
    if is_computed and not all(map(math.isfinite, result.aminmax())):
        raise CheckpointError(
            f"tensor {name!r} would be infinite or not a number in {entry.dtype}: an input is (regraft weights inspect "
            "--check-finite tells), or the result is too large for that dtype."
        )
    return result
