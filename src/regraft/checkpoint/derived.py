"""Tensors computed from other tensors on demand, completely or one flat slice at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.checkpoint.header import FLOATING, dtype_name, torch_dtype
from regraft.checkpoint.quantised_tensor import QuantisedTensor
from regraft.checkpoint.reader import Checkpoint, chunk_ranges
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

CHUNK_ELEMENTS = 1 << 18  # 2 MiB in float64, so that the operands of a rule stay in a core's cache
"""The number of elements that are computed at once, if a tensor can be computed in slices."""


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is computed.

    Args:
        dtype: The safetensors dtype of the result, such as `F32` or `BF16`.
        shape: The shape of the result.
        operands: The tensors that the rule is applied to, each as a mapping and a name in that mapping.
        rule: Computes the result from the operands; by default, the result is the only operand.
        elementwise: Whether the rule can be applied to flat slices of the operands.
    """

    dtype: str
    shape: tuple[int, ...]
    operands: tuple[tuple[Mapping[str, torch.Tensor], str], ...]
    rule: Callable[..., torch.Tensor] = _identity
    elementwise: bool = True


class DerivedTensors(Mapping[str, "torch.Tensor"]):
    """A read-only mapping whose tensors are computed on each access, without a cache.

    Args:
        specs: How to compute each tensor, by name.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]):
        self.specs = dict(specs)

    def __getitem__(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        if not spec.elementwise:
            result = spec.rule(*(tensors[operand] for tensors, operand in spec.operands))
            return _round_to_spec(result, name, spec).reshape(spec.shape)
        import torch

        elements = torch.empty(math.prod(spec.shape), dtype=torch_dtype(spec.dtype))
        for start, count in chunk_ranges(len(elements), CHUNK_ELEMENTS):
            elements[start : start + count] = flat_slice(self, name, start, count)
        return elements.reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs


class GroupedTensors(DerivedTensors):
    """Derived tensors, some of which are computed in groups; the latest groups are cached.

    Args:
        specs: How to compute each tensor, by name. The rules of a group's members are not used, and must not be
            elementwise.
        groups: The names of the tensors in a group, by the name of each of its members.
        compute_group: Computes the tensors of a group, by name.
    """

    # Fused experts form two groups per layer, and at a layer's end two layers are being written.
    MAX_CACHED_GROUPS = 4

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        groups: Mapping[str, tuple[str, ...]],
        compute_group: Callable[[tuple[str, ...]], dict[str, torch.Tensor]],
    ):
        super().__init__(specs)
        self._groups = groups
        self._compute_group = compute_group
        self._lock = threading.Lock()
        self._cache: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        group = self._groups.get(name)
        if group is None:
            return super().__getitem__(name)
        with self._lock:
            if group not in self._cache:
                while len(self._cache) >= self.MAX_CACHED_GROUPS:
                    oldest = next(iter(self._cache))
                    del self._cache[oldest]
                self._cache[group] = self._compute_group(group)
            return self._cache[group][name].to(torch_dtype(self.specs[name].dtype))


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a tensor, without reading data unless the mapping is a plain state dict.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: The tensor's name in `tensors`.

    Returns:
        The size of each dimension.
    """
    if isinstance(tensors, Checkpoint):
        return tensors.tensors[name].shape
    return tensors.specs[name].shape if isinstance(tensors, DerivedTensors) else tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    """Return the safetensors dtype of a tensor, without reading data unless the mapping is a plain state dict.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: The tensor's name in `tensors`.

    Returns:
        The dtype, such as `F32` or `BF16`.
    """
    if isinstance(tensors, Checkpoint):
        return tensors.tensors[name].dtype
    return tensors.specs[name].dtype if isinstance(tensors, DerivedTensors) else dtype_name(tensors[name].dtype)


def output_dtype(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    """Return the dtype in which a result that replaces a tensor is written.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: The tensor's name in `tensors`.

    Returns:
        The tensor's dtype; BF16 for a quantised tensor, which is dequantised in float32.
    """
    return "BF16" if _is_quantised(tensors, name) else dtype_of(tensors, name)


def flat_slice(tensors: Mapping[str, torch.Tensor], name: str, start: int, count: int) -> torch.Tensor:
    """Return consecutive elements of a flattened tensor, computing only those where the mapping allows it.

    Args:
        tensors: A checkpoint, derived tensors or a state dict.
        name: The tensor's name in `tensors`.
        start: The index of the first element.
        count: The number of elements.

    Returns:
        A tensor of shape [count].

    Raises:
        CheckpointError: An element that is computed from several operands is infinite or NaN, or a file was truncated
            after it was opened.
    """
    if isinstance(tensors, Checkpoint):
        return tensors.flat_slice(name, start, count)
    if isinstance(tensors, DerivedTensors) and tensors.specs[name].elementwise:
        spec = tensors.specs[name]
        result = spec.rule(*(flat_slice(source, operand, start, count) for source, operand in spec.operands))
        return _round_to_spec(result, name, spec)
    return tensors[name].reshape(-1)[start : start + count]


def are_equal(
    first: Mapping[str, torch.Tensor], first_name: str, second: Mapping[str, torch.Tensor], second_name: str
) -> bool:
    """Return whether two tensors have the same dtype, shape and elements, comparing them chunk by chunk.

    Args:
        first: A checkpoint, derived tensors or a state dict.
        first_name: The name of a tensor in `first`.
        second: A checkpoint, derived tensors or a state dict; may be `first`.
        second_name: The name of a tensor in `second`.
    """
    import torch

    shape = shape_of(first, first_name)
    if shape != shape_of(second, second_name) or dtype_of(first, first_name) != dtype_of(second, second_name):
        return False
    return all(
        torch.equal(flat_slice(first, first_name, start, count), flat_slice(second, second_name, start, count))
        for start, count in chunk_ranges(math.prod(shape), CHUNK_ELEMENTS)
    )


def _is_quantised(tensors: Mapping[str, torch.Tensor], name: str) -> bool:
    """Return whether a tensor is stored quantised, possibly under another name or in another shape.

    The result of elementwise arithmetic on several tensors does not count: its spec sets its dtype.
    """
    if isinstance(tensors, DerivedTensors):
        spec = tensors.specs[name]
        is_arithmetic = spec.elementwise and len(spec.operands) > 1
        return bool(spec.operands) and not is_arithmetic and _is_quantised(*spec.operands[0])
    return isinstance(tensors, Checkpoint) and isinstance(tensors.tensors[name], QuantisedTensor)


def _round_to_spec(result: torch.Tensor, name: str, spec: TensorSpec) -> torch.Tensor:
    """Convert a result to its spec's dtype; refuse infinities and NaN in a result of several operands.

    The result of a single operand may have them, as a copied mask does.
    """
    result = result.to(torch_dtype(spec.dtype))
    is_computed = len(spec.operands) > 1 and spec.dtype in FLOATING and result.numel()
    if is_computed and not all(map(math.isfinite, result.aminmax())):
        raise CheckpointError(
            f"tensor {name!r} would be infinite or NaN in {spec.dtype}: an input is (check it with regraft "
            "weights inspect --check-finite), or the result is too large for that dtype."
        )
    return result
