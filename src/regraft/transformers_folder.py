"""What a folder of save_pretrained says of its model and its tokenizer: read without running any code that is in it."""

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

# what a config may ask to be built one by one; the deepest open models have some 200 layers, the widest 2,048 experts
LAYER = re.compile(r"(?<!max_window_)layer|depth|stage|^n(um)?_blocks?$")  # Qwen's window bounds layers that there are
MOST = (
    (LAYER, 1024),
    (re.compile(r"expert|group"), 4096),
    (re.compile(r"label"), 100_000),
)
# what a fine-tune's config.json says of its own tensors and head
OF_THE_TUNED = {
    "architectures", "id2label", "label2id", "problem_type", "dtype", "torch_dtype", "tie_word_embeddings",
}  # fmt: skip
SIZE = re.compile(r"size|dim|vocab")  # how wide something is, as shared_expert_intermediate_size; files tell that
HEADS = re.compile(r"heads$|^n_head$")
MAX_TOKENIZER_BYTES = 64 * 1024**2  # of a file; the largest of open models, with a million tokens, have some 60 MB
BESIDE_TOKENIZER = ("config.json", "adapter_config.json", "additional_chat_templates/*")  # read together with it
MAX_GROWTH = 1000  # of a text by its normalizer; those of open models exchange a character for one or a few
SLACK = 1 << 24  # numbers that a model may have beyond twice its file's: those of a head and a pooler


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Read the `config.json` beside a checkpoint.

    Args:
        checkpoint: The weights that it describes.

    Returns:
        The transformers config, with the defaults that the file leaves out.

    Raises:
        CheckpointError: It is no config of a model that transformers knows, needs code of its own, or has absurd sizes.
    """
    import torch
    from transformers import AutoConfig

    file = checkpoint.folder / "config.json"
    settings = read_json(file)
    _check_counts(settings, file, len(checkpoint))
    names = settings.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{file}: architectures is {names!r:.80}, not a list of the names of classes.")
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # each field of a wrong type raises what the first to use it raises
        raise CheckpointError(f"{file}: transformers cannot read it ({_reason(error)}).") from error
    vars(config).pop("quantization_config", None)  # the checkpoint is read as weights
    for rotary in _rotary(getattr(config.get_text_config(), "rope_parameters", None)):
        rotary.pop("type", None)  # what older versions called `rope_type`, and today's classes pass over
    config._attn_implementation = None  # a wish of who saved it, not of the weights, and maybe not installed here
    if not isinstance(config.dtype, torch.dtype | None):
        raise CheckpointError(f"{file}: dtype is {config.dtype!r:.80}, none of torch's. Correct or remove it.")
    return config


def upgraded_settings(
    tuned: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any], *, is_decoder: bool, has_same_ids: bool
) -> dict[str, Any]:
    """Return what a graft's config has of the new base: the settings that the upgrade changed, and the tuning did not.

    Args:
        tuned: The settings of the fine-tune.
        old: Those of the old base.
        new: Those of the new base.
        is_decoder: Whether they are of a causal model, whose classifier skips the padding token that its config names.
        has_same_ids: Whether tokens have the same ids in all three; else settings that are ids are left out.

    Returns:
        The settings, those of a model inside the model as a whole.
    """
    changed: dict[str, Any] = {}
    for key, value in new.items():
        is_id = not has_same_ids and (key.endswith("_token_id") or key == "vocab_size")
        if is_id or key in OF_THE_TUNED or (key == "pad_token_id" and is_decoder):
            continue
        own, before = tuned.get(key), old.get(key)
        if key.endswith("_config") and isinstance(own, dict) and isinstance(before, dict) and isinstance(value, dict):
            inner = upgraded_settings(own, before, value, is_decoder=is_decoder, has_same_ids=has_same_ids)
            changed |= {key: {**own, **inner}} if inner else {}
        elif value != before and own == before:
            changed[key] = value
    return changed


def check_model(architecture: Any, checkpoint: Checkpoint) -> None:
    """Refuse a `config.json` that no model of a kind can be built of, or only one far larger than its file.

    Args:
        architecture: A transformers auto class.
        checkpoint: The weights.

    Raises:
        CheckpointError: A model of that config has more than twice as many numbers as are stored, or cannot be built,
            as no sequence classifier of a Mamba.
    """
    import torch

    config, file = read_config(checkpoint), checkpoint.folder / "config.json"
    if type(config) not in architecture._model_mapping:
        kind = architecture.__name__.removeprefix("AutoModelFor")
        raise CheckpointError(
            f"{checkpoint.path}: transformers has no {config.model_type} for {kind}, which regraft would run. Its "
            "weights can be carried over by arithmetic alone (regraft weights graft)."
        )
    try:
        with quiet(), torch.device("meta"):
            model = architecture.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise CheckpointError(f"{file}: transformers cannot build a model of it ({_reason(error)}).") from error
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    if described > 2 * stored + SLACK:
        raise CheckpointError(
            f"{file}: describes a model of {described:,} numbers, and {checkpoint.path} holds {stored:,}. Give the "
            "config.json that was saved with these weights."
        )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder, as it is.

    Args:
        folder: A folder of transformers.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: There is none, transformers cannot read it, or it says nonsense of the longest text.
    """
    from transformers import AutoTokenizer

    settings = folder / "tokenizer_config.json"
    check_sizes(folder)
    if settings.is_file():
        read_json(settings)
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as for a config
        raise CheckpointError(f"{folder}: transformers cannot read its tokenizer ({_reason(error)}).") from error
    vocabulary = set(tokenizer.get_vocab())
    if vocabulary <= set(tokenizer.all_special_tokens):  # transformers made one out of nothing
        raise CheckpointError(f"{folder}: holds no tokenizer. Copy the base's tokenizer files into it.")
    if not settings.is_file() and (invented := sorted(vocabulary - _stored_vocabulary(folder, vocabulary))):
        raise CheckpointError(
            f"{folder}: has no tokenizer_config.json, and transformers takes special tokens that its tokenizer.json "
            f"has not ({', '.join(map(repr, invented[:5]))}). Copy the file that was saved with it."
        )
    normalizer: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is not None and (growth := _growth(json.loads(normalizer.__getstate__()))) > MAX_GROWTH:
        raise CheckpointError(f"{folder}: its tokenizer's normalizer makes texts up to {growth:,.0f} times as long.")
    longest: Any = tokenizer.model_max_length
    if type(longest) not in (int, float) or not longest == longest // 1 or longest < 1:
        raise CheckpointError(
            f"{settings}: model_max_length is {longest!r:.80}, not a whole number of tokens from 1. Correct it."
        )
    tokenizer.model_max_length = int(longest)
    return tokenizer


