"""How PEFT stores a LoRA, and one that took its start out of its base folded to what it amounts to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError
from regraft.weights import subtract_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    Tensors = Mapping[str, torch.Tensor]

ADAPTER = "default"  # the name under which PEFT holds the one adapter of a model here
START = "base_model.model."
FULL = "convert it to full (regraft adaptation convert)"
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
DETERMINED_INITS = ("true", "gaussian", "orthogonal", "pissa", "olora")  # need no data, and follow from base and seed


def model_name(stored: str) -> str:
    """Return the name in a model of a tensor as transformers, PEFT, or PEFT's prompt learning store it.

    Args:
        stored: The stored name.

    Returns:
        The name.
    """
    return stored.removeprefix(START).removeprefix("base_model.")


def is_initialised_from_base(init: object) -> bool:
    """Return whether a LoRA takes its start out of its base, and so means nothing without that base.

    Args:
        init: Its `init_lora_weights`.

    Returns:
        True for PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA.
    """
    return str(init).lower().startswith(BASE_CHANGING_INITS)


def fold_start(
    adapter: Tensors, start: Tensors, config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Make a plain LoRA of one that took its start B0·A0 out of its base: B·A − B0·A0, of twice the rank.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        start: Those of the adapter as it was initialised.
        config: The content of `adapter_config.json`.

    Returns:
        The tensors and the config of the plain LoRA; the scaling of each module is what it was.

    Raises:
        CheckpointError: It is a DoRA too, or the two do not go together.
    """
    if config.get("use_dora"):
        raise CheckpointError(f"a DoRA that took its start out of its base cannot be made a plain LoRA: {FULL}.")
    if others := sorted(name for name in adapter if ".lora_" in name and not name.endswith(PARTS[:2])):
        raise CheckpointError(f"a LoRA with {others[0]!r} that began in its base cannot be made a plain LoRA: {FULL}.")
    folded = {name: adapter[name] for name in adapter if ".lora_" not in name}
    for a_name in (name for name in adapter if name.endswith(PARTS[0])):
        b_name = a_name.removesuffix(PARTS[0]) + PARTS[1]
        if any(n not in side for n in (a_name, b_name) for side in (adapter, start)):
            raise CheckpointError(f"the LoRA's start does not go with it: {a_name!r} differs.")
        b, a = subtract_factors((adapter[b_name], adapter[a_name]), (start[b_name], start[a_name]))
        folded |= {a_name: a, b_name: b}
    wider = 2**0.5 if config.get("use_rslora") else 2
    changed = {
        "init_lora_weights": True,
        "r": 2 * config.get("r", 8),
        "lora_alpha": wider * config.get("lora_alpha", 8),
        "rank_pattern": {pattern: 2 * rank for pattern, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {pattern: wider * alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items()},
    }
    return folded, {**config, **changed}
