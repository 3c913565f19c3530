"""The class of transformers that a LoRA was tuned in, told from its tensors: its head, its labels, its tokens."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation.layout import WRAPPERS
from regraft.adaptation.lora import START
from regraft.architecture import architecture_of
from regraft.checkpoint import read_json, shape_of
from regraft.errors import CheckpointError
from regraft.naming import class_name
from regraft.transformers_folder import read_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from regraft.architecture import Architecture
    from regraft.checkpoint import Checkpoint

    Tensors = Mapping[str, torch.Tensor]

TASKS = {  # PEFT's task types, by the transformers table of the classes that it has for them
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
HEAD = re.compile(r"^(?:classifier|score)\.(?:.*\.)?weight$")


def tuned_architecture(
    adapter: Tensors, config: Mapping[str, Any], base: Checkpoint, labels: Sequence[str] | None
) -> tuple[Architecture, dict[str, Any]]:
    """Find the class that a LoRA was tuned in.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.
        base: The base, a transformers folder.
        labels: The names of a classifier's labels, where they are known.

    Returns:
        The class, of the sizes that it was tuned with, and what the base's `config.json` must say otherwise.

    Raises:
        CheckpointError: The base has no config, or the LoRA's embeddings and heads differ in their number of tokens.
    """
    import transformers.models.auto.modeling_auto as auto

    if not base.path.is_dir() or not (base.path / "config.json").is_file():
        raise CheckpointError(f"{base.path}: has no config.json, which says what model a LoRA is merged into.")
    own = read_config(base)
    tasks = getattr(auto, TASKS.get(str(config.get("task_type")), ""), {})
    own_class = [*filter(None, (tasks.get(own.model_type), class_name(base, own)))]
    tables = ("MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    others = [*filter(None, (getattr(auto, f"MODEL_FOR_{t}_MAPPING_NAMES").get(own.model_type) for t in tables))]
    classes = [*own_class, None, *others] if own_class or own.architectures else [*others, None]
    modules = {_module_of(name) for name in adapter}
    fitting: dict[str | None, int] = {}
    for name in dict.fromkeys(classes):
        fitting[name] = len(modules & dict(architecture_of(own, name).model.named_modules()).keys())
        if fitting[name] == len(modules):
            break
    name = max(fitting, key=lambda candidate: fitting[candidate])
    changed: dict[str, Any] = {}
    heads = {n.removeprefix(START): shape_of(adapter, n)[0] for n in adapter if HEAD.search(n.removeprefix(START))}
    if heads and name and name.endswith(("ForSequenceClassification", "ForTokenClassification")):
        inner = getattr(own.get_text_config(), "hidden_size", 0)
        count = len(labels or ()) or min([n for n in heads.values() if n != inner] or heads.values())
        names = labels or [f"LABEL_{i}" for i in range(count)]
        changed["id2label"] = {str(i): label for i, label in enumerate(names)}
        changed["label2id"] = {label: i for i, label in enumerate(names)}
        own = copy.deepcopy(own)
        own.id2label, own.label2id = dict(enumerate(names)), changed["label2id"]
    architecture = architecture_of(own, name)
    rows = _vocabulary(adapter, architecture)
    if rows is not None:
        own = copy.deepcopy(own)
        text: Any = own.get_text_config()
        text.vocab_size = rows
        changed |= text_config_change(base, architecture, changed, "vocab_size", rows)
        architecture = architecture_of(own, name)
    full_name = type(architecture.model).__name__
    if full_name != (own.architectures or [""])[0]:
        changed["architectures"] = [full_name]
    return architecture, changed


def text_config_change(
    base: Checkpoint, architecture: Architecture, changed: dict[str, Any], key: str, value: Any
) -> dict[str, Any]:
    """Return the change of a setting of the language model, which may be in a config of its own.

    Args:
        base: The base, a transformers folder.
        architecture: The class that was tuned.
        changed: What is changed of the base's `config.json` already.
        key: The setting.
        value: Its value.

    Returns:
        What to change of `config.json`, what was changed beside it included.
    """
    settings = read_json(base.path / "config.json") | changed
    change = {key: value}
    if architecture.config.get_text_config() is not architecture.config and "text_config" in settings:
        change = {"text_config": {**settings["text_config"], **change}}
        if key in settings or key == "tie_word_embeddings":
            change[key] = value
    return change


def untied_by_setting(architecture: Architecture) -> set[str]:
    """Name what `tie_word_embeddings` unties; where it does not, transformers leaves what is stored twice as it is.

    Args:
        architecture: A class.

    Returns:
        The parameters that are tied to others only as long as the setting is true.
    """
    own = copy.deepcopy(architecture.config)
    own.tie_word_embeddings = own.get_text_config().tie_word_embeddings = False
    return architecture.ties.keys() - architecture_of(own, type(architecture.model).__name__).ties.keys()


def _module_of(stored: str) -> str:
    path = stored.removeprefix(START).partition(".lora_")[0]
    return ".".join(part for part in path.split(".") if part not in {*WRAPPERS, "weight", "bias"})


def _vocabulary(adapter: Tensors, architecture: Architecture) -> int | None:
    """Return how many tokens the tuned model has, where these are not the base's."""
    own = getattr(architecture.config.get_text_config(), "vocab_size", None)  # of models that read no tokens: none
    sizes = set()
    for stored in adapter:
        name = f"{_module_of(stored)}.weight"
        if name in architecture.parameters and str(architecture.identify(name)) in architecture.token_tensors:
            if stored.endswith((".weight", ".lora_B.weight")) and ".lora_A" not in stored:
                sizes.add(shape_of(adapter, stored)[0])
            elif stored.endswith(".lora_embedding_A"):
                sizes.add(shape_of(adapter, stored)[1])
    if len(sizes) > 1:
        raise CheckpointError(
            f"the LoRA holds embeddings or heads of {sorted(sizes)} rows, and one model has as many in each. Save it "
            "again where it was tuned, after resize_token_embeddings, or merge it there (merge_and_unload)."
        )
    return None if sizes <= {own} else sizes.pop()
