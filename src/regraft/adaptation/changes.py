"""The matrices that an adaptation changes, and the factors of the changes that multiply the layers' inputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.experts import is_experts, projection_names
from regraft.adaptation.lora import ADAPTER_NAME, PEFT_PREFIX
from regraft.adaptation.transform import check_transformable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.weights import RowMatch

SUPPORTED_KINDS = ("full", "lora", "bottleneck")
"""The kinds of adaptation whose changes `linear_changes` returns."""


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """The factor with which an adaptation multiplies the inputs of a linear layer or of fused experts.

    Args:
        name: The name of the layer's module; for experts, and for parameters that PEFT adapts, the parameter's name.
        module: The module whose inputs the factor multiplies. Experts multiply the inputs of the tokens that are routed
            to them, or their intermediate states.
        weight: The parameter that is the factor, or to which the factor was added.
        factor: [k, in], for experts [experts, k, in]: the delta of a full fine-tune, a LoRA's A, a bottleneck's
            down-projection, or the weight of a head.
        is_head: Whether the base has no weight of the layer, as for the head and for a pooler that the base lacks.
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
            factor: The new factor, in the shape of `self.factor`.
        """
        import torch

        with torch.no_grad():
            change = factor.to(self.factor) - self.factor
            change = change.mT if self.is_transposed else change
            self.weight.add_(change.reshape(self.weight.shape).to(self.weight))


def linear_changes(
    model: Any, old_model: Any, adaptation: Adaptation, old: Base, row_match: RowMatch | None = None
) -> list[Change]:
    """Return the changes that an adaptation makes to the linear layers of a grafted model.

    Args:
        model: The adaptation on the new base, as a model.
        old_model: The adaptation on the old base, as a model.
        adaptation: A full fine-tune, a plain LoRA or bottleneck adapters.
        old: The old base.
        row_match: How the rows of the vocabularies match; None if they are the same.

    Returns:
        A change for each linear layer that the adaptation tunes, and for each projection of fused experts.

    Raises:
        KindError: The adaptation's kind is not supported, or a LoRA has more than B·A for linear layers.
    """
    from peft.tuners.lora import LoraLayer

    check_transformable(adaptation, SUPPORTED_KINDS)
    tuned_parameters = dict(old_model.named_parameters())
    embeddings = embedding_weights(model)
    changes = []

    def delta(name: str) -> torch.Tensor | None:
        """Return tuned − old; None if the old base lacks the parameter."""
        return parameter_delta(name, tuned_parameters[name].detach(), old, row_match)

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            changes += _lora_changes(parameter_of(name, module), name, module)
        elif is_experts(module) and adaptation.family.tunes_base:
            for projection in projection_names(module):
                parameter = f"{name}.{projection}"
                expert_delta = delta(parameter)
                transposed = module.is_transposed
                assert expert_delta is not None  # a base has all its experts
                factor = expert_delta.mT if transposed else expert_delta
                changes.append(Change(parameter, module, getattr(module, projection), factor, False, transposed))
        elif not is_linear_map(module) or name.endswith(".bottleneck.up"):
            continue
        elif name.endswith(".bottleneck.down"):
            changes.append(Change(name, module, module.weight, module.weight.detach().clone(), is_head=False))
        elif adaptation.family.tunes_module_weight(name, old) and id(module.weight) not in embeddings:
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
        base: The base that the model was made from.

    Returns:
        The tensor; None if the base lacks it, as for an adapter, most heads, and possibly a pooler.
    """
    plain = name.removeprefix(PEFT_PREFIX).replace(f".modules_to_save.{ADAPTER_NAME}", "")
    inner = plain.removeprefix(base.prefix + ".")
    if inner in base.model_parameters:
        return base.model_parameters[inner]
    name_in_base = base.named_tensors.names.get(plain)  # a layer of the head that language models have too
    return None if name_in_base is None else base.named_tensors[name_in_base]


