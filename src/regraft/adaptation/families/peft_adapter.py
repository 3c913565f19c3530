"""The family of adapters that PEFT loads and saves, apart from LoRAs and prompts."""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, write_adapter_config
from regraft.adaptation.families.adapter import Adapter
from regraft.adaptation.fresh import fresh_model
from regraft.adaptation.lora import ADAPTER_NAME, DETERMINED_INITS, PEFT_PREFIX
from regraft.errors import MAX_LISTED, CheckpointError, KindError, MismatchError, RecipeError
from regraft.progress import quiet
from regraft.weights import is_optional

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.checkpoint.derived import Tensors
    from regraft.task import Head
    from regraft.upgrade import Upgrade
    from regraft.weights import RowMatch


class Peft(Adapter):
    """An adapter of a type without a family of its own."""

    def config_class(self, config: Mapping[str, Any]) -> Any:
        """Return PEFT's config class of the type."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        return PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]

    def read_config(self, adaptation: Adaptation, *, for_new_adapter: bool = False) -> Any:
        """Read the config with PEFT."""
        from peft import PeftConfig

        try:
            config: Any = PeftConfig.from_pretrained(str(adaptation.path))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{adaptation.path}/{ADAPTER_CONFIG}: PEFT cannot read it ({error}).") from error
        if for_new_adapter and str(getattr(config, "init_lora_weights", True)).lower() not in DETERMINED_INITS:
            config.init_lora_weights = True
        return config

    def attach_adapter(
        self, model: Any, base: Base, head: Head, config: Any, heads: Sequence[str], modules: Sequence[str]
    ) -> Any:
        """Wrap the model with PEFT."""
        from peft import get_peft_model

        config = copy.deepcopy(config)
        config.task_type = head.type.peft_task_type
        config.inference_mode = False
        config.modules_to_save = modules
        config.base_model_name_or_path = base.name
        with quiet():
            try:
                return get_peft_model(model, config, adapter_name=ADAPTER_NAME)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise KindError(f"{base.path}: PEFT cannot put {config.peft_type} on it ({error}).") from error

    def load_adapter(
        self, model: Any, adaptation: Adaptation, head: Head, *, trainable: bool
    ) -> tuple[Any, dict[str, torch.Tensor], Tensors]:
        """Load the adapter with PEFT, which silently ignores tensors that do not fit."""
        from peft import PeftModel

        config = self.read_config(adaptation)
        with quiet():
            try:
                adapted: Any = PeftModel.from_pretrained(
                    model,
                    str(adaptation.path),
                    adapter_name=ADAPTER_NAME,
                    config=config,
                    is_trainable=trainable and not adaptation.num_virtual_tokens,
                    ignore_mismatched_sizes=True,
                )
                if trainable:
                    self.make_trainable(adapted, config)
                state = peft_state(adapted)
                absent = adaptation.checkpoint.tensors.keys() - state.keys()
                if absent:
                    # embeddings to which a LoRA is applied, or that have more rows than the base's
                    with_embeddings = peft_state(adapted, embeddings=True)
                    state |= {name: with_embeddings[name] for name in absent if name in with_embeddings}
            except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, OSError, ImportError) as error:
                raise MismatchError(
                    f"{adaptation.path}: PEFT cannot load it on {model.config.name_or_path} with {head}: "
                    f"{str(error).strip()[:400]}"
                ) from error
        return adapted, state, self.stored_tensors(adaptation, adapted)

    def make_trainable(self, adapted: Any, config: Any) -> None:
        """Make a loaded adapter trainable where PEFT does not; nothing to do for most types."""

    def stored_tensors(self, adaptation: Adaptation, adapted: Any) -> Tensors:
        """Return the stored tensors under PEFT's names in the model."""
        return adaptation.checkpoint

    def save(self, model: Any, base: Base, folder: Path, initial_factors: Tensors) -> None:
        """Write the adapter with PEFT, including embeddings only if they differ from the base's."""
        config = model.peft_config[ADAPTER_NAME]
        config.base_model_name_or_path = base.name
        config.modules_to_save = sorted(set(config.modules_to_save or ())) or None
        model.save_pretrained(str(folder), save_embedding_layers=_are_embeddings_tuned(model, base))
        (folder / "README.md").unlink(missing_ok=True)  # the outcome has a model card with its scores
        write_adapter_config(folder, json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))

    def remove_delta(self, model: Any, upgrade: Upgrade, row_match: RowMatch | None) -> Any:
        """Remove the adapter."""
        return model.unload()

    def tunes_module_weight(self, module: str, base: Base) -> bool:
        """Return whether the module is PEFT's tuned copy of a module that is saved in full, such as the head."""
        return f".modules_to_save.{ADAPTER_NAME}" in module

    def parameter_names(self, model: Any) -> dict[str, str]:
        """Return the names of the parameters by their stored names, which lack the adapter's name."""
        return {name.replace(f".{ADAPTER_NAME}.", "."): name for name, _ in model.named_parameters()}

    def merge(self, adaptation: Adaptation, model: Any, old: Base, head: Head) -> Any:
        """Merge the adapter with PEFT, and copy the merged weights into a plain model."""
        import torch

        if not hasattr(model, "merge_adapter") or adaptation.num_virtual_tokens:
            return super().merge(adaptation, model, old, head)
        model.float()  # a base in bfloat16 would round the sum
        with quiet():
            try:
                model.merge_adapter(safe_merge=True)
            except (ValueError, AttributeError, NotImplementedError) as error:
                raise RecipeError(f"{adaptation.path}: PEFT cannot merge a {adaptation.kind} ({error}).") from error
            merged = fresh_model(old, head, 0)
            merged.config.pad_token_id = model.config.pad_token_id  # the head reads the same token as with the adapter
            state = _merged_state(model)
            bare = merged.state_dict()
            unmatched = sorted(state.keys() ^ bare.keys())
            if unmatched:
                raise RecipeError(
                    f"{adaptation.path}: merged by PEFT, it is not a full fine-tune of {old.path}: {len(unmatched)} "
                    f"tensors are in one of them only ({', '.join(unmatched[:MAX_LISTED])}). It can be recycled, but "
                    "not converted."
                )
            inner = {name: name.removeprefix(old.prefix + ".") for name in bare if name.startswith(old.prefix + ".")}
            if all(torch.equal(state[name], bare[name]) for name in inner if not is_optional(inner[name])):
                raise MismatchError(f"{adaptation.path}: it changes nothing in {old.path}. Was it ever tuned?")
            merged.load_state_dict(state)
        return merged


