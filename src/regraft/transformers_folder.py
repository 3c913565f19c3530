"""The config and the tokenizer of a transformers folder, read without running code from it."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import TOKENIZER_FILES, Checkpoint, read_json
from regraft.errors import MAX_LISTED, CheckpointError
from regraft.progress import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LAYER = re.compile(r"(?<!max_window_)layer|depth|stage|^n(um)?_blocks?$")  # max_window_layers is not a count
"""Matches the names of settings that are numbers of layers."""
# The largest open models have some 200 layers and 2,048 experts.
MAX_COUNTS = (
    (LAYER, 1024),
    (re.compile(r"expert|group"), 4096),
    (re.compile(r"label"), 100_000),
)
"""The limits of settings that are numbers of modules or labels, each with a pattern of their names."""
MIN_LAYER_LIMIT = 64  # arbitrary: so many layers are cheap to build, even if the files have fewer tensors
"""The number of layers that is always allowed."""
TUNED_SETTINGS = {
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
}
"""Settings that describe the tensors and the head of a fine-tune, rather than of its base."""
SIZE = re.compile(r"size|dim|vocab")
"""Matches the names of settings that are widths, such as `shared_expert_intermediate_size`, and so have no limit in
`MAX_COUNTS`: `check_model` checks the size of the whole model."""
HEADS = re.compile(r"heads$|^n_head$")
"""Matches the names of settings that are numbers of attention heads."""
MAX_TOKENIZER_BYTES = 64 * 1024**2  # the largest files of open models, with a million tokens, have some 60 MB
"""The largest tokenizer file that is read, in bytes."""
FILES_READ_WITH_TOKENIZER = ("config.json", "adapter_config.json", "additional_chat_templates/*")
"""Patterns of further files that transformers reads with a tokenizer."""
MAX_GROWTH = 1000  # arbitrary: normalizers of open models replace a character with one or a few
"""The largest factor by which a tokenizer's normalizer may lengthen a text."""
MAX_ADDITIONAL_PARAMETERS = 1 << 24  # for a head and a pooler
"""The number of parameters that a model may have beyond twice those in the files."""
MAX_REASON_LENGTH = 300  # arbitrary: a few lines of text
"""The number of characters that are quoted of an error of transformers."""


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Read the config of a checkpoint.

    Args:
        checkpoint: The checkpoint, whose folder has a config.json.

    Returns:
        The transformers config, with the defaults of its class.

    Raises:
        CheckpointError: The config is malformed, has a setting out of range, needs code from the folder, or describes
            too many modules.
    """
    import torch
    from transformers import AutoConfig

    file = checkpoint.folder / "config.json"
    stored_config = read_json(file)
    _check_config(stored_config, file, len(checkpoint))
    names = stored_config.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{file}: architectures is {names!r:.80}, not a list of class names.")
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # settings of wrong types raise many types of errors
        raise CheckpointError(f"{file}: transformers cannot read it ({_reason(error)}).") from error
    vars(config).pop("quantization_config", None)  # the checkpoint is read dequantised
    for rotary_settings in _rotary(getattr(config.get_text_config(), "rope_parameters", None)):
        rotary_settings.pop("type", None)  # the old name of `rope_type`, which current classes ignore
    config._attn_implementation = None  # the one in the config may not be installed
    if not isinstance(config.dtype, torch.dtype | None):
        raise CheckpointError(f"{file}: dtype is {config.dtype!r:.80}, which torch does not have. Correct it.")
    return config


def upgraded_settings(
    tuned: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any], *, is_decoder: bool, has_same_ids: bool
) -> dict[str, Any]:
    """Return the settings that a graft takes from the new base: the upgrade changed them, and tuning did not.

    Args:
        tuned: The config of the fine-tune.
        old: The config of the old base.
        new: The config of the new base.
        is_decoder: Whether the model is causal. Its classifier skips the padding token of the config, so `pad_token_id`
            is left out.
        has_same_ids: Whether all tokens have the same ids in all three; otherwise, the ids of tokens and the size of
            the vocabulary are left out.

    Returns:
        The changed settings; for a submodel with changed settings, all of its settings.
    """
    changed: dict[str, Any] = {}
    for key, value in new.items():
        is_id = not has_same_ids and (key.endswith("_token_id") or key == "vocab_size")
        if is_id or key in TUNED_SETTINGS or (key == "pad_token_id" and is_decoder):
            continue
        tuned_value: Any = tuned.get(key)
        old_value: Any = old.get(key)
        if key.endswith("_config") and all(isinstance(config, dict) for config in (tuned_value, old_value, value)):
            inner = upgraded_settings(tuned_value, old_value, value, is_decoder=is_decoder, has_same_ids=has_same_ids)
            if inner:
                changed[key] = {**tuned_value, **inner}
        elif value != old_value and tuned_value == old_value:
            changed[key] = value
    return changed


def check_model(auto_class: Any, checkpoint: Checkpoint) -> None:
    """Check that transformers can build a model of a checkpoint's config that is not far larger than the files.

    Args:
        auto_class: An auto class of transformers, such as `AutoModelForSequenceClassification`.
        checkpoint: The checkpoint, whose folder has a config.json.

    Raises:
        CheckpointError: The model has more than twice as many parameters as are stored, plus
            `MAX_ADDITIONAL_PARAMETERS`; or it cannot be built, such as a sequence classifier of a Mamba.
    """
    import torch

    config = read_config(checkpoint)
    file = checkpoint.folder / "config.json"
    if type(config) not in auto_class._model_mapping:
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise CheckpointError(
            f"{checkpoint.path}: transformers has no {config.model_type} for {kind}, which regraft needs. Carry its "
            "weights over by arithmetic (regraft weights graft)."
        )
    try:
        with quiet(), torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=False)
    except Exception as error:  # inconsistent settings raise many types of errors
        raise CheckpointError(f"{file}: transformers cannot build a model of it ({_reason(error)}).") from error
    num_described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    num_stored = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    if num_described > 2 * num_stored + MAX_ADDITIONAL_PARAMETERS:
        raise CheckpointError(
            f"{file}: describes a model of {num_described:,} parameters, but {checkpoint.path} has {num_stored:,}. Use "
            "the config.json that was saved with these weights."
        )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder.

    Args:
        folder: A folder with tokenizer files.

    Raises:
        CheckpointError: There is no tokenizer; transformers cannot read it or assumes tokens that it lacks; a file is
            too large; its normalizer lengthens texts too much; or its maximal length is invalid.
    """
    from transformers import AutoTokenizer

    config_file = folder / "tokenizer_config.json"
    check_sizes(folder)
    if config_file.is_file():
        read_json(config_file)  # refuses a malformed file
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # malformed files raise many types of errors
        raise CheckpointError(f"{folder}: transformers cannot read its tokenizer ({_reason(error)}).") from error
    vocabulary = set(tokenizer.get_vocab())
    if vocabulary <= set(tokenizer.all_special_tokens):  # transformers has built an empty tokenizer
        raise CheckpointError(f"{folder}: has no tokenizer. Copy the base's tokenizer files into it.")
    assumed = [] if config_file.is_file() else sorted(vocabulary - _stored_vocabulary(folder, vocabulary))
    if assumed:
        raise CheckpointError(
            f"{folder}: has no tokenizer_config.json, and transformers assumes special tokens that its tokenizer.json "
            f"lacks ({', '.join(map(repr, assumed[:MAX_LISTED]))}). Copy the file that was saved with it."
        )
    normalizer: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    growth = 1.0 if normalizer is None else _growth(json.loads(normalizer.__getstate__()))
    if growth > MAX_GROWTH:
        raise CheckpointError(f"{folder}: its tokenizer's normalizer makes texts up to {growth:,.0f} times as long.")
    max_length: Any = tokenizer.model_max_length
    if type(max_length) not in (int, float) or max_length != max_length // 1 or max_length < 1:
        raise CheckpointError(
            f"{config_file}: model_max_length is {max_length!r:.80}, not a whole number of tokens above 0. Correct it."
        )
    tokenizer.model_max_length = int(max_length)
    return tokenizer


