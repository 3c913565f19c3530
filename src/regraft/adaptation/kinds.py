"""The kinds of adaptation that can be tuned afresh, each with the settings its field uses."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from typing import TYPE_CHECKING, Any

from regraft.errors import KindError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft import PeftConfig

    from regraft.adaptation.bottleneck import BottleneckConfig
    from regraft.base import Base
    from regraft.task import Head

    Config = PeftConfig | BottleneckConfig

SHORT_NAMES = {"prefix_tuning": "prefix", "prompt_tuning": "prompt", "p_tuning": "p-tuning", "ln_tuning": "layernorm"}
WIDEST = 4  # a larger adapter has more numbers than the layer that it is put on


@dataclasses.dataclass(frozen=True)
class AdapterSize:
    """What adapters are for, and how large they are made.

    Args:
        task_type: PEFT's name of the type of task.
        rank: A LoRA's rank; its alpha is twice that.
        inner_size: The width of bottleneck adapters.
        virtual_tokens: How many a prefix or a prompt has.
    """

    task_type: str
    rank: int
    inner_size: int
    virtual_tokens: int


def new_config(
    kind: str, base: Base, head: Head, *, rank: int = 8, inner_size: int = 24, virtual_tokens: int = 20
) -> Config | None:
    """Set up a kind of adaptation for a base.

    Args:
        kind: One of `KINDS`.
        base: The base.
        head: What the task needs.
        rank: A LoRA's rank; its alpha is twice that.
        inner_size: The width of bottleneck adapters.
        virtual_tokens: How many a prefix or a prompt has.

    Returns:
        PEFT's config, or ours for bottleneck adapters; None for `full`.

    Raises:
        RecipeError: There is no such kind, a number is out of its range, or the architecture cannot take it.
    """
    if kind not in SET_UPS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        raise RecipeError(
            f"there is no kind {kind!r}; there are {', '.join(KINDS)}.{f' Did you mean {close[0]}?' if close else ''}"
        )
    for what, number in (("a LoRA's rank", rank), ("the number of virtual tokens", virtual_tokens)):
        if number < 1:
            raise RecipeError(f"{what} is at least 1, found {number}.")
    set_up = SET_UPS[kind]
    if set_up is None:
        return None
    widest = max((min(info.shape) for info in base.checkpoint.tensors.values() if len(info.shape) == 2), default=0)
    for what, number in (("a LoRA's rank", rank), ("a bottleneck's inner size", inner_size)):
        if number > WIDEST * widest:
            raise RecipeError(f"{what} is up to {WIDEST} times the width of {base.path}, {widest:,}; found {number:,}.")
    return set_up(base, AdapterSize(head.type.peft_type, rank, inner_size, virtual_tokens))


def kind_of(peft_type: str) -> str:
    """Return what regraft calls one of PEFT's types, or of its own.

    Args:
        peft_type: As in `adapter_config.json`.

    Returns:
        The kind, as in `Adaptation`.
    """
    return SHORT_NAMES.get(peft_type.lower(), peft_type.lower())


def kind_of_config(config: Config | None) -> str:
    """Name the kind of adaptation that a config sets up, as `Adaptation.kind` does.

    Args:
        config: PEFT's, ours or None.

    Returns:
        The kind.
    """
    return "full" if config is None else kind_of(str(config.to_dict()["peft_type"]).rpartition(".")[2])


def settings(config: Config | None) -> Mapping[str, Any] | None:
    """Return a config as JSON can hold it, to tell one run from another.

    Args:
        config: PEFT's, ours or None.

    Returns:
        What is set in it.
    """
    if config is None:
        return None
    return {
        str(name): sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))
        for name, value in config.to_dict().items()
        if value is not None
    }


def _lora(base: Base, setting: AdapterSize, **variant: Any) -> Config:
    from peft import LoraConfig

    turned = any(type(module).__name__ == "Conv1D" for module in base.bare.modules())  # GPT-2's weights are [in, out]
    return LoraConfig(
        task_type=setting.task_type,
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        target_modules="all-linear",
        fan_in_fan_out=turned,
        **variant,
    )


def _ia3(base: Base, setting: AdapterSize) -> Config:
    from peft import IA3Config
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    from regraft.adaptation.bottleneck import AFTER_FEED_FORWARD

    if base.config.model_type in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        return IA3Config(task_type=setting.task_type)
    feed_forward = f".*{AFTER_FEED_FORWARD}"
    return IA3Config(
        task_type=setting.task_type,
        target_modules=rf"(.*\.(key|value|k_lin|v_lin|k_proj|v_proj)$|{feed_forward})",
        feedforward_modules=feed_forward,
    )


def _layernorm(base: Base, setting: AdapterSize) -> Config:
    from peft import LNTuningConfig

    norms = {n.rpartition(".")[2] for n, module in base.bare.named_modules() if "Norm" in type(module).__name__}
    return LNTuningConfig(task_type=setting.task_type, target_modules=sorted(norms))


def _prefix(base: Base, setting: AdapterSize) -> Config:
    from peft import PrefixTuningConfig

    if "past_key_values" not in inspect.signature(base.bare.forward).parameters:
        raise KindError(f"a {base.config.model_type} takes no prefix (past_key_values). Choose prompt, or lora.")
    return PrefixTuningConfig(task_type=setting.task_type, **_virtual(base, setting))


def _prompt(base: Base, setting: AdapterSize) -> Config:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type=setting.task_type, **_virtual(base, setting))


def _virtual(base: Base, setting: AdapterSize) -> dict[str, Any]:
    """Return the number of virtual tokens, and sizes of the model where PEFT does not find them."""
    if setting.virtual_tokens >= base.longest:
        raise RecipeError(
            f"{setting.virtual_tokens} virtual tokens leave no room in the {base.longest} that {base.path} takes."
        )
    fields: dict[str, Any] = {"num_virtual_tokens": setting.virtual_tokens}
    if "hidden_size" not in base.config.to_dict():  # PEFT looks for BERT's names only
        fields |= {
            "token_dim": base.config.hidden_size,
            "num_layers": base.config.num_hidden_layers,
            "num_attention_heads": base.config.num_attention_heads,
        }
    return fields


def _bottleneck(base: Base, setting: AdapterSize, placement: str) -> Config:
    from regraft.adaptation.bottleneck import BottleneckConfig

    return BottleneckConfig(inner_size=setting.inner_size, placement=placement, task_type=setting.task_type)


SET_UPS: dict[str, Callable[[Base, AdapterSize], Config] | None] = {
    "full": None,
    "lora": _lora,
    "rslora": functools.partial(_lora, use_rslora=True),
    "dora": functools.partial(_lora, use_dora=True),
    "pissa": functools.partial(_lora, init_lora_weights="pissa"),
    "olora": functools.partial(_lora, init_lora_weights="olora"),
    "ia3": _ia3,
    "prefix": _prefix,
    "prompt": _prompt,
    "layernorm": _layernorm,
    "bottleneck": functools.partial(_bottleneck, placement="houlsby"),
    "pfeiffer": functools.partial(_bottleneck, placement="pfeiffer"),
}
KINDS = tuple(SET_UPS)
