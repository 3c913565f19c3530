"""The families of adapters that put virtual tokens before each text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG
from regraft.adaptation.families.peft_adapter import Peft
from regraft.adaptation.lora import ADAPTER_NAME
from regraft.errors import CheckpointError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.task import Head


class Prompt(Peft):
    """Prompts: embeddings of virtual tokens. The base of all families with virtual tokens."""

    needs_task_type = True

    def num_virtual_tokens(self, config: Mapping[str, Any]) -> int:
        """Return `num_virtual_tokens`."""
        return int(config.get("num_virtual_tokens") or 0)

    def read_config(self, adaptation: Adaptation, *, for_new_adapter: bool = False) -> Any:
        """Read the config with PEFT, without an initial text, for which PEFT would load the tokenizer that it names."""
        config = super().read_config(adaptation, for_new_adapter=for_new_adapter)
        if getattr(config, "prompt_tuning_init", None) == "TEXT":
            config.prompt_tuning_init = "RANDOM"
            config.prompt_tuning_init_text = None
            config.tokenizer_name_or_path = config.tokenizer_kwargs = None
        return config

    def check_settings(self, adaptation: Adaptation, base: Base, head: Head) -> None:
        """Check the settings as for any adapter, and that the virtual tokens fit a classifier of the base's depth."""
        super().check_settings(adaptation, base, head)
        config = adaptation.config
        file = f"{adaptation.path}/{ADAPTER_CONFIG}"
        if not config.get("num_virtual_tokens"):
            raise CheckpointError(f"{file}: num_virtual_tokens is missing. Download the folder again.")
        if config.get("num_transformer_submodules") not in (None, 1):
            raise MismatchError(
                f"{file}: num_transformer_submodules is {config['num_transformer_submodules']!r:.80}, not 1, so the "
                "adapter is not for a classifier. Use one that was tuned for the task."
            )
        layers = config.get("num_layers")
        if layers not in (None, base.config.num_hidden_layers):  # PEFT would ignore the surplus layers
            raise MismatchError(
                f"{adaptation.path}: is for a model with {layers} layers, {base.path} has "
                f"{base.config.num_hidden_layers}: tensors would not be loaded. Was it tuned on that base?"
            )

    def make_trainable(self, adapted: Any, config: Any) -> None:
        """Make stored virtual tokens trainable, which PEFT refuses to do when it loads them."""
        config.inference_mode = False
        self.skip_projection(adapted.prompt_encoder[ADAPTER_NAME], config)
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("prompt_encoder." in name or ".modules_to_save." in name)

    def skip_projection(self, encoder: Any, config: Any) -> None:
        """Skip the network that computed the virtual tokens, which is not saved: they are tuned directly."""


class Prefix(Prompt):
    """Prefixes: keys and values of virtual tokens for every layer."""

    def check_settings(self, adaptation: Adaptation, base: Base, head: Head) -> None:
        """Check the settings as for any prompt, and that keys and values have the base's number of heads."""
        super().check_settings(adaptation, base, head)
        expected = getattr(base.config, "num_key_value_heads", None) or base.config.num_attention_heads
        heads = adaptation.config.get("num_attention_heads")
        if heads not in (None, expected):
            raise MismatchError(
                f"{adaptation.path}/{ADAPTER_CONFIG}: num_attention_heads is {heads!r}, but keys and values of "
                f"{base.path} have {expected} heads. Was it tuned on that base?"
            )

    def skip_projection(self, encoder: Any, config: Any) -> None:
        """Make PEFT use the stored keys and values directly."""
        encoder.prefix_projection = config.prefix_projection = False


class PTuning(Prompt):
    """P-tuning: embeddings of virtual tokens that were computed by a small network."""

    def skip_projection(self, encoder: Any, config: Any) -> None:
        """Replace the network by the identity."""
        import torch

        encoder.encoder_type = "MLP"
        encoder.mlp_head = torch.nn.Identity()
