"""The families of adaptations, and functions that return the family of a PEFT type, a config or a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.families.bottleneck import Bottlenecks
from regraft.adaptation.families.full import Full
from regraft.adaptation.families.lora import Lora
from regraft.adaptation.families.peft_adapter import Peft
from regraft.adaptation.families.prompt import Prefix, Prompt, PTuning

if TYPE_CHECKING:
    from regraft.adaptation.adaptation import Family

FULL = Full()
PEFT = Peft()
PROMPT = Prompt()
BOTTLENECKS = Bottlenecks()
FAMILY_BY_PEFT_TYPE: dict[str, Family] = {
    "BOTTLENECK": BOTTLENECKS,
    "LORA": Lora(),
    "PREFIX_TUNING": Prefix(),
    "P_TUNING": PTuning(),
}
"""The families of single types; all other types belong to `PROMPT` or `PEFT`."""


def family_of(peft_type: str) -> Family | None:
    """Return the family of an adapter.

    Args:
        peft_type: The value of `peft_type` in its `adapter_config.json`.

    Returns:
        The family; None for a type that the installed PEFT lacks.
    """
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if peft_type in FAMILY_BY_PEFT_TYPE:
        return FAMILY_BY_PEFT_TYPE[peft_type]
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)  # type: ignore[call-overload]
    if config_class is None:
        return None
    return PROMPT if issubclass(config_class, PromptLearningConfig) else PEFT


def family_of_config(config: Any) -> Family:
    """Return the family of the adaptations that a config describes.

    Args:
        config: A config of PEFT or regraft; None for a full fine-tune.
    """
    if config is None:
        return FULL
    family = family_of(str(config.to_dict()["peft_type"]).rpartition(".")[2])
    assert family is not None  # PEFT knows the types of its configs
    return family


def family_of_model(model: Any) -> Family:
    """Return the family of a model in memory.

    Args:
        model: A model with a head, with or without an adapter.
    """
    from peft import PeftModel

    from regraft.adaptation.bottleneck import Bottleneck

    if isinstance(model, PeftModel):
        return family_of_config(model.active_peft_config)
    return BOTTLENECKS if any(isinstance(module, Bottleneck) for module in model.modules()) else FULL
