"""The matrices of a classifier that an adaptation changes, and what of the change reads the layer's input."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.experts import is_experts, projection_names
from regraft.adaptation.lora import ADAPTER, START
from regraft.adaptation.transform import check_transformable

if TYPE_CHECKING:
    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base

KINDS = ("full", "lora", "bottleneck")


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """What an adaptation does to the inputs of one layer, or of each expert of a mixture.

    Args:
        name: What is changed: the layer's module in the model; of experts, and of parameters that a LoRA is on, the
            parameter.
        module: The module whose input the factor reads; of experts, which read it where they are routed to, or what
            they make of it in between.
        weight: The parameter that holds the factor, alone or added to the base's weight.
        factor: [k, in], of experts [experts, k, in]: the whole delta of a full fine-tune, a LoRA's A, a bottleneck's
            first layer, or the whole weight of a head.
        is_head: Whether it is a head, which is no change of a base's weight.
        is_transposed: Whether the parameter holds the factor as [in, k].
    """

    name: str
    module: Any
    weight: torch.Tensor
    factor: torch.Tensor
    is_head: bool
    is_transposed: bool = False

    def set_factor(self, factor: torch.Tensor) -> None:
        """Put another factor in its place, in the model.

        Args:
            factor: Of the shape of the one there is.
        """
        import torch

        with torch.no_grad():
            change = factor.to(self.factor) - self.factor
            change = change.mT if self.is_transposed else change
            self.weight.add_(change.reshape(self.weight.shape).to(self.weight))


def linear_changes(model: Any, tuned: Any, adaptation: Adaptation, old: Base) -> list[Change]:
    """Find the layers of a grafted model that multiply by a matrix which its adaptation changes.

    Args:
        model: The adaptation put on the new base.
        tuned: The adaptation on the old base.
        adaptation: A full fine-tune, a plain LoRA or bottleneck adapters.
        old: The old base.

    Returns:
        A change a layer, in no order that matters; of experts one for each of their projections.

    Raises:
        KindError: The adaptation's kind changes no inputs of linear layers in this sense.
    """
    from peft.tuners.lora import LoraLayer

    check_transformable(adaptation, KINDS)
    before = dict(tuned.named_parameters())
    changes = []

    def delta(name: str) -> torch.Tensor | None:
        value: torch.Tensor = before[name].detach()
        base = base_tensor(name, old)
        return None if base is None else value - base.to(value)

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            changes += _of_lora(parameter_of(name, module), name, module)
        elif is_experts(module) and adaptation.family.tunes_base:
            for part in projection_names(module):
                moved, turned = delta(f"{name}.{part}"), module.is_transposed
                assert moved is not None  # a base has all its experts
                factor = moved.mT if turned else moved
                changes.append(Change(f"{name}.{part}", module, getattr(module, part), factor, False, turned))
        elif not is_linear_map(module) or name.endswith(".bottleneck.up"):
            continue
        elif name.endswith(".bottleneck.down"):
            changes.append(Change(name, module, module.weight, module.weight.detach().clone(), is_head=False))
        elif adaptation.family.tunes_module_weight(name, old):
            moved, turned = delta(f"{name}.weight"), is_transposed(module)
            factor = module.weight.detach().clone() if moved is None else moved
            changes.append(Change(name, module, module.weight, factor.T if turned else factor, moved is None, turned))
    return changes


def base_tensor(name: str, base: Base) -> torch.Tensor | None:
    """Return what a base has for a parameter of a classifier, to which tuning adds a delta.

    Args:
        name: The parameter's name in the model, with an adapter or without.
        base: The base.

    Returns:
        The base's tensor; None for a parameter of the head, or of a pooler that the base lacks.
    """
    plain = name.removeprefix(START).replace(f".modules_to_save.{ADAPTER}", "")
    inner, shared = plain.removeprefix(base.prefix + "."), base.named.names.get(plain)
    if inner in base.parameters:
        return base.parameters[inner]
    return None if shared is None else base.named[shared]  # a layer that classifiers and language models both end with


def passed_over(model: Any, tuned: Any, adaptation: Adaptation, old: Base, changes: list[Change]) -> dict[str, str]:
    """Name the matrices that an adaptation changes and that are none of a layer whose inputs can be watched.

    Args:
        model: As for `linear_changes`.
        tuned: As there.
        adaptation: As there.
        old: As there.
        changes: From there.

    Returns:
        Why each is passed over, by its name.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from torch import nn

    weights = {id(change.weight) for change in changes}
    names = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            names += [name] * (ADAPTER in module.lora_A and id(module.lora_A[ADAPTER].weight) not in weights)
        elif adaptation.family.tunes_base and not isinstance(module, nn.Embedding):
            for part, weight in module.named_parameters(recurse=False):
                base = base_tensor(f"{name}.{part}", old)
                if base is None or weight.dim() < 2 or id(weight) in weights or part.endswith("bias"):
                    continue
                value = tuned.get_parameter(f"{name}.{part}")
                names += [f"{name}.{part}"] * (not torch.equal(value, base.to(value)))
    return dict.fromkeys(names, "no layer whose inputs can be watched")


def is_linear_map(module: Any) -> bool:
    """Return whether all that a module does with its weight is to multiply its input by it.

    Args:
        module: Any module of a model.

    Returns:
        True for linear layers, GPT-2's Conv1D among them, and for what routes tokens to experts.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        return True
    weight = module._parameters.get("weight")  # transformers' routers are all called so, and all alike
    return weight is not None and weight.dim() == 2 and type(module).__name__.endswith("Router")


def is_transposed(module: Any) -> bool:
    """Return whether a module keeps its weight as [in, out].

    Args:
        module: One that multiplies.

    Returns:
        True for a Conv1D.
    """
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def parameter_of(name: str, module: Any) -> str:
    """Name the parameter that a LoRA or a bottleneck on a module changes.

    Args:
        name: The module's name.
        module: The module, as PEFT wraps it.

    Returns:
        The parameter's name in the model without it, under the prefix that PEFT has for all.
    """
    parameter = getattr(module, "parameter_name", "weight")
    return f"{name.replace('.base_layer', '')}.{parameter}"  # of one module several may be wrapped


def _of_lora(changed: str, name: str, module: Any) -> list[Change]:
    """Return what a LoRA reads by its A; nothing of a parameter of which it is not known what it multiplies."""
    from peft.tuners.lora.layer import ParamWrapper

    if ADAPTER not in module.lora_A:
        return []
    weight = module.lora_A[ADAPTER].weight
    factor = weight.detach().clone()
    if not isinstance(module, ParamWrapper):
        return [Change(name, module, weight, factor, is_head=False)]
    layer, part = module.get_base_layer(), module.parameter_name
    if is_experts(layer) and part in projection_names(layer):
        factor = factor.reshape(len(getattr(layer, part)), -1, factor.shape[1])
    elif not is_linear_map(layer) or is_transposed(layer) or part != "weight":
        return []
    return [Change(changed, layer, weight, factor, is_head=False)]
