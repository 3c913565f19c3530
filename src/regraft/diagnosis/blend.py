"""One model set to weighted sums of others."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Blend:
    """A model whose tensors are set to weighted sums of those of others, in place: nothing is loaded anew.

    Tensors that are the same in all ends are left alone, so that two adapters on one base cost next to nothing.

    Args:
        ends: Two models or more of one kind, size and architecture; they are not changed.
        names: What they are called, for messages.

    Attributes:
        model: A copy of the first that `at` moves about.

    Raises:
        MismatchError: A tensor is in one of them only, or is of another shape or type, or holds other whole numbers.
    """

    def __init__(self, ends: Sequence[Any], names: Sequence[str]):
        tensors = [tensors_of(end) for end in ends]
        for other, name in zip(tensors[1:], names[1:], strict=True):
            _check_alike(tensors[0], other, names[0], name)
        self.model = copy.deepcopy(ends[0])
        self._moving = [
            (target, tuple(end[name] for end in tensors))
            for name, target in tensors_of(self.model).items()
            if any(not tensors[0][name].equal(end[name].to(target.device)) for end in tensors[1:])
        ]

    def at(self, *shares: float) -> None:
        """Go to (1 − Σ shares)·first + Σ share·end; at an end, to exactly its tensors.

        Args:
            shares: How much of each end but the first; they may be negative or above 1.
        """
        import torch

        every = (1 - math.fsum(shares), *shares)
        whole = [i for i, share in enumerate(every) if share == 1 and sum(map(bool, every)) == 1]
        with torch.no_grad():
            for target, ends in self._moving:
                first, *others = (end.to(target.device) for end in ends)
                if whole:
                    target.copy_(ends[whole[0]])
                elif len(others) == 1:
                    torch.lerp(first, others[0], shares[0], out=target)
                else:
                    torch.mul(first, every[0], out=target)
                    for other, share in zip(others, shares, strict=True):
                        target.add_(other, alpha=share)


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Return what a model computes with.

    Args:
        model: A torch module.

    Returns:
        Its parameters and buffers by name, without gradients.
    """
    return {name: t.detach() for part in (model.named_parameters(), model.named_buffers()) for name, t in part}


def _check_alike(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], *names: str) -> None:
    remedy = "Write both as one kind: `regraft adaptation convert … --to full`."
    for here, there, name in ((first, second, names[0]), (second, first, names[1])):
        if alone := [tensor for tensor in here if tensor not in there]:
            raise MismatchError(
                f"only the {name} has tensor {alone[0]!r} ({len(alone):,} such): no straight line leads to a model "
                f"of another kind. {remedy}"
            )
    for tensor, value in first.items():
        other = second[tensor]
        if value.shape != other.shape or value.dtype != other.dtype:
            raise MismatchError(
                f"tensor {tensor!r} is {value.dtype} {tuple(value.shape)} in the {names[0]} and {other.dtype} "
                f"{tuple(other.shape)} in the {names[1]}. {remedy}"
            )
        if not value.is_floating_point() and not value.equal(other.to(value.device)):
            raise MismatchError(
                f"tensor {tensor!r} holds whole numbers that differ between the {names[0]} and the {names[1]}: there "
                f"is nothing between them. {remedy}"
            )
