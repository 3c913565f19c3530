"""Mixtures of experts as transformers fuses them: a block's experts are stacked in one parameter per projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import ADAPTER_NAME
from regraft.weights import lora_delta

if TYPE_CHECKING:
    import torch


def is_experts(module: Any) -> bool:
    """Return whether a module consists of fused experts with the interface of transformers.

    Qwen-MoE, Mixtral, OLMoE, DeepSeek and GPT-OSS, for example, have such modules.
    """
    return hasattr(module, "_apply_gate") and all(hasattr(module, name) for name in ("has_gate", "down_proj"))


def projection_names(module: Any) -> tuple[str, str]:
    """Return the parameter names of the up- and the down-projection of fused experts."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


class Expert:
    """A single expert of fused experts, with its LoRA.

    Args:
        module: The fused experts.
        index: The index of the expert in the first dimension of the parameters.
        wrappers: PEFT's wrappers of the module's parameters, by the parameter's name.
    """

    def __init__(self, module: Any, index: int, wrappers: dict[str, Any]):
        self.module = module
        self.index = index
        self.wrappers = wrappers

    def down_projection_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the expert's down-projection.

        Args:
            hidden: The inputs of the expert, [tokens, width].

        Returns:
            [tokens, inner width].
        """
        import torch

        up_projection, _ = projection_names(self.module)
        with torch.no_grad():
            projected = hidden @ self._weight(up_projection).to(hidden).T
            if self.module.has_bias:
                projected += getattr(self.module, f"{up_projection}_bias")[self.index]
            activation = self.module._apply_gate if self.module.has_gate else self.module.act_fn
            activated: torch.Tensor = activation(projected)
        return activated

    def _weight(self, name: str) -> torch.Tensor:
        """Return the weight of a projection with its LoRA, [out, in]."""
        weight: torch.Tensor = getattr(self.module, name)[self.index].detach()
        weight = weight.T if self.module.is_transposed else weight
        if name not in self.wrappers:
            return weight
        wrapper = self.wrappers[name]
        num_experts = len(getattr(self.module, name))
        fused_a = wrapper.lora_A[ADAPTER_NAME].weight.detach()
        fused_b = wrapper.lora_B[ADAPTER_NAME].weight.detach()
        a = fused_a.reshape(num_experts, -1, fused_a.shape[1])[self.index]
        b = fused_b.reshape(len(fused_b), -1, num_experts)[..., self.index]  # PEFT stores the experts of B last
        return weight.double() + lora_delta(b, a, wrapper.scaling[ADAPTER_NAME])


def lora_wrappers(model: Any) -> dict[Any, dict[str, Any]]:
    """Return PEFT's wrappers of parameters with a LoRA, by the parameter's module and by the parameter's name.

    Args:
        model: A model, with or without an adapter.
    """
    from peft.tuners.lora.layer import ParamWrapper

    wrappers: dict[Any, dict[str, Any]] = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper) and ADAPTER_NAME in module.lora_A:
            wrappers.setdefault(module.get_base_layer(), {})[module.parameter_name] = module
    return wrappers
