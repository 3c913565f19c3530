"""Mixtures of experts as transformers fuses them: all experts of a block in one parameter for each projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import ADAPTER
from regraft.weights import lora_delta

if TYPE_CHECKING:
    import torch


def is_experts(module: Any) -> bool:
    """Return whether a module holds fused experts.

    Args:
        module: Any module of a model.

    Returns:
        True for those that transformers' experts interface runs, whose layout is known: Qwen-MoE, Mixtral, OLMoE,
        DeepSeek, GPT-OSS and their like.
    """
    return hasattr(module, "_apply_gate") and all(hasattr(module, name) for name in ("has_gate", "down_proj"))


def projection_names(module: Any) -> tuple[str, str]:
    """Name the parameters that an expert multiplies by, in the order in which it does.

    Args:
        module: Fused experts.

    Returns:
        The projection out of the hidden states, and the one back.
    """
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


class Expert:
    """One of a module's experts, with the LoRA that is on it.

    Args:
        module: The fused experts.
        number: Which of them.
        wrappers: PEFT's wrappers of the module's parameters, by the parameter's name.
    """

    def __init__(self, module: Any, number: int, wrappers: dict[str, Any]):
        self.module, self.number, self.wrappers = module, number, wrappers

    def inner(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute what the expert's second projection is fed.

        Args:
            hidden: What the expert is fed, tokens × width.

        Returns:
            tokens × inner width.
        """
        import torch

        first, _ = projection_names(self.module)
        with torch.no_grad():
            projected = hidden @ self._weight(first).to(hidden).T
            if self.module.has_bias:
                projected += getattr(self.module, f"{first}_bias")[self.number]
            gated: torch.Tensor = (self.module._apply_gate if self.module.has_gate else self.module.act_fn)(projected)
        return gated

    def _weight(self, name: str) -> torch.Tensor:
        """Return a projection as [out, in], with its LoRA."""
        weight: torch.Tensor = getattr(self.module, name)[self.number].detach()
        weight = weight.T if self.module.is_transposed else weight
        if name not in self.wrappers:
            return weight
        wrapper, experts = self.wrappers[name], len(getattr(self.module, name))
        a, b = (factor[ADAPTER].weight.detach() for factor in (wrapper.lora_A, wrapper.lora_B))
        a, b = a.reshape(experts, -1, a.shape[1])[self.number], b.reshape(len(b), -1, experts)[..., self.number]
        return weight.double() + lora_delta(b, a, wrapper.scaling[ADAPTER])


def lora_wrappers(model: Any) -> dict[Any, dict[str, Any]]:
    """Find the parameters that PEFT has put a LoRA on by name.

    Args:
        model: A PEFT model, or a plain one.

    Returns:
        By the module that owns the parameters, PEFT's wrappers by parameter.
    """
    from peft.tuners.lora.layer import ParamWrapper

    wrappers: dict[Any, dict[str, Any]] = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper) and ADAPTER in module.lora_A:
            wrappers.setdefault(module.get_base_layer(), {})[module.parameter_name] = module
    return wrappers
