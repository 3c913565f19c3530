"""One model whose tensors are linear combinations of those of others."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Blend:
    """A model whose tensors are set, in place, to linear combinations of the tensors of other models.

    Tensors that are equal in all models are never rewritten, so blending two adapters on one base costs next to
    nothing.

    Args:
        models: At least two models of one kind, size and architecture; they are not changed.
        names: The models' names, for messages.

    Attributes:
        model: A copy of the first model, whose tensors `set_coefficients` changes.

    Raises:
        MismatchError: A tensor is missing in one of the models, its shapes or types differ, or it holds integers that
            differ.
    """

    def __init__(self, models: Sequence[Any], names: Sequence[str]):
        tensors = [named_tensors(model) for model in models]
        for model_tensors, name in zip(tensors[1:], names[1:], strict=True):
            _check_same_layout(tensors[0], model_tensors, names[0], name)
        self.model = copy.deepcopy(models[0])
        self._differing = [
            (target, tuple(model_tensors[name] for model_tensors in tensors))
            for name, target in named_tensors(self.model).items()
            if any(not tensors[0][name].equal(model_tensors[name].to(target.device)) for model_tensors in tensors[1:])
        ]

    def set_coefficients(self, *coefficients: float) -> None:
        """Set the model to (1 − Σ cᵢ)·first + Σ cᵢ·modelᵢ; a combination of one model alone is exactly that model.

        Args:
            coefficients: The coefficient of each model but the first; negative ones and ones above 1 extrapolate.
        """
        import torch

        all_coefficients = (1 - math.fsum(coefficients), *coefficients)
        nonzero = [i for i, coefficient in enumerate(all_coefficients) if coefficient]
        is_single_model = len(nonzero) == 1 and all_coefficients[nonzero[0]] == 1
        with torch.no_grad():
            for target, sources in self._differing:
                first, *further = (source.to(target.device) for source in sources)
                if is_single_model:
                    target.copy_(sources[nonzero[0]])
                elif len(further) == 1:
                    torch.lerp(first, further[0], coefficients[0], out=target)
                else:
                    torch.mul(first, all_coefficients[0], out=target)
                    for source, coefficient in zip(further, coefficients, strict=True):
                        target.add_(source, alpha=coefficient)


def named_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model.

    Args:
        model: A torch module.

    Returns:
        The tensors by name, detached.
    """
    return {
        name: tensor.detach()
        for tensors in (model.named_parameters(), model.named_buffers())
        for name, tensor in tensors
    }


def _check_same_layout(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], first_name: str, second_name: str
) -> None:
    remedy = "Write both as one kind: `regraft adaptation convert … --to full`."
    for tensors, reference, name in ((first, second, first_name), (second, first, second_name)):
        if unmatched := [tensor_name for tensor_name in tensors if tensor_name not in reference]:
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