def _rotary(parameters: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of rotary positions: one set, or one for each type of layer."""
    for each in (parameters, *parameters.values()) if isinstance(parameters, dict) else ():
        if isinstance(each, dict) and "rope_type" in each:
            yield each


def check_sizes(folder: Path) -> None:
    """Refuse files of a tokenizer that take gigabytes of memory, before they are read.

    Args:
        folder: A folder of transformers.

    Raises:
        CheckpointError: One has more than 64 MiB.
    """
    for file in (file for pattern in (*TOKENIZER_FILES, *BESIDE_TOKENIZER) for file in folder.glob(pattern)):
        if file.is_file() and (size := file.stat().st_size) > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{file}: has {size:,} bytes, more than the {MAX_TOKENIZER_BYTES:,} that are read of such a file."
            )


def _growth(rule: dict[str, Any]) -> float:
    """Compute how many times as long the normalizer of a tokenizer.json may make a text."""
    if rule["type"] == "Sequence":
        return math.prod(map(_growth, rule["normalizers"]))
    if rule["type"] != "Replace":
        return 1
    text = rule["pattern"].get("String")  # a regular expression may match nothing, before every character
    return max(1, len(rule["content"]) / max(len(text), 1)) if text is not None else 1 + len(rule["content"])


def _check_counts(settings: dict[str, Any], file: Path, tensors: int) -> None:
    for name, value in _settings(settings):
        if name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"{file}: {name} is {value!r:.80}, code of the hub, which is not run. Remove it.")
        if isinstance(value, int | float) and (
            ("drop" in name and not 0 <= value <= 1) or (HEADS.search(name) and not value >= 1)
        ):
            raise CheckpointError(f"{file}: {name} is {value!r:.80}, which no model has. Correct it.")
        if name == "chunk_size_feed_forward" and (type(value) is not int or value < 0):
            raise CheckpointError(f"{file}: {name} is {value!r:.80}, no number of tokens. Write 0.")
        count = len(value) if name == "id2label" and isinstance(value, dict) else value
        for part, most in MOST:
            limit = min(most, max(tensors, 64)) if part is LAYER else most  # a layer has a tensor, and a few are cheap
            is_count = part.search(name) and not SIZE.search(name)
            if is_count and isinstance(count, int | float) and count > limit:
                raise CheckpointError(
                    f"{file}: {name} is {count:,}, and at most {limit:,} are built of {tensors:,} tensors. Give the "
                    "config.json that was saved with these weights."
                )


def _settings(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        yield name, value
        if isinstance(value, dict) and name.endswith("config"):  # of a model inside the model
            yield from _settings(value)


def _stored_vocabulary(folder: Path, vocabulary: set[str]) -> set[str]:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    return set(Tokenizer.from_file(str(file)).get_vocab()) if file.is_file() else vocabulary


def _reason(error: Exception) -> str:
    """Say in a line what transformers said in several; its advice to run code from the folder is not passed on."""
    if "trust_remote_code" in str(error):
        return "it needs code that is in the folder, and no code of a checkpoint is run"
    return f"{' '.join(str(error).split()):.300}" or type(error).__name__
