"""Tuned models and adapters as folders of plain transformers and PEFT."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adaptation import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_lineage
from regraft.adaptation.lora import ADAPTER, START, fold_start
from regraft.adaptation.model import peft_state
from regraft.checkpoint import write_atomic, write_safetensors
from regraft.progress import quiet
from regraft.transformers_folder import read_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from regraft.base import Base


def save_model(model: Any, base: Base, labels: Sequence[str], into: Path) -> None:
    """Write a tuned model as a plain transformers or PEFT folder.

    A LoRA that took its start out of its base is written as the plain LoRA of twice the rank that it amounts to.

    Args:
        model: From `fresh_model`, `attach` or `load_model`.
        base: The base it lives on.
        labels: The label names, in the order of the head's outputs.
        into: The folder to fill.
    """
    from peft import PeftModel

    from regraft.adaptation.bottleneck import bottleneck_state

    with quiet():
        if isinstance(model, PeftModel):
            config: Any = model.peft_config[ADAPTER]
            config.base_model_name_or_path = base.name
            config.modules_to_save = sorted(set(config.modules_to_save or ())) or None
            model.save_pretrained(str(into), save_embedding_layers=_are_embeddings_tuned(model, base))
            (into / "README.md").unlink(missing_ok=True)  # the outcome has a model card with figures in it
            stored = json.loads((into / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            if hasattr(model, "regraft_start"):
                write_adapter(into, *fold_start(peft_state(model), model.regraft_start, stored))
            else:
                _write_config(into, stored)
        elif hasattr(model, "bottleneck_config"):
            settings = {**model.bottleneck_config.to_dict(), "base_model_name_or_path": base.name}
            write_adapter(into, {START + name: t for name, t in bottleneck_state(model).items()}, settings)
        else:
            model.save_pretrained(into)
    write_tokenizer(base, into)
    write_lineage(into, base, labels)


def _are_embeddings_tuned(model: Any, base: Base) -> bool:
    """Return whether the embeddings under a LoRA are others than the base's: then they belong to the adapter."""
    import torch

    layer = model.get_input_embeddings()
    if not hasattr(layer, "base_layer"):
        return False
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    inner = f"{names[id(layer)]}.weight".removeprefix(f"{base.prefix}.")
    weight = layer.base_layer.weight.detach().cpu()
    return inner in base.parameters and not torch.equal(weight, base.parameters[inner].to(weight.dtype))


def write_adapter(into: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter in PEFT's layout.

    Args:
        into: The folder to fill.
        tensors: By stored name.
        config: The content of `adapter_config.json`.
    """
    into.mkdir(parents=True, exist_ok=True)
    write_safetensors(into / ADAPTER_WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()})
    _write_config(into, config)


def write_tokenizer(base: Base, into: Path) -> None:
    """Write a base's tokenizer beside tuned weights; a full fine-tune of a decoder has it pad with what its head skips.

    Args:
        base: The base.
        into: The folder, with its `config.json` if it is a full fine-tune.
    """
    from transformers import AutoConfig

    # not the one that texts were encoded with: encoding changes settings of a tokenizer
    tokenizer = copy.deepcopy(base.own_tokenizer) if base.own_tokenizer else read_tokenizer(base.path)
    if base.is_decoder and (into / "config.json").is_file():
        padding = AutoConfig.from_pretrained(into, trust_remote_code=False).get_text_config().pad_token_id
        if padding in tokenizer.all_special_ids:  # any other token would be split off from texts once it is special
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    tokenizer.save_pretrained(into)


def _write_config(into: Path, config: Mapping[str, Any]) -> None:
    """Write PEFT's settings; what it holds as sets, and so writes in an order that changes from run to run, sorted."""
    sets = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
    ordered = {name: sorted(config[name]) for name in sets if isinstance(config.get(name), (list, set))}
    write_atomic(into / ADAPTER_CONFIG, json.dumps({**config, **ordered}, indent=2, sort_keys=True) + "\n")
