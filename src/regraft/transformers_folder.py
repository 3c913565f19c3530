"""Reading the config and the tokenizer of a transformers folder, without running code from it."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import TOKENIZER_FILES, Checkpoint, read_json
from regraft.errors import CheckpointError
from regraft.progress import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LAYER = re.compile(r"(?<!max_window_)layer|depth|stage|^n(um)?_blocks?$")  # max_window_layers is no number of layers
# numbers of modules that transformers would build; the largest open models have some 200 layers and 2,048 experts
MAX_COUNTS = (
    (LAYER, 1024),
    (re.compile(r"expert|group"), 4096),
    (re.compile(r"label"), 100_000),
)
# settings that describe the fine-tune's own tensors and head
TUNED_SETTINGS = {
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
}
SIZE = re.compile(r"size|dim|vocab")  # widths, such as shared_expert_intermediate_size, which the files limit
HEADS = re.compile(r"heads$|^n_head$")
MAX_TOKENIZER_BYTES = 64 * 1024**2  # the largest files of open models, with a million tokens, have some 60 MB
FILES_READ_WITH_TOKENIZER = ("config.json", "adapter_config.json", "additional_chat_templates/*")
MAX_GROWTH = 1000  # normalizers of open models replace a character by one or a few
MAX_ADDITIONAL_PARAMETERS = 1 << 24  # beyond twice those of the file, for a head and a pooler


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Read the config of a checkpoint.

    Args:
        checkpoint: The checkpoint.

    Returns:
        The transformers config, with its class's defaults.

    Raises:
        CheckpointError: transformers cannot read it, it needs code from the folder, or it has absurd sizes.
    """
    import torch
    from transformers import AutoConfig

    file = checkpoint.folder / "config.json"
    settings = read_json(file)
    _check_counts(settings, file, len(checkpoint))
    names = settings.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{file}: architectures is {names!r:.80}, not a list of class names.")
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # settings of wrong types raise many types of errors
        raise CheckpointError(f"{file}: transformers cannot read it ({_reason(error)}).") from error
    vars(config).pop("quantization_config", None)  # the checkpoint is read dequantised
    for rotary in _rotary(getattr(config.get_text_config(), "rope_parameters", None)):
        rotary.pop("type", None)  # the old name of `rope_type`, which current classes ignore
    config._attn_implementation = None  # it may not be installed here
    if not isinstance(config.dtype, torch.dtype | None):
        raise CheckpointError(f"{file}: dtype is {config.dtype!r:.80}, which torch lacks. Correct or remove it.")
    return config


def upgraded_settings(
    tuned: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any], *, is_decoder: bool, has_same_ids: bool
) -> dict[str, Any]:
    """Return the settings that a graft takes from the new base: those that the upgrade changed and tuning did not.

    Args:
        tuned: The settings of the fine-tune.
        old: The settings of the old base.
        new: The settings of the new base.
        is_decoder: Whether it is a causal model, whose classifier skips the padding token of its config.
        has_same_ids: Whether all tokens have the same ids in all three; otherwise, ids are left out.

    Returns:
        The settings. Of a submodel with changed settings, all settings are returned.
    """
    changed: dict[str, Any] = {}
    for key, value in new.items():
        is_id = not has_same_ids and (key.endswith("_token_id") or key == "vocab_size")
        if is_id or key in TUNED_SETTINGS or (key == "pad_token_id" and is_decoder):
            continue
        tuned_value, old_value = tuned.get(key), old.get(key)
        if key.endswith("_config") and all(isinstance(config, dict) for config in (tuned_value, old_value, value)):
            inner = upgraded_settings(tuned_value, old_value, value, is_decoder=is_decoder, has_same_ids=has_same_ids)  # type: ignore[arg-type]
            changed |= {key: {**tuned_value, **inner}} if inner else {}  # type: ignore[dict-item]
        elif value != old_value and tuned_value == old_value:
            changed[key] = value
    return changed


