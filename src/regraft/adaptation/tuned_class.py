"""The transformers class that a LoRA was tuned in, with its head, labels and tokens, inferred from the LoRA."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation.layout import WRAPPERS
from regraft.adaptation.lora import PEFT_PREFIX
from regraft.architecture import architecture_of
from regraft.checkpoint import read_json, shape_of
from regraft.errors import CheckpointError
from regraft.naming import class_name
from regraft.transformers_folder import read_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regraft.architecture import Architecture
    from regraft.checkpoint import Checkpoint
    from regraft.checkpoint.derived import Tensors

CLASS_TABLES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
"""The names of transformers' tables of classes, by PEFT's task types."""
FALLBACK_TASKS = ("MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
"""The tasks whose classes are tried after those that the LoRA and the base name."""
HEAD_WEIGHT = re.compile(r"^(?:classifier|score)\.(?:.*\.)?weight$")
"""Matches the names of the weights of classification heads."""


def tuned_architecture(
    adapter: Tensors, adapter_config: Mapping[str, Any], base: Checkpoint, output_names: Sequence[str] | None
) -> tuple[Architecture, dict[str, Any]]:
    """Return the class that a LoRA was tuned in.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        adapter_config: The content of `adapter_config.json`.
        base: The base, a transformers folder.
        output_names: The names of a classifier's outputs, if they are known.

    Returns:
        The class with the sizes that it had, and the settings of the base's `config.json` that differ.

    Raises:
        CheckpointError: The base has no config, or the LoRA's embeddings and heads differ in their number of tokens.
    """
    import transformers.models.auto.modeling_auto as auto

    if not base.path.is_dir() or not (base.path / "config.json").is_file():
        raise CheckpointError(f"{base.path}: has no config.json. Use a transformers folder to merge a LoRA into.")
    config = read_config(base)
    task_classes = getattr(auto, CLASS_TABLES.get(str(adapter_config.get("task_type")), ""), {})
    declared = [*filter(None, (task_classes.get(config.model_type), class_name(base, config)))]
    tables = [getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in FALLBACK_TASKS]
    fallbacks = [*filter(None, (table.get(config.model_type) for table in tables))]
    candidates = [*declared, None, *fallbacks] if declared or config.architectures else [*fallbacks, None]
    modules = {_module_of(name) for name in adapter}
    num_matches: dict[str | None, int] = {}
    for name in dict.fromkeys(candidates):
        num_matches[name] = len(modules & dict(architecture_of(config, name).model.named_modules()).keys())
        if num_matches[name] == len(modules):
            break
    name = max(num_matches, key=lambda candidate: num_matches[candidate])
    changed: dict[str, Any] = {}
    head_sizes = [
        shape_of(adapter, stored)[0] for stored in adapter if HEAD_WEIGHT.search(stored.removeprefix(PEFT_PREFIX))
    ]
    if head_sizes and name and name.endswith(("ForSequenceClassification", "ForTokenClassification")):
        hidden_size = getattr(config.get_text_config(), "hidden_size", 0)
        # layers of the head before the last one have the model's width
        num_labels = min([size for size in head_sizes if size != hidden_size] or head_sizes)
        names = output_names or [f"LABEL_{i}" for i in range(num_labels)]
        changed["id2label"] = {str(i): label for i, label in enumerate(names)}
        changed["label2id"] = {label: i for i, label in enumerate(names)}
        config = copy.deepcopy(config)
        config.id2label, config.label2id = dict(enumerate(names)), changed["label2id"]
    architecture = architecture_of(config, name)
    vocab_size = _tuned_vocab_size(adapter, architecture)
    if vocab_size is not None:
        config = copy.deepcopy(config)
        text_config: Any = config.get_text_config()
        text_config.vocab_size = vocab_size
        changed |= text_config_change(base, architecture, changed, "vocab_size", vocab_size)
        architecture = architecture_of(config, name)
    full_name = type(architecture.model).__name__
    if full_name != (config.architectures or [""])[0]:
        changed["architectures"] = [full_name]
    return architecture, changed


def text_config_change(
    base: Checkpoint, architecture: Architecture, changed: dict[str, Any], key: str, value: Any
) -> dict[str, Any]:
    """Return the change of a setting of the language model, which may have its own config inside `config.json`.

    Args:
        base: The base, a transformers folder.
        architecture: The class that was tuned.
        changed: The settings of the base's `config.json` that have been changed before.
        key: The setting.
        value: Its value.

    Returns:
        The settings of `config.json` to change.
    """
    config = read_json(base.path / "config.json") | changed
    change = {key: value}
    if architecture.config.get_text_config() is not architecture.config and "text_config" in config:
        change = {"text_config": {**config["text_config"], **change}}
        if key in config or key == "tie_word_embeddings":
            change[key] = value
    return change


def untied_by_setting(architecture: Architecture) -> set[str]:
    """Return the parameters that are tied only if `tie_word_embeddings` is true; other ties end if both are stored.

    Args:
        architecture: The class.
    """
    config = copy.deepcopy(architecture.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return architecture.ties.keys() - architecture_of(config, type(architecture.model).__name__).ties.keys()


def _module_of(stored: str) -> str:
    path = stored.removeprefix(PEFT_PREFIX).partition(".lora_")[0]
    return ".".join(part for part in path.split(".") if part not in {*WRAPPERS, "weight", "bias"})


def _tuned_vocab_size(adapter: Tensors, architecture: Architecture) -> int | None:
    """Return the vocabulary size of the tuned model; None if it is the base's or unknown.

    Raises:
        CheckpointError: The LoRA's embeddings and heads differ in their number of rows.
    """
    base_size = getattr(architecture.config.get_text_config(), "vocab_size", None)  # None if it reads no tokens
    sizes = set()
    for stored in adapter:
        name = f"{_module_of(stored)}.weight"
        if name in architecture.parameters and str(architecture.identify(name)) in architecture.token_tensors:
            if stored.endswith(".weight") and ".lora_A" not in stored:
                sizes.add(shape_of(adapter, stored)[0])
            elif stored.endswith(".lora_embedding_A"):
                sizes.add(shape_of(adapter, stored)[1])
    if len(sizes) > 1:
        raise CheckpointError(
            f"the LoRA has embeddings and heads of different numbers of rows, {sorted(sizes)}. Save it again after "
            "resize_token_embeddings, or merge it with PEFT (merge_and_unload)."
        )
    return None if sizes <= {base_size} else sizes.pop()
