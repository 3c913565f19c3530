"""PEFT's names for LoRAs, and the conversion of a LoRA that was initialised from its base to a plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError
from regraft.weights import subtract_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from regraft.checkpoint.derived import Tensors

ADAPTER_NAME = "default"  # PEFT's name of the only adapter of a model
PEFT_PREFIX = "base_model.model."
PROMPT_PREFIX = "base_model."  # of the heads of prompts and prefixes
CONVERT_REMEDY = "convert it to full (regraft adaptation convert)"
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
# initialisations that subtract scaling·B·A from the base's weights
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# initialisations that need only the base and a seed; the others need data too
DETERMINED_INITS = ("true", "gaussian", "orthogonal", "pissa", "olora")


def model_name(stored: str) -> str:
    """Return the name in the model without an adapter of a tensor that transformers or PEFT has stored.

    Args:
        stored: The stored name, with or without one of PEFT's prefixes.
    """
    return stored.removeprefix(PEFT_PREFIX).removeprefix(PROMPT_PREFIX)


def is_initialised_from_base(init: object) -> bool:
    """Return whether a LoRA was initialised from its base, which changed it: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA.

    Args:
        init: The value of `init_lora_weights` in its config.
    """
    return str(init).lower().startswith(BASE_CHANGING_INITS)


def subtract_initial_factors(
    adapter: Tensors, initial_factors: Tensors, config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Convert a LoRA that was initialised from its base with B₀·A₀ to a plain LoRA, B·A − B₀·A₀, of twice the rank.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        initial_factors: The tensors B₀ and A₀ of each module, by the names of B and A.
        config: The content of `adapter_config.json`.

    Returns:
        The tensors and the config of the plain LoRA, with the same scaling of each module.

    Raises:
        CheckpointError: The LoRA is a DoRA or adapts more than linear layers, or the tensors do not match.
    """
    if config.get("use_dora"):
        raise CheckpointError(
            f"a DoRA that was initialised from its base cannot be converted to a plain LoRA: {CONVERT_REMEDY}."
        )
    unsupported = sorted(name for name in adapter if ".lora_" in name and not name.endswith(PARTS[:2]))
    if unsupported:
        raise CheckpointError(
            f"a LoRA with {unsupported[0]!r} that was initialised from its base cannot be converted to a plain LoRA: "
            f"{CONVERT_REMEDY}."
        )
    tensors = {name: adapter[name] for name in adapter if ".lora_" not in name}
    for a_name in (name for name in adapter if name.endswith(PARTS[0])):
        b_name = a_name.removesuffix(PARTS[0]) + PARTS[1]
        if any(name not in stored for name in (a_name, b_name) for stored in (adapter, initial_factors)):
            raise CheckpointError(f"the initial adapter does not match the LoRA: {a_name!r} differs.")
        b, a = subtract_factors((adapter[b_name], adapter[a_name]), (initial_factors[b_name], initial_factors[a_name]))
        tensors |= {a_name: a, b_name: b}
    # keeps the scaling at twice the rank, which is alpha / rank, or alpha / √rank for rsLoRA
    alpha_factor = 2**0.5 if config.get("use_rslora") else 2
    changed = {
        "init_lora_weights": True,
        "r": 2 * config.get("r", 8),
        "lora_alpha": alpha_factor * config.get("lora_alpha", 8),
        "rank_pattern": {pattern: 2 * rank for pattern, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {
            pattern: alpha_factor * alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items()
        },
    }
    return tensors, {**config, **changed}