def peft_state(model: Any, *, embeddings: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that PEFT stores.

    Args:
        model: A PEFT model.
        embeddings: Whether to include the base's embeddings even if they are not among the modules that are tuned.

    Returns:
        The tensors by stored name.
    """
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=ADAPTER_NAME, save_embedding_layers=embeddings
    )
    return state


def _are_embeddings_tuned(model: Any, base: Base) -> bool:
    """Return whether embeddings to which a LoRA is applied differ from the base's, so that they must be stored."""
    import torch

    layer = model.get_input_embeddings()
    if not hasattr(layer, "base_layer"):
        return False
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    inner = f"{names[id(layer)]}.weight".removeprefix(f"{base.prefix}.")
    weight = layer.base_layer.weight.detach().cpu()
    return inner in base.parameters and not torch.equal(weight, base.parameters[inner].to(weight.dtype))


def _merged_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a merged PEFT model under their plain names; PEFT's `unload` would lose heads."""
    state = model.state_dict().items()  # some kinds, such as VeRA, have shared tensors outside the model
    wrapped = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state if name.startswith(PEFT_PREFIX)}
    adapted_layers = {name[: match.start()] for name in wrapped for match in re.finditer(r"\.base_layer(?=\.)", name)}

    def is_adapter_tensor(name: str) -> bool:
        """Return whether a tensor is in a wrapper, but not in the layer that it wraps."""
        path = name.split(".")
        return any(
            ".".join(path[:depth]) in adapted_layers and path[depth] != "base_layer" for depth in range(1, len(path))
        )

    plain = {}
    for name, tensor in wrapped.items():
        if is_adapter_tensor(name) or ".original_module." in name:
            continue
        plain_name = name.replace(f".modules_to_save.{ADAPTER_NAME}.", ".").replace(".token_adapter.", ".")
        while ".base_layer." in plain_name:  # wrappers of several parameters of a module are nested
            plain_name = plain_name.replace(".base_layer.", ".")
        plain[plain_name] = tensor
    return plain
