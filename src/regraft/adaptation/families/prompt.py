"""Adapters that put virtual tokens before every text: prompts and prefixes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG
from regraft.adaptation.families.peft_adapter import Peft
from regraft.adaptation.lora import ADAPTER
from regraft.errors import CheckpointError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.task import Head


class Prompt(Peft):
    """Virtual tokens, as embeddings or as what attention makes of them."""

    needs_task_type = True

    def virtual_tokens(self, config: Mapping[str, Any]) -> int:
        """Return `num_virtual_tokens`."""
        return int(config.get("num_virtual_tokens") or 0)

    def read_config(self, adaptation: Adaptation, *, afresh: bool = False) -> Any:
        """Have PEFT read it, without a text that it began with: PEFT loads whatever tokenizer is named for that."""
        config = super().read_config(adaptation, afresh=afresh)
        if getattr(config, "prompt_tuning_init", None) == "TEXT":
            config.prompt_tuning_init, config.prompt_tuning_init_text = "RANDOM", None
            config.tokenizer_name_or_path = config.tokenizer_kwargs = None
        return config

    def check_settings(self, adaptation: Adaptation, base: Base, head: Head) -> None:
        """Refuse virtual tokens that are for a model of another depth, too."""
        super().check_settings(adaptation, base, head)
        config, where = adaptation.config, f"{adaptation.path}/{ADAPTER_CONFIG}"
        if not config.get("num_virtual_tokens"):
            raise CheckpointError(f"{where}: num_virtual_tokens is missing.")
        if config.get("num_transformer_submodules") not in (None, 1):
            raise MismatchError(f"{where}: num_transformer_submodules is not 1: it is not for a classifier.")
        layers = config.get("num_layers")
        if layers not in (None, base.config.num_hidden_layers):  # PEFT would drop what is for the others
            raise MismatchError(
                f"{adaptation.path}: was made for a model of {layers} layers, {base.path} has "
                f"{base.config.num_hidden_layers}: tensors would be left without a place."
            )

    def make_trainable(self, adapted: Any, config: Any) -> None:
        """Have stored virtual tokens tuned further, which PEFT refuses where it loads them."""
        config.inference_mode = False
        self.skip_projection(adapted.prompt_encoder[ADAPTER], config)
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("prompt_encoder." in name or ".modules_to_save." in name)

    def skip_projection(self, encoder: Any, config: Any) -> None:
        """Take out what made the virtual tokens of smaller ones, and was not saved: they are tuned themselves."""


class Prefix(Prompt):
    """Keys and values of virtual tokens, for every layer."""

    def check_settings(self, adaptation: Adaptation, base: Base, head: Head) -> None:
        """Refuse keys and values of another number of heads, too."""
        super().check_settings(adaptation, base, head)
        expected = getattr(base.config, "num_key_value_heads", None) or base.config.num_attention_heads
        heads = adaptation.config.get("num_attention_heads")
        if heads not in (None, expected):
            raise MismatchError(
                f"{adaptation.path}/{ADAPTER_CONFIG}: num_attention_heads is {heads!r}, and keys and values of "
                f"{base.path} have {expected} heads. Was it tuned on that base?"
            )

    def skip_projection(self, encoder: Any, config: Any) -> None:
        """Have PEFT read the stored keys and values as they are."""
        encoder.prefix_projection = config.prefix_projection = False


class PTuning(Prompt):
    """Embeddings of virtual tokens that a small network made."""

    def skip_projection(self, encoder: Any, config: Any) -> None:
        """Put nothing in the place of the network."""
        import torch

        encoder.encoder_type, encoder.mlp_head = "MLP", torch.nn.Identity()
