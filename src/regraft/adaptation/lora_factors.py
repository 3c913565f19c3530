"""The factors of an extracted LoRA, and their conversion to PEFT's format."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import A_SUFFIX, B_SUFFIX, PEFT_PREFIX

if TYPE_CHECKING:
    import torch

    Factors = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass
class LoraFactors:
    """The factors of a LoRA by PEFT's names of modules and parameters.

    Args:
        fan_in_fan_out: Whether any layer stores its weight as [in, out].
        layers: B and A by module.
        parameters: By fused parameter, B and A of each expert.
        num_outer_wrappers: By fused parameter, the number of PEFT's wrappers outside its own; each is that of another
            parameter of the same module.
        shared_rank: The common rank of experts that are stored separately and fused in memory; None without such
            experts.
    """

    fan_in_fan_out: bool = False
    layers: dict[str, Factors] = dataclasses.field(default_factory=dict)
    parameters: dict[str, list[Factors]] = dataclasses.field(default_factory=dict)
    num_outer_wrappers: dict[str, int] = dataclasses.field(default_factory=dict)
    shared_rank: int | None = None

    def to_peft(self, modules_to_save: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors and the config in PEFT's format.

        Args:
            modules_to_save: The names of the modules that are stored in full.

        Returns:
            The tensors by stored name, without the modules that are stored in full, and the content of
            `adapter_config.json`.
        """
        import torch
        from peft import __version__

        ranks = {module: len(a) for module, (_, a) in self.layers.items()}
        tensors: dict[str, torch.Tensor] = {}
        for module, (b, a) in self.layers.items():
            tensors[f"{PEFT_PREFIX}{module}{A_SUFFIX}"] = a.contiguous()
            tensors[f"{PEFT_PREFIX}{module}{B_SUFFIX}"] = b.contiguous()
        for parameter, experts in self.parameters.items():
            ranks[parameter] = max(len(a) for _, a in experts)
            padded = [pad_factors(factors, ranks[parameter]) for factors in experts]
            path = PEFT_PREFIX + parameter.rpartition(".")[0] + ".base_layer" * self.num_outer_wrappers[parameter]
            tensors[path + A_SUFFIX] = torch.cat([a for _, a in padded])
            # in the columns of B, PEFT varies the expert fastest
            tensors[path + B_SUFFIX] = torch.stack([b for b, _ in padded], dim=2).flatten(1)
        # PEFT computes the rank of experts that it fuses from `r`, not from `rank_pattern`
        rank = self.shared_rank or max(ranks.values())
        pattern = {name: module_rank for name, module_rank in ranks.items() if module_rank != rank}
        config = {
            "peft_type": "LORA",
            "peft_version": __version__,
            "task_type": "SEQ_CLS" if {"classifier", "score"} & set(modules_to_save) else None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(self.layers),
            "modules_to_save": modules_to_save or None,
            "lora_dropout": 0.0,
            # PEFT refuses it beside target_parameters, and sets it itself for Conv1D
            "fan_in_fan_out": self.fan_in_fan_out and not self.parameters,
            "bias": "none",
            "inference_mode": True,
        }
        if self.parameters:
            config["target_parameters"] = sorted(self.parameters)
        return tensors, config


def pad_factors(factors: Factors, rank: int) -> Factors:
    """Pad factors with zeros to a rank, which does not change their product.

    Args:
        factors: B [out, k] and A [k, in].
        rank: At least k.

    Returns:
        B [out, rank] and A [rank, in].
    """
    b, a = factors
    padded_b = b.new_zeros(len(b), rank)
    padded_a = a.new_zeros(rank, a.shape[1])
    padded_b[:, : b.shape[1]] = b
    padded_a[: len(a)] = a
    return padded_b, padded_a
