"""The linear layers of a classifier that an adaptation changes, and what of the change reads the input."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.model import ADAPTER
from regraft.adaptation.rework import check_reworkable

if TYPE_CHECKING:
    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.upgrade import Base

KINDS = ("full", "lora", "bottleneck")


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """What an adaptation does to the inputs of one layer.

    Args:
        name: The layer's module in the model.
        module: The module; its input is what the factor reads.
        weight: The parameter that holds the factor, alone or added to the base's weight.
        factor: [k, in]: the whole delta of a full fine-tune, a LoRA's A, a bottleneck's first layer, or the whole
            weight of a head.
        is_head: Whether it is a head, which is no change of a base's weight.
    """

    name: str
    module: Any
    weight: torch.Tensor
    factor: torch.Tensor
    is_head: bool

    def become(self, factor: torch.Tensor) -> None:
        """Put another factor in its place, in the model.

        Args:
            factor: [k, in].
        """
        import torch

        with torch.no_grad():
            change = factor.to(self.factor) - self.factor
            self.weight.add_(change.to(self.weight))


def linear_changes(model: Any, tuned: Any, adaptation: Adaptation, old: Base) -> list[Change]:
    """Find the linear layers of a grafted model that its adaptation changes.

    Args:
        model: The adaptation put on the new base.
        tuned: The adaptation on the old base.
        adaptation: A full fine-tune, a plain LoRA or bottleneck adapters.
        old: The old base.

    Returns:
        A change a layer, in no order that matters.

    Raises:
        RecipeError: The adaptation's kind changes no inputs of linear layers in this sense.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn

    check_reworkable(adaptation, KINDS)
    before = dict(tuned.named_parameters())
    prefix = old.prefix + "."
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if ADAPTER in module.lora_A:
                weight: Any = module.lora_A[ADAPTER].weight
                found.append(Change(name, module, weight, weight.detach().clone(), is_head=False))
            continue
        if not isinstance(module, nn.Linear):
            continue
        inner = f"{name}.weight".removeprefix(prefix)
        if name.endswith(".bottleneck.down"):
            found.append(Change(name, module, module.weight, module.weight.detach().clone(), is_head=False))
        elif adaptation.kind == "full" and inner in old.parameters:
            delta = before[f"{name}.weight"].detach() - old.parameters[inner].to(before[f"{name}.weight"])
            found.append(Change(name, module, module.weight, delta, is_head=False))
        elif f".modules_to_save.{ADAPTER}" in name or (adaptation.kind != "lora" and not name.startswith(prefix)):
            found.append(Change(name, module, module.weight, module.weight.detach().clone(), is_head=True))
    return found