def check_model(architecture: Any, checkpoint: Checkpoint) -> None:
    """Check that transformers can build a model of a checkpoint's config, and that it is not far larger than its files.

    Args:
        architecture: A transformers auto class.
        checkpoint: The checkpoint.

    Raises:
        CheckpointError: The model has more than twice as many parameters as are stored, or cannot be built, such as a
            sequence classifier of a Mamba.
    """
    import torch

    config = read_config(checkpoint)
    file = checkpoint.folder / "config.json"
    if type(config) not in architecture._model_mapping:
        kind = architecture.__name__.removeprefix("AutoModelFor")
        raise CheckpointError(
            f"{checkpoint.path}: transformers has no {config.model_type} for {kind}, which regraft needs. Carry its "
            "weights over by arithmetic (regraft weights graft)."
        )
    try:
        with quiet(), torch.device("meta"):
            model = architecture.from_config(config, trust_remote_code=False)
    except Exception as error:  # see read_config
        raise CheckpointError(f"{file}: transformers cannot build a model of it ({_reason(error)}).") from error
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(math.prod(stored_tensor.shape) for stored_tensor in checkpoint.tensors.values())
    if described > 2 * stored + MAX_ADDITIONAL_PARAMETERS:
        raise CheckpointError(
            f"{file}: describes a model of {described:,} parameters, but {checkpoint.path} has {stored:,}. Use the "
            "config.json that was saved with these weights."
        )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder.

    Args:
        folder: A transformers folder.

    Raises:
        CheckpointError: There is none, transformers cannot read it, or its maximal length is invalid.
    """
    from transformers import AutoTokenizer

    settings = folder / "tokenizer_config.json"
    check_sizes(folder)
    if settings.is_file():
        read_json(settings)
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # see read_config
        raise CheckpointError(f"{folder}: transformers cannot read its tokenizer ({_reason(error)}).") from error
    vocabulary = set(tokenizer.get_vocab())
    if vocabulary <= set(tokenizer.all_special_tokens):  # transformers has built an empty one
        raise CheckpointError(f"{folder}: has no tokenizer. Copy the base's tokenizer files into it.")
    if not settings.is_file() and (invented := sorted(vocabulary - _stored_vocabulary(folder, vocabulary))):
        raise CheckpointError(
            f"{folder}: has no tokenizer_config.json, and transformers assumes special tokens that its tokenizer.json "
            f"lacks ({', '.join(map(repr, invented[:5]))}). Copy the file that was saved with it."
        )
    normalizer: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is not None and (growth := _growth(json.loads(normalizer.__getstate__()))) > MAX_GROWTH:
        raise CheckpointError(f"{folder}: its tokenizer's normalizer makes texts up to {growth:,.0f} times as long.")
    max_length: Any = tokenizer.model_max_length
    if type(max_length) not in (int, float) or not max_length == max_length // 1 or max_length < 1:
        raise CheckpointError(
            f"{settings}: model_max_length is {max_length!r:.80}, not a whole number of tokens above 0. Correct it."
        )
    tokenizer.model_max_length = int(max_length)
    return tokenizer


def _rotary(parameters: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of rotary positions: one set, or one for each type of layer."""
    for settings in (parameters, *parameters.values()) if isinstance(parameters, dict) else ():
        if isinstance(settings, dict) and "rope_type" in settings:
            yield settings


def check_sizes(folder: Path) -> None:
    """Check that no tokenizer file would take gigabytes of memory.

    Args:
        folder: A transformers folder.

    Raises:
        CheckpointError: A file is larger than 64 MiB.
    """
    for file in (file for pattern in (*TOKENIZER_FILES, *FILES_READ_WITH_TOKENIZER) for file in folder.glob(pattern)):
        if file.is_file() and (size := file.stat().st_size) > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{file}: has {size:,} bytes; at most {MAX_TOKENIZER_BYTES:,} are read.")


def _growth(rule: dict[str, Any]) -> float:
    """Return the factor by which the normalizer of a tokenizer.json can lengthen a text."""
    if rule["type"] == "Sequence":
        return math.prod(map(_growth, rule["normalizers"]))
    if rule["type"] != "Replace":
        return 1
    text = rule["pattern"].get("String")  # a regular expression may match the empty string before every character
    return max(1, len(rule["content"]) / max(len(text), 1)) if text is not None else 1 + len(rule["content"])


def _check_counts(settings: dict[str, Any], file: Path, tensors: int) -> None:
    for name, value in _settings(settings):
        if name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"{file}: {name} is {value!r:.80}, code from the hub, which regraft does not run. Remove it."
            )
        if isinstance(value, int | float) and (
            ("drop" in name and not 0 <= value <= 1) or (HEADS.search(name) and not value >= 1)
        ):
            raise CheckpointError(f"{file}: {name} is {value!r:.80}, which is no valid value. Correct it.")
        if name == "chunk_size_feed_forward" and (type(value) is not int or value < 0):
            raise CheckpointError(f"{file}: {name} is {value!r:.80}, which is no number of tokens. Set it to 0.")
        count = len(value) if name == "id2label" and isinstance(value, dict) else value
        for pattern, max_count in MAX_COUNTS:
            # a layer has at least one tensor, and 64 layers are cheap to build
            limit = min(max_count, max(tensors, 64)) if pattern is LAYER else max_count
            is_count = pattern.search(name) and not SIZE.search(name)
            if is_count and isinstance(count, int | float) and count > limit:
                raise CheckpointError(
                    f"{file}: {name} is {count:,}, but {tensors:,} tensors allow at most {limit:,}. Use the "
                    "config.json that was saved with these weights."
                )


def _settings(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        yield name, value
        if isinstance(value, dict) and name.endswith("config"):  # of a submodel
            yield from _settings(value)


def _stored_vocabulary(folder: Path, vocabulary: set[str]) -> set[str]:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    return set(Tokenizer.from_file(str(file)).get_vocab()) if file.is_file() else vocabulary


def _reason(error: Exception) -> str:
    """Return an error's message in one line, without advice to run code from the folder."""
    if "trust_remote_code" in str(error):
        return "it needs code from the folder, which regraft does not run"
    return f"{' '.join(str(error).split()):.300}" or type(error).__name__