def _rotary(parameters: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of rotary positions: one set, or one per type of layer."""
    candidates = (parameters, *parameters.values()) if isinstance(parameters, dict) else ()
    for settings in candidates:
        if isinstance(settings, dict) and "rope_type" in settings:
            yield settings


def check_sizes(folder: Path) -> None:
    """Check that no tokenizer file would take gigabytes of memory.

    Args:
        folder: A folder with tokenizer files.

    Raises:
        CheckpointError: A file is larger than `MAX_TOKENIZER_BYTES`.
    """
    for pattern in (*TOKENIZER_FILES, *FILES_READ_WITH_TOKENIZER):
        for file in folder.glob(pattern):
            num_bytes = file.stat().st_size if file.is_file() else 0
            if num_bytes > MAX_TOKENIZER_BYTES:
                raise CheckpointError(f"{file}: has {num_bytes:,} bytes; at most {MAX_TOKENIZER_BYTES:,} are read.")


def _growth(rule: dict[str, Any]) -> float:
    """Return the factor by which the normalizer of a tokenizer.json can lengthen a text."""
    if rule["type"] == "Sequence":
        return math.prod(map(_growth, rule["normalizers"]))
    if rule["type"] != "Replace":
        return 1
    replacement_length = len(rule["content"])
    replaced = rule["pattern"].get("String")
    if replaced is None:  # a regular expression may match the empty string before every character
        return 1 + replacement_length
    return max(1, replacement_length / max(len(replaced), 1))


def _check_config(config: dict[str, Any], file: Path, num_tensors: int) -> None:
    """Refuse settings that need code, are out of range or would build too many modules for a number of tensors."""
    for name, value in _settings(config):
        if name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"{file}: {name} is {value!r:.80}, code from the hub, which regraft does not run. Remove it."
            )
        if isinstance(value, int | float):
            is_invalid_dropout = "drop" in name and not 0 <= value <= 1
            has_no_heads = HEADS.search(name) is not None and not value >= 1
            if is_invalid_dropout or has_no_heads:
                raise CheckpointError(f"{file}: {name} is {value!r:.80}, which is out of range. Correct it.")
        if name == "chunk_size_feed_forward" and (type(value) is not int or value < 0):
            raise CheckpointError(
                f"{file}: {name} is {value!r:.80}, which is not a whole number, 0 or more. Set it to 0."
            )
        count = len(value) if name == "id2label" and isinstance(value, dict) else value
        for pattern, max_count in MAX_COUNTS:
            limit = max_count
            if pattern is LAYER:  # a layer has at least one tensor
                limit = min(max_count, max(num_tensors, MIN_LAYER_LIMIT))
            is_count = pattern.search(name) and not SIZE.search(name)
            if is_count and isinstance(count, int | float) and count > limit:
                raise CheckpointError(
                    f"{file}: {name} is {count:,}; with {num_tensors:,} tensors, at most {limit:,} is allowed. Use the "
                    "config.json that was saved with these weights."
                )


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config.json with their names, also from configs of submodels."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict) and name.endswith("config"):
            yield from _settings(value)


def _stored_vocabulary(folder: Path, vocabulary: set[str]) -> set[str]:
    """Return the tokens of tokenizer.json; without that file, the vocabulary that was read."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    return set(Tokenizer.from_file(str(file)).get_vocab()) if file.is_file() else vocabulary


def _reason(error: Exception) -> str:
    """Return an error's message in one line, without advice to run code from the folder."""
    if "trust_remote_code" in str(error):
        return "it needs code from the folder, which regraft does not run"
    return " ".join(str(error).split())[:MAX_REASON_LENGTH] or type(error).__name__
