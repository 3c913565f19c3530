"""The kinds of adaptation that can be tuned, and the configs of new adapters of each kind."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeAlias

from regraft.adaptation.bottleneck_config import AFTER_FEED_FORWARD, DEFAULT_INNER_SIZE, BottleneckConfig
from regraft.adaptation.lora import PEFT_DEFAULT_RANK
from regraft.errors import KindError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft import PeftConfig

    from regraft.base import Base
    from regraft.task import Head

    Config: TypeAlias = PeftConfig | BottleneckConfig

SHORT_NAMES = {"prefix_tuning": "prefix", "prompt_tuning": "prompt", "p_tuning": "p-tuning", "ln_tuning": "layernorm"}
"""The kinds whose names differ from PEFT's type in lower case, by that type."""
# a LoRA of half its layer's width already has as many parameters as the layer; the margin beyond that is arbitrary
MAX_SIZE_RATIO = 4
"""The largest rank or inner size, as a multiple of the base's width."""
DEFAULT_RANK = PEFT_DEFAULT_RANK
DEFAULT_VIRTUAL_TOKENS = 20  # arbitrary: more virtual tokens fit more, but leave less room for text


@dataclasses.dataclass(frozen=True)
class AdapterSize:
    """The task type of an adapter, and the sizes that its kind may use.

    Args:
        task_type: PEFT's name of the task type.
        rank: The rank of a LoRA. Alpha is twice the rank.
        inner_size: The width of bottleneck adapters.
        virtual_tokens: The number of virtual tokens of a prefix or a prompt.
    """

    task_type: str
    rank: int
    inner_size: int
    virtual_tokens: int


def new_config(
    kind: str,
    base: Base,
    head: Head,
    *,
    rank: int = DEFAULT_RANK,
    inner_size: int = DEFAULT_INNER_SIZE,
    virtual_tokens: int = DEFAULT_VIRTUAL_TOKENS,
) -> Config | None:
    """Return the config of a new adaptation of a base.

    Args:
        kind: One of `KINDS`.
        base: The base to tune, whose architecture and width the config depends on.
        head: The task's head.
        rank: The rank of a LoRA. Alpha is twice the rank.
        inner_size: The width of bottleneck adapters.
        virtual_tokens: The number of virtual tokens of a prefix or a prompt.

    Returns:
        A config of PEFT, or of regraft for bottleneck adapters; None for `full`.

    Raises:
        RecipeError: The kind is unknown, a size is below 1, the rank or the inner size is above `MAX_SIZE_RATIO` times
            the base's width, or the virtual tokens leave no room for text.
        KindError: The architecture does not support the kind.
    """
    if kind not in CONFIG_BUILDERS:
        raise RecipeError(f"there is no kind {kind!r}; the kinds are {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    for name, size in (("a LoRA's rank", rank), ("the number of virtual tokens", virtual_tokens)):
        if size < 1:
            raise RecipeError(f"{name} must be at least 1, found {size}.")
    build_config = CONFIG_BUILDERS[kind]
    if build_config is None:  # a full fine-tune
        return None
    matrix_sizes = [min(tensor.shape) for tensor in base.checkpoint.tensors.values() if len(tensor.shape) == 2]
    width = max(matrix_sizes, default=0)
    for name, size in (("a LoRA's rank", rank), ("a bottleneck's inner size", inner_size)):
        if size > MAX_SIZE_RATIO * width:
            raise RecipeError(
                f"{name} must be at most {MAX_SIZE_RATIO} times the width of {base.path}, {width:,}; found {size:,}."
            )
    return build_config(base, AdapterSize(head.type.peft_task_type, rank, inner_size, virtual_tokens))


def kind_of(peft_type: str) -> str:
    """Return the kind of adaptation of a PEFT type.

    Args:
        peft_type: The value of `peft_type` in `adapter_config.json`.
    """
    return SHORT_NAMES.get(peft_type.lower(), peft_type.lower())


def kind_of_config(config: Config | None) -> str:
    """Return the kind of the adaptations that a config describes.

    Args:
        config: A config of PEFT or regraft; None for `full`.
    """
    return "full" if config is None else kind_of(str(config.to_dict()["peft_type"]).rpartition(".")[2])


def json_settings(config: Config | None) -> Mapping[str, Any] | None:
    """Return the settings of a config that are not None, as JSON values that identify a run.

    Args:
        config: A config of PEFT or regraft; None for `full`.

    Returns:
        The settings by name, with sets as sorted lists and all other values as texts; None for `full`.
    """
    if config is None:
        return None
    return {
        str(name): sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))
        for name, value in config.to_dict().items()
        if value is not None
    }