def parameter_delta(
    name: str, tuned: torch.Tensor, old: Base, row_match: RowMatch | None = None
) -> torch.Tensor | None:
    """Return tuned − old; for a language model's head, in the rows of the grafted vocabulary.

    Args:
        name: The parameter's name in the model, with or without an adapter.
        tuned: The tuned parameter on the old base.
        old: The old base.
        row_match: How the rows of the vocabularies match; None if they are the same.

    Returns:
        The delta, 0 in rows of tokens that a base or the fine-tune lacks; None if the old base lacks the parameter.
    """
    import torch

    base = base_tensor(name, old)
    if base is None:
        return None
    base = base.to(tuned)
    plain = name.removeprefix(PEFT_PREFIX).replace(f".modules_to_save.{ADAPTER_NAME}", "")
    if row_match is None or plain not in old.language_head:
        return tuned - base
    match = (row_match.new_row_indices, row_match.tuned_row_indices, row_match.old_row_indices)
    new_rows, tuned_rows, old_rows = map(torch.tensor, match)
    in_all = (new_rows >= 0) & (tuned_rows >= 0) & (old_rows >= 0)
    delta = tuned.new_zeros(len(in_all), *tuned.shape[1:])
    delta[in_all] = tuned[tuned_rows[in_all]] - base[old_rows[in_all]]
    return delta


def skip_reasons(
    model: Any, old_model: Any, adaptation: Adaptation, old: Base, changes: list[Change]
) -> dict[str, str]:
    """Return the reasons for which changed matrices that `linear_changes` does not cover are skipped.

    Args:
        model: The adaptation on the new base, as a model.
        old_model: The adaptation on the old base, as a model.
        adaptation: The adaptation on disk.
        old: The old base.
        changes: The result of `linear_changes`.

    Returns:
        The reason by the name of each matrix; it is always that no layer is known whose inputs the matrix multiplies.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from torch.nn import Embedding

    # parameters have no usable equality
    weights = {id(change.weight) for change in changes} | embedding_weights(model)
    names = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if ADAPTER_NAME in module.lora_A and id(module.lora_A[ADAPTER_NAME].weight) not in weights:
                names.append(name)
        elif adaptation.family.tunes_base and not isinstance(module, Embedding):
            for attribute, weight in module.named_parameters(recurse=False):
                parameter = f"{name}.{attribute}"
                base = base_tensor(parameter, old)
                if base is None or weight.dim() < 2 or id(weight) in weights or attribute.endswith("bias"):
                    continue
                value = old_model.get_parameter(parameter)
                if not torch.equal(value, base.to(value)):
                    names.append(parameter)
    return dict.fromkeys(names, "no layer whose inputs can be watched")


def embedding_weights(model: nn.Module) -> set[int]:
    """Return the identities of the weights of embeddings, with which a tied head is changed too.

    Args:
        model: A model, with or without an adapter.
    """
    from torch.nn import Embedding

    return {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}


def is_linear_map(module: nn.Module) -> bool:
    """Return whether a module multiplies its input by its weight: a linear layer, GPT-2's Conv1D, a router."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Linear | Conv1D):
        return True
    weight = module._parameters.get("weight")
    # routers have no common class; the names of those with a weight of their own end in Router
    return weight is not None and weight.dim() == 2 and type(module).__name__.endswith("Router")


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module stores its weight as [in, out], like a Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def parameter_of(name: str, module: Any) -> str:
    """Return the name of the parameter that a LoRA or a bottleneck on a module changes.

    Args:
        name: The module's name.
        module: The module, possibly PEFT's wrapper.

    Returns:
        The name in the model without the adapter, but with PEFT's prefix if the module's name has it.
    """
    parameter = getattr(module, "parameter_name", "weight")
    return f"{name.replace('.base_layer', '')}.{parameter}"  # wrappers of several parameters of a module are nested


def _lora_changes(parameter: str, name: str, module: Any) -> list[Change]:
    """Return the change of a LoRA; an empty list if the input of its parameter is unknown."""
    from peft.tuners.lora.layer import ParamWrapper

    if ADAPTER_NAME not in module.lora_A:
        return []
    weight = module.lora_A[ADAPTER_NAME].weight
    factor = weight.detach().clone()
    if not isinstance(module, ParamWrapper):
        return [Change(name, module, weight, factor, is_head=False)]
    layer = module.get_base_layer()
    attribute = module.parameter_name
    if is_experts(layer) and attribute in projection_names(layer):
        factor = factor.reshape(len(getattr(layer, attribute)), -1, factor.shape[1])
    elif not is_linear_map(layer) or is_transposed(layer) or attribute != "weight":
        return []
    return [Change(parameter, layer, weight, factor, is_head=False)]
