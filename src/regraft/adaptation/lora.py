"""PEFT's names for LoRAs, and the conversion of a LoRA that was initialised from its base to a plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError
from regraft.weights import subtract_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from regraft.checkpoint.derived import Tensors

ADAPTER_NAME = "default"
"""PEFT's name of the only adapter of a model."""
PEFT_PREFIX = "base_model.model."
"""PEFT's prefix of the names of stored tensors."""
PROMPT_PREFIX = "base_model."
"""PEFT's prefix of the heads that are stored with prompts and prefixes."""
A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"
TOKEN_ROWS_SUFFIX = ".trainable_tokens_delta"  # in spite of its name, it stores the rows, not their deltas
PEFT_DEFAULT_RANK = PEFT_DEFAULT_ALPHA = 8
"""The values of `r` and `lora_alpha` of a config that lacks them."""
CONVERT_REMEDY = "convert it to full (regraft adaptation convert)"
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""The beginnings of the names of initialisations that change the base's weights, such as by subtracting scaling·B·A."""
DETERMINED_INITS = ("true", "gaussian", "orthogonal", "pissa", "olora")
"""Initialisations, in lower case, that regraft repeats from the base and a seed. Most of the others need data too."""


def name_without_prefix(stored_name: str) -> str:
    """Return a stored tensor's name without PEFT's prefix: its name in the model to which the adapter was added.

    Args:
        stored_name: The name in a folder of transformers or PEFT.
    """
    return stored_name.removeprefix(PEFT_PREFIX).removeprefix(PROMPT_PREFIX)


def is_initialised_from_base(init: object) -> bool:
    """Return whether a LoRA's initialisation used and changed its base: PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA.

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
        CheckpointError: The LoRA is a DoRA or adapts more than linear layers, or a factor is in only one of the LoRA
            and its initial factors.
    """
    if config.get("use_dora"):
        raise CheckpointError(
            f"a DoRA that was initialised from its base cannot be converted to a plain LoRA: {CONVERT_REMEDY}."
        )
    unsupported = sorted(name for name in adapter if ".lora_" in name and not name.endswith((A_SUFFIX, B_SUFFIX)))
    if unsupported:
        raise CheckpointError(
            f"a LoRA with {unsupported[0]!r} that was initialised from its base cannot be converted to a plain LoRA: "
            f"{CONVERT_REMEDY}."
        )
    tensors = {name: adapter[name] for name in adapter if ".lora_" not in name}
    for a_name in (name for name in adapter if name.endswith(A_SUFFIX)):
        b_name = a_name.removesuffix(A_SUFFIX) + B_SUFFIX
        if b_name not in adapter:
            raise CheckpointError(f"the LoRA has {a_name!r}, but lacks {b_name!r}. Save it again with PEFT.")
        for name in (a_name, b_name):
            if name not in initial_factors:
                raise CheckpointError(f"{name!r} is in the LoRA, but not in its initial factors: {CONVERT_REMEDY}.")
        b, a = subtract_factors((adapter[b_name], adapter[a_name]), (initial_factors[b_name], initial_factors[a_name]))
        tensors |= {a_name: a, b_name: b}
    # the scaling is alpha / rank (rsLoRA: alpha / √rank); this factor keeps it when the rank doubles
    alpha_factor = 2**0.5 if config.get("use_rslora") else 2
    changed = {
        "init_lora_weights": True,
        "r": 2 * config.get("r", PEFT_DEFAULT_RANK),
        "lora_alpha": alpha_factor * config.get("lora_alpha", PEFT_DEFAULT_ALPHA),
        "rank_pattern": {pattern: 2 * rank for pattern, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {
            pattern: alpha_factor * alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items()
        },
    }
    return tensors, {**config, **changed}
