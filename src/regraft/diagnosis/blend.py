"""A model whose tensors are linear combinations of other models' tensors."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

from regraft.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn


class Blend:
    """A model whose tensors are set, in place, to linear combinations of other models' tensors.

    Tensors that are equal in all models are never rewritten, so blending two adapters on the same base writes only the
    adapters' tensors.

    Args:
        models: At least two models of the same kind, size and architecture; they are not changed.
        names: The name of each model in error messages.

    Attributes:
        model: A copy of the first model, whose tensors `set_coefficients` changes.

    Raises:
        MismatchError: A tensor is missing in one of the models, differs in shape or type, or holds integers that
            differ.
    """

    def __init__(self, models: Sequence[nn.Module], names: Sequence[str]):
        model_tensors = [named_tensors(model) for model in models]
        for tensors, name in zip(model_tensors[1:], names[1:], strict=True):
            _check_same_layout(model_tensors[0], tensors, names[0], name)
        self.model = copy.deepcopy(models[0])
        self._differing: list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = []
        for name, target in named_tensors(self.model).items():
            sources = tuple(tensors[name] for tensors in model_tensors)
            if any(not sources[0].equal(source.to(target.device)) for source in sources[1:]):
                self._differing.append((target, sources))

    def set_coefficients(self, *coefficients: float) -> None:
        """Set the model to (1 − Σ cᵢ)·model₀ + Σ cᵢ·modelᵢ.

        If one model has the coefficient 1 and all others 0, its tensors are copied exactly.

        Args:
            coefficients: The coefficient cᵢ of each model after the first; below 0 or above 1 they extrapolate.
        """
        import torch

        all_coefficients = (1 - math.fsum(coefficients), *coefficients)
        nonzero = [i for i, coefficient in enumerate(all_coefficients) if coefficient]
        is_single_model = len(nonzero) == 1 and all_coefficients[nonzero[0]] == 1
        with torch.no_grad():
            for target, sources in self._differing:
                if is_single_model:  # a sum could differ from the model in the last digits
                    target.copy_(sources[nonzero[0]])
                    continue
                tensors = [source.to(target.device) for source in sources]
                if len(tensors) == 2:
                    torch.lerp(tensors[0], tensors[1], coefficients[0], out=target)
                    continue
                torch.mul(tensors[0], all_coefficients[0], out=target)
                for tensor, coefficient in zip(tensors[1:], coefficients, strict=True):
                    target.add_(tensor, alpha=coefficient)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model.

    Args:
        model: A model of any architecture.

    Returns:
        The tensors by name, detached but not copied.
    """
    return {
        name: tensor.detach()
        for tensors in (model.named_parameters(), model.named_buffers())
        for name, tensor in tensors
    }


def _check_same_layout(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], first_name: str, second_name: str
) -> None:
    """Check that two models have the same tensors, by name, shape and type, and the same integers."""
    remedy = "Write both as one kind: `regraft adaptation convert … --to full`."
    for tensors, reference, name in ((first, second, first_name), (second, first, second_name)):
        unmatched = [tensor_name for tensor_name in tensors if tensor_name not in reference]
        if unmatched:
            raise MismatchError(
                f"only the {name} has tensor {unmatched[0]!r} ({len(unmatched):,} such): models of different kinds "
                f"cannot be interpolated. {remedy}"
            )
    for tensor_name, a in first.items():
        b = second[tensor_name]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise MismatchError(
                f"tensor {tensor_name!r} is {a.dtype} {tuple(a.shape)} in the {first_name} and {b.dtype} "
                f"{tuple(b.shape)} in the {second_name}. {remedy}"
            )
        if not a.is_floating_point() and not a.equal(b.to(a.device)):
            raise MismatchError(
                f"tensor {tensor_name!r} holds integers that differ between the {first_name} and the {second_name}: "
                f"they cannot be interpolated. {remedy}"
            )
