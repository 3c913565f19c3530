"""PEFT's names for LoRAs, and the conversion of a LoRA that was initialised from its base to a plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError
from regraft.weights import subtract_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    Tensors = Mapping[str, torch.Tensor]

ADAPTER = "default"  # PEFT's name of the only adapter of a model
PEFT_PREFIX = "base_model.model."
CONVERT_REMEDY = "convert it to full (regraft adaptation convert)"
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
DETERMINED_INITS = ("true", "gaussian", "orthogonal", "pissa", "olora")  # depend on base and seed only


def model_name(stored: str) -> str:
    """Return the name in the model of a tensor that transformers, PEFT, or PEFT's prompt learning has stored.

    Args:
        stored: The stored name.
    """
    return stored.removeprefix(PEFT_PREFIX).removeprefix("base_model.")


def is_initialised_from_base(init: object) -> bool:
    """Return whether a LoRA was initialised from its base, which changed it: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA.

    Args:
        init: Its `init_lora_weights`.
    """
    return str(init).lower().startswith(BASE_CHANGING_INITS)


def fold_start(
    adapter: Tensors, start: Tensors, config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Convert a LoRA that was initialised with B0·A0 from its base to a plain LoRA, B·A − B0·A0, of twice the rank.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        start: The tensors of the adapter as it was initialised.
        config: The content of `adapter_config.json`.

    Returns:
        The tensors and the config of the plain LoRA, with the same scaling of each module.

    Raises:
        CheckpointError: It is a DoRA, or the tensors do not match.
    """
    if config.get("use_dora"):
        raise CheckpointError(
            f"a DoRA that was initialised from its base cannot be converted to a plain LoRA: {CONVERT_REMEDY}."
        )
    if unsupported := sorted(name for name in adapter if ".lora_" in name and not name.endswith(PARTS[:2])):
        raise CheckpointError(
            f"a LoRA with {unsupported[0]!r} that was initialised from its base cannot be converted to a plain LoRA: "
            f"{CONVERT_REMEDY}."
        )
    folded = {name: adapter[name] for name in adapter if ".lora_" not in name}
    for a_name in (name for name in adapter if name.endswith(PARTS[0])):
        b_name = a_name.removesuffix(PARTS[0]) + PARTS[1]
        if any(name not in tensors for name in (a_name, b_name) for tensors in (adapter, start)):
            raise CheckpointError(f"the initial adapter does not match the LoRA: {a_name!r} differs.")
        b, a = subtract_factors((adapter[b_name], adapter[a_name]), (start[b_name], start[a_name]))
        folded |= {a_name: a, b_name: b}
    alpha_factor = 2**0.5 if config.get("use_rslora") else 2  # keeps the scaling at twice the rank
    changed = {
        "init_lora_weights": True,
        "r": 2 * config.get("r", 8),
        "lora_alpha": alpha_factor * config.get("lora_alpha", 8),
        "rank_pattern": {pattern: 2 * rank for pattern, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {
            pattern: alpha_factor * alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items()
        },
    }
    return folded, {**config, **changed}
