"""The matrices that an adaptation changes, and the factors of these changes that read the layers' inputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.experts import is_experts, projection_names
from regraft.adaptation.lora import ADAPTER, PEFT_PREFIX
from regraft.adaptation.transform import check_transformable

if TYPE_CHECKING:
    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base

SUPPORTED_KINDS = ("full", "lora", "bottleneck")


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """The change that an adaptation makes to the inputs of a layer, or of the experts of a layer.

    Args:
        name: The name of the layer's module; for experts, and for parameters that PEFT adapts, that of the parameter.
        module: The module whose inputs the factor reads. Experts read those of the tokens that are routed to them, or
            their own intermediate states.
        weight: The parameter that is the factor, or to which the factor was added.
        factor: [k, in], for experts [experts, k, in]: the delta of a full fine-tune, a LoRA's A, a bottleneck's
            down-projection, or the weight of a head.
        is_head: Whether it is a head, of which the base has no weight.
        is_transposed: Whether the parameter stores the factor as [in, k].
    """

    name: str
    module: Any
    weight: torch.Tensor
    factor: torch.Tensor
    is_head: bool
    is_transposed: bool = False

    def set_factor(self, factor: torch.Tensor) -> None:
        """Replace the factor in the model.

        Args:
            factor: The new factor, of the same shape.
        """
        import torch

        with torch.no_grad():
            change = factor.to(self.factor) - self.factor
            change = change.mT if self.is_transposed else change
            self.weight.add_(change.reshape(self.weight.shape).to(self.weight))


def linear_changes(model: Any, tuned: Any, adaptation: Adaptation, old: Base) -> list[Change]:
    """Return the changes that an adaptation makes to the linear layers of a grafted model.

    Args:
        model: The adaptation on the new base.
        tuned: The adaptation on the old base.
        adaptation: A full fine-tune, a plain LoRA or bottleneck adapters.
        old: The old base.

    Returns:
        A change for each layer, and for each projection of experts.

    Raises:
        KindError: The adaptation's kind is not supported.
    """
    from peft.tuners.lora import LoraLayer

    check_transformable(adaptation, SUPPORTED_KINDS)
    tuned_parameters = dict(tuned.named_parameters())
    changes = []

    def delta(name: str) -> torch.Tensor | None:
        value: torch.Tensor = tuned_parameters[name].detach()
        base = base_tensor(name, old)
        return None if base is None else value - base.to(value)

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            changes += _lora_changes(parameter_of(name, module), name, module)
        elif is_experts(module) and adaptation.family.tunes_base:
            for part in projection_names(module):
                expert_delta = delta(f"{name}.{part}")
                transposed = module.is_transposed
                assert expert_delta is not None  # a base has all its experts
                factor = expert_delta.mT if transposed else expert_delta
                changes.append(Change(f"{name}.{part}", module, getattr(module, part), factor, False, transposed))
        elif not is_linear_map(module) or name.endswith(".bottleneck.up"):
            continue
        elif name.endswith(".bottleneck.down"):
            changes.append(Change(name, module, module.weight, module.weight.detach().clone(), is_head=False))
        elif adaptation.family.tunes_module_weight(name, old):
            layer_delta = delta(f"{name}.weight")
            transposed = is_transposed(module)
            is_head = layer_delta is None
            factor = module.weight.detach().clone() if layer_delta is None else layer_delta
            factor = factor.T if transposed else factor
            changes.append(Change(name, module, module.weight, factor, is_head, transposed))
    return changes


def base_tensor(name: str, base: Base) -> torch.Tensor | None:
    """Return the base's tensor for a parameter of a model with a head.

    Args:
        name: The parameter's name in the model, with or without an adapter.
        base: The base.

    Returns:
        The tensor; None for a parameter of the head, or of a pooler that the base lacks.
    """
    plain = name.removeprefix(PEFT_PREFIX).replace(f".modules_to_save.{ADAPTER}", "")
    inner = plain.removeprefix(base.prefix + ".")
    if inner in base.parameters:
        return base.parameters[inner]
    name_in_base = base.named.names.get(plain)  # a layer of the head that language models have too
    return None if name_in_base is None else base.named[name_in_base]


def skip_reasons(model: Any, tuned: Any, adaptation: Adaptation, old: Base, changes: list[Change]) -> dict[str, str]:
    """Return the changed matrices that do not belong to a layer whose inputs can be observed.

    Args:
        model: The adaptation on the new base.
        tuned: The adaptation on the old base.
        adaptation: The adaptation.
        old: The old base.
        changes: The result of `linear_changes`.

    Returns:
        The reason for each matrix, by its name.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from torch import nn

    weights = {id(change.weight) for change in changes}
    names = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if ADAPTER in module.lora_A and id(module.lora_A[ADAPTER].weight) not in weights:
                names.append(name)
        elif adaptation.family.tunes_base and not isinstance(module, nn.Embedding):
            for part, weight in module.named_parameters(recurse=False):
                base = base_tensor(f"{name}.{part}", old)
                if base is None or weight.dim() < 2 or id(weight) in weights or part.endswith("bias"):
                    continue
                value = tuned.get_parameter(f"{name}.{part}")
                if not torch.equal(value, base.to(value)):
                    names.append(f"{name}.{part}")
    return dict.fromkeys(names, "no layer whose inputs can be watched")


def is_linear_map(module: Any) -> bool:
    """Return whether a module multiplies its input by its weight: linear layers, Conv1D of GPT-2, routers of experts.

    Args:
        module: A module.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        return True
    weight = module._parameters.get("weight")  # the classes of transformers' routers all end so
    return weight is not None and weight.dim() == 2 and type(module).__name__.endswith("Router")


def is_transposed(module: Any) -> bool:
    """Return whether a module stores its weight as [in, out], like a Conv1D.

    Args:
        module: A module.
    """
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def parameter_of(name: str, module: Any) -> str:
    """Return the name of the parameter that a LoRA or a bottleneck on a module changes.

    Args:
        name: The module's name.
        module: The module, possibly PEFT's wrapper.

    Returns:
        The name in the model without the adapter, but with PEFT's prefix.
    """
    parameter = getattr(module, "parameter_name", "weight")
    return f"{name.replace('.base_layer', '')}.{parameter}"  # there may be several wrappers


def _lora_changes(parameter: str, name: str, module: Any) -> list[Change]:
    """Return the change of a LoRA; nothing if the input of its parameter is unknown."""
    from peft.tuners.lora.layer import ParamWrapper

    if ADAPTER not in module.lora_A:
        return []
    weight = module.lora_A[ADAPTER].weight
    factor = weight.detach().clone()
    if not isinstance(module, ParamWrapper):
        return [Change(name, module, weight, factor, is_head=False)]
    layer = module.get_base_layer()
    part = module.parameter_name
    if is_experts(layer) and part in projection_names(layer):
        factor = factor.reshape(len(getattr(layer, part)), -1, factor.shape[1])
    elif not is_linear_map(layer) or is_transposed(layer) or part != "weight":
        return []
    return [Change(parameter, layer, weight, factor, is_head=False)]