def _lora_config(base: Base, size: AdapterSize, **settings: Any) -> Config:
    from peft import LoraConfig

    is_transposed = any(
        type(module).__name__ == "Conv1D" for module in base.classifier_body.modules()
    )  # GPT-2: [in, out]
    return LoraConfig(
        task_type=size.task_type,
        r=size.rank,
        lora_alpha=2 * size.rank,
        target_modules="all-linear",
        fan_in_fan_out=is_transposed,
        **settings,
    )


def _ia3_config(base: Base, size: AdapterSize) -> Config:
    from peft import IA3Config
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    if base.config.model_type in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        return IA3Config(task_type=size.task_type)
    feed_forward = f".*{AFTER_FEED_FORWARD}"
    return IA3Config(
        task_type=size.task_type,
        target_modules=rf"(.*\.(key|value|k_lin|v_lin|k_proj|v_proj)$|{feed_forward})",
        feedforward_modules=feed_forward,
    )


def _layernorm_config(base: Base, size: AdapterSize) -> Config:
    from peft import LNTuningConfig

    norms = {
        name.rpartition(".")[2]
        for name, module in base.classifier_body.named_modules()
        if "Norm" in type(module).__name__
    }
    return LNTuningConfig(task_type=size.task_type, target_modules=sorted(norms))


def _prefix_config(base: Base, size: AdapterSize) -> Config:
    from peft import PrefixTuningConfig

    if "past_key_values" not in inspect.signature(base.classifier_body.forward).parameters:
        raise KindError(f"{base.config.model_type} models take no prefix (past_key_values). Choose prompt or lora.")
    return PrefixTuningConfig(task_type=size.task_type, **_virtual_token_settings(base, size))


def _prompt_config(base: Base, size: AdapterSize) -> Config:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type=size.task_type, **_virtual_token_settings(base, size))


def _virtual_token_settings(base: Base, size: AdapterSize) -> dict[str, Any]:
    """Return the number of virtual tokens, and the sizes of a model in whose config PEFT does not find them.

    Raises:
        RecipeError: The virtual tokens leave no room for text.
    """
    if size.virtual_tokens >= base.max_input_length:
        raise RecipeError(
            f"{size.virtual_tokens} virtual tokens leave no room for text: {base.path} takes {base.max_input_length} "
            "tokens. Choose fewer."
        )
    settings: dict[str, Any] = {"num_virtual_tokens": size.virtual_tokens}
    if "hidden_size" not in base.config.to_dict():  # PEFT knows only the names of BERT's settings
        settings |= {
            "token_dim": base.config.hidden_size,
            "num_layers": base.config.num_hidden_layers,
            "num_attention_heads": base.config.num_attention_heads,
        }
    return settings


def _bottleneck_config(base: Base, size: AdapterSize, placement: str) -> Config:
    return BottleneckConfig(inner_size=size.inner_size, placement=placement, task_type=size.task_type)


CONFIG_BUILDERS: dict[str, Callable[[Base, AdapterSize], Config] | None] = {
    "full": None,
    "lora": _lora_config,
    "rslora": functools.partial(_lora_config, use_rslora=True),
    "dora": functools.partial(_lora_config, use_dora=True),
    "pissa": functools.partial(_lora_config, init_lora_weights="pissa"),
    "olora": functools.partial(_lora_config, init_lora_weights="olora"),
    "ia3": _ia3_config,
    "prefix": _prefix_config,
    "prompt": _prompt_config,
    "layernorm": _layernorm_config,
    "bottleneck": functools.partial(_bottleneck_config, placement="houlsby"),
    "pfeiffer": functools.partial(_bottleneck_config, placement="pfeiffer"),
}
KINDS = tuple(CONFIG_BUILDERS)
