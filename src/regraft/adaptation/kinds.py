"""The kinds of adaptation that can be tuned afresh, each with the settings its field uses."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adaptation import SHORT_NAMES
from regraft.errors import CheckpointError, KindError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftConfig

    from regraft.adaptation.adaptation import Adaptation
    from regraft.adaptation.bottleneck import BottleneckConfig
    from regraft.base import Base

    Config = PeftConfig | BottleneckConfig

LORAS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
KINDS = ("full", *LORAS, "ia3", "prefix", "prompt", "layernorm", "bottleneck", "pfeiffer")
DETERMINED_INITS = ("true", "gaussian", "orthogonal", "pissa", "olora")

WIDEST = 4  # a larger adapter has more numbers than the layer that it is put on


def new_config(
    kind: str, base: Base, *, rank: int = 8, inner_size: int = 24, virtual_tokens: int = 20, **bottleneck: Any
) -> Config | None:
    """Set up a kind of adaptation for a base.

    Args:
        kind: One of `KINDS`.
        base: The base.
        rank: A LoRA's rank; its alpha is twice that.
        inner_size: The width of bottleneck adapters.
        virtual_tokens: How many a prefix or a prompt has.
        bottleneck: Further fields of `BottleneckConfig`.

    Returns:
        PEFT's config, or ours for bottleneck adapters; None for `full`.

    Raises:
        RecipeError: There is no such kind, a number is out of its range, or the architecture cannot take it.
    """
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        raise RecipeError(
            f"there is no kind {kind!r}; there are {', '.join(KINDS)}.{f' Did you mean {close[0]}?' if close else ''}"
        )
    for what, number in (("a LoRA's rank", rank), ("the number of virtual tokens", virtual_tokens)):
        if number < 1:
            raise RecipeError(f"{what} is at least 1, found {number}.")
    if kind == "full":
        return None
    widest = max((min(info.shape) for info in base.checkpoint.tensors.values() if len(info.shape) == 2), default=0)
    for what, number in (("a LoRA's rank", rank), ("a bottleneck's inner size", inner_size)):
        if number > WIDEST * widest:
            raise RecipeError(f"{what} is up to {WIDEST} times the width of {base.path}, {widest:,}; found {number:,}.")
    if kind in ("bottleneck", "pfeiffer"):
        from regraft.adaptation.bottleneck import BottleneckConfig

        placement = "pfeiffer" if kind == "pfeiffer" else "houlsby"
        return BottleneckConfig(**{"inner_size": inner_size, "placement": placement, **bottleneck})
    if kind in ("prefix", "prompt"):
        return _prompt_config(kind, base, virtual_tokens)
    from peft import IA3Config, LNTuningConfig, LoraConfig

    if kind == "ia3":
        return IA3Config(task_type="SEQ_CLS", **_ia3_targets(base))
    if kind == "layernorm":
        norms = {n.rpartition(".")[2] for n, module in base.bare.named_modules() if "Norm" in type(module).__name__}
        return LNTuningConfig(task_type="SEQ_CLS", target_modules=sorted(norms))
    turned = any(type(module).__name__ == "Conv1D" for module in base.bare.modules())  # GPT-2's weights are [in, out]
    return LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=turned,
        **LORAS[kind],
    )


def read_config(adaptation: Adaptation, *, afresh: bool = False) -> Config:
    """Read how an adaptation was set up.

    Args:
        adaptation: Any but a full fine-tune.
        afresh: Whether a fresh one like it is made: a start that needs data is then replaced by the usual one.

    Returns:
        PEFT's config, or ours.

    Raises:
        CheckpointError: PEFT cannot read it.
    """
    from peft import PeftConfig

    from regraft.adaptation.bottleneck import BottleneckConfig

    if adaptation.kind == "bottleneck":
        return BottleneckConfig.from_dict(adaptation.config, f"{adaptation.path}/adapter_config.json")
    try:
        config: Any = PeftConfig.from_pretrained(str(adaptation.path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{adaptation.path}/adapter_config.json: PEFT cannot read it ({error}).") from error
    if getattr(config, "prompt_tuning_init", None) == "TEXT":  # has PEFT load whatever tokenizer it names
        config.prompt_tuning_init, config.prompt_tuning_init_text = "RANDOM", None
        config.tokenizer_name_or_path = config.tokenizer_kwargs = None
    if afresh and str(getattr(config, "init_lora_weights", True)).lower() not in DETERMINED_INITS:
        config.init_lora_weights = True
    return config  # type: ignore[no-any-return]


def check_start(adaptation: Adaptation) -> None:
    """Refuse a LoRA that took its start out of its base in a way that cannot be repeated.

    Args:
        adaptation: The tuned weights.

    Raises:
        CheckpointError: Its start cannot be found again from the base alone, so neither can what it changed.
    """
    init = adaptation.config.get("init_lora_weights")
    if adaptation.changed_base and str(init).lower() not in DETERMINED_INITS:
        raise CheckpointError(
            f"{adaptation.path}: the LoRA was initialised by {init!r}, which took a start out of its base that cannot "
            "be found again. Merge it with its start: regraft weights merge-lora --start."
        )


def kind_of(config: Config | None) -> str:
    """Name the kind of adaptation that a config sets up, as `Adaptation.kind` does.

    Args:
        config: PEFT's, ours or None.

    Returns:
        The kind.
    """
    kind = str(config.to_dict()["peft_type"]).rpartition(".")[2].lower() if config is not None else "full"
    return SHORT_NAMES.get(kind, kind)


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


def _prompt_config(kind: str, base: Base, virtual_tokens: int) -> Config:
    import inspect

    from peft import PrefixTuningConfig, PromptTuningConfig

    if kind == "prefix" and "past_key_values" not in inspect.signature(base.bare.forward).parameters:
        raise KindError(f"a {base.config.model_type} takes no prefix (past_key_values). Choose prompt, or lora.")
    if virtual_tokens >= base.longest:
        raise RecipeError(
            f"{virtual_tokens} virtual tokens leave no room in the {base.longest} that {base.path} takes."
        )
    sizes: dict[str, Any] = {}
    if "hidden_size" not in base.config.to_dict():  # PEFT looks for BERT's names only
        sizes = {
            "token_dim": base.config.hidden_size,
            "num_layers": base.config.num_hidden_layers,
            "num_attention_heads": base.config.num_attention_heads,
        }
    make: Any = PrefixTuningConfig if kind == "prefix" else PromptTuningConfig
    return make(task_type="SEQ_CLS", num_virtual_tokens=virtual_tokens, **sizes)  # type: ignore[no-any-return]


def _ia3_targets(base: Base) -> dict[str, Any]:
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    from regraft.adaptation.bottleneck import AFTER_FEED_FORWARD

    if base.config.model_type in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        return {}
    feed_forward = f".*{AFTER_FEED_FORWARD}"
    return {
        "target_modules": rf"(.*\.(key|value|k_lin|v_lin|k_proj|v_proj)$|{feed_forward})",
        "feedforward_modules": feed_forward,
    }
