"""A base model, as transformers would load it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from typing import TYPE_CHECKING, Any

from regraft.architecture import architecture_of
from regraft.checkpoint import FLOATING, Checkpoint, check_finite, check_unquantised, find_path, fingerprint, read_json
from regraft.errors import CheckpointError
from regraft.naming import named
from regraft.transformers_folder import read_config, read_tokenizer
from regraft.vocabulary import ids_by_token

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from regraft.architecture import Architecture
    from regraft.checkpoint import DerivedTensors
    from regraft.weights import NamedTensors

PRETRAINING = "pretraining.json"
FEWEST = 8  # tokens of text that make sense; models take hundreds


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model: a plain transformers folder that tasks are tuned from.

    Args:
        name: What the user called it, a folder or a hub id (`id@revision` pins it).
        path: The folder on this disk.
        checkpoint: Its tensors, unread.
        tokenizer_override: What reads texts in place of its tokenizer, for an adaptation that has tokens of its own.
        rows_override: How many rows its embeddings are given for that.
    """

    name: str
    path: Path
    checkpoint: Checkpoint
    tokenizer_override: PreTrainedTokenizerBase | None = dataclasses.field(default=None, repr=False, compare=False)
    rows_override: int | None = None

    @classmethod
    def open(cls, name: str | Path) -> Base:
        """Find a base model and check that its files are whole.

        Args:
            name: A folder, or a hub id with an optional `@revision`.

        Returns:
            The base; no weights have been read.

        Raises:
            CheckpointError: There is no such base, a file of it is missing, truncated or malformed, it is quantised,
                or it is an encoder-decoder.
        """
        path = find_path(name)
        if path.is_file():
            raise CheckpointError(f"{path}: is a file. Give the folder that save_pretrained of transformers wrote.")
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: holds an adapter and no base. Give the base that it was tuned on.")
        checkpoint = Checkpoint.open(path)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: holds no config.json. Copy the one that was saved with these weights.")
        base = cls(str(name), path, checkpoint)
        check_unquantised(path, base.checkpoint.tensors)
        if base.is_encoder_decoder:
            raise CheckpointError(
                f"{path}: a {base.config.model_type} is an encoder-decoder, which regraft does not run: carry its "
                "weights over by arithmetic alone (regraft weights graft)."
            )
        if getattr(base.config, "text_config", None) is not None:
            raise CheckpointError(
                f"{path}: is a {base.config.model_type}, a text model inside one for other input too, and regraft "
                "carries over text models. Save its text model by itself: load it with the class for causal language "
                "models of that name, as Gemma3ForCausalLM, and call save_pretrained."
            )
        _ = base.body
        return base

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """The transformers config."""
        return read_config(self.checkpoint)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a padding token wherever it has a special one for that."""
        tokenizer = copy.deepcopy(self.tokenizer_override) if self.tokenizer_override else read_tokenizer(self.path)
        self.check_tokens(tokenizer, tokenizer("")["input_ids"])
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= self.rows:
            tokenizer.pad_token = None  # was added, and the embeddings were not resized
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    @property
    def pad_id(self) -> int:
        """What fills up a batch, and is masked: the tokenizer's padding token, or any where it has none."""
        padding = self.tokenizer.pad_token_id
        return 0 if padding is None else int(padding)

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """The ids of its tokens, an adaptation's own not among them."""
        vocabulary: dict[str, int] = (
            read_tokenizer(self.path) if self.tokenizer_override else self.tokenizer
        ).get_vocab()
        if max(vocabulary.values(), default=0) < self.embedding_rows:
            return vocabulary
        return ids_by_token(read_tokenizer(self.path), self.embedding_rows)

    @functools.cached_property
    def embedding_rows(self) -> int:
        """How many rows its token embeddings have, those that stand for no token among them."""
        stored = self.body.get(str(self.architecture.embeddings))
        return self.checkpoint.tensors[stored].shape[0] if stored else len(self.tokenizer)

    @functools.cached_property
    def rows(self) -> int:
        """How many tokens its embeddings have a row for."""
        return self.rows_override or int(getattr(self.config.get_text_config(), "vocab_size", None) or sys.maxsize)

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
        """Refuse tokens for which the embeddings have no row.

        Args:
            tokenizer: The base's.
            ids: What it made of texts.

        Raises:
            CheckpointError: An id is beyond the embeddings.
        """
        if (highest := max(ids, default=0)) >= self.rows:
            raise CheckpointError(
                f"{self.path}: its tokenizer makes token {tokenizer.convert_ids_to_tokens(highest)!r} ({highest:,}) of "
                f"texts, and its embeddings have {self.rows:,} rows: it was added without resize_token_embeddings. "
                "Give the tokenizer that was saved with these weights."
            )

    @functools.cached_property
    def architecture(self) -> Architecture:
        """What the tensors of the bare body are called, in memory and on disk."""
        return architecture_of(self.config)

    @property
    def prefix(self) -> str:
        """The name of the body inside a model with a head, as `bert` in `bert.encoder.layer.0…`."""
        return self.architecture.prefix

    @functools.cached_property
    def has_pooler(self) -> bool:
        """Whether a classifier on it has a pooler, which the base itself may lack."""
        return getattr(self.bare, "pooler", None) is not None

    @functools.cached_property
    def classifier(self) -> Any:
        """A classifier on it, without any weights."""
        import torch
        from transformers import AutoModelForSequenceClassification

        auto: Any = AutoModelForSequenceClassification
        with torch.device("meta"):
            return auto.from_config(self.config)

    @property
    def bare(self) -> Any:
        """The body of a classifier on it, without any weights."""
        return self.classifier.base_model

    @functools.cached_property
    def is_decoder(self) -> bool:
        """Whether it is a causal language model, whose head reads the last token rather than the first."""
        return is_causal(self.config)

    @functools.cached_property
    def is_encoder_decoder(self) -> bool:
        """Whether its classifier has an encoder and a decoder, as T5 and BART, whatever part of it is stored."""
        from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

        return self.config.is_encoder_decoder or type(self.config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    @functools.cached_property
    def max_input_length(self) -> int:
        """The longest input the base takes, in tokens."""
        positions = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        if positions < 0:  # as XLNet says that it has no limit
            positions = sys.maxsize
        for name, module in self.architecture.model.named_modules():
            if name.endswith(".position_embeddings") and getattr(module, "padding_idx", None) is not None:
                positions -= module.padding_idx + 1  # RoBERTa and its kind count positions from past the padding's id
        longest, special = min(positions, self.tokenizer.model_max_length), self.tokenizer.num_special_tokens_to_add()
        if longest < special + FEWEST:
            raise CheckpointError(
                f"{self.path}: takes {longest} tokens (max_position_embeddings in config.json, model_max_length in "
                f"tokenizer_config.json), of which {special} are special ones: no text is left of that. Correct these."
            )
        return longest

    @functools.cached_property
    def body(self) -> dict[str, str]:
        """The stored name of each floating-point tensor of the body, by the canonical name inside the body."""
        return body_names(self.checkpoint, self.architecture)

    @functools.cached_property
    def parameters(self) -> DerivedTensors:
        """The tensors of the body as transformers loads them, by their names in memory inside the body."""
        return self.architecture.in_memory(self.checkpoint)

    @functools.cached_property
    def named(self) -> NamedTensors:
        """All its tensors under the names that its class writes, every tensor once."""
        return named(self.checkpoint, self.config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Which weights these are: heads, naming and sharding play no part."""
        stored = {name: inner for inner, name in self.body.items()}
        return fingerprint(self.checkpoint, hashed_name=stored.get)

    def check_finite(self) -> None:
        """Refuse a base that holds values that are infinite or not a number; the body is read once.

        Raises:
            CheckpointError: Tensors of the body hold some; the message counts them by tensor.
        """
        _ = self._is_finite

    @functools.cached_property
    def _is_finite(self) -> bool:
        check_finite(self.checkpoint, names=set(self.body.values()))
        return True

    @functools.cached_property
    def stored_fingerprint(self) -> str:
        """The fingerprint by the rule of regraft 0.1: every tensor under the body's prefix, named as it is stored."""
        floating = [name for name, info in self.checkpoint.tensors.items() if info.dtype in FLOATING]
        start = f"{self.prefix}."
        inside = [name for name in floating if name.startswith(start)] or floating
        return fingerprint(self.checkpoint, hashed_name={name: name.removeprefix(start) for name in inside}.get)

    @functools.cached_property
    def parent_fingerprint(self) -> str | None:
        """The fingerprint of the base that this one was pre-trained from, if regraft did it."""
        try:
            record = read_json(self.path / PRETRAINING)
            return str(record["base"]["fingerprint"])
        except (CheckpointError, KeyError, TypeError):
            return None


def is_causal(config: PretrainedConfig) -> bool:
    """Return whether a config is a causal language model's, and no masked one's.

    Args:
        config: The transformers config.

    Returns:
        True for decoders.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )
    from transformers.modeling_layers import GenericForSequenceClassification

    kind = type(config)
    classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(kind, ())
    reads_last = isinstance(classifier, type) and issubclass(classifier, GenericForSequenceClassification)
    return (reads_last or kind in MODEL_FOR_CAUSAL_LM_MAPPING) and kind not in MODEL_FOR_MASKED_LM_MAPPING


def body_names(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Name the tensors of the body, whoever wrote them.

    Args:
        checkpoint: The tensors, heads among them.
        architecture: The bare body's.

    Returns:
        The stored name of each floating-point body tensor, by the canonical name inside the body.

    Raises:
        CheckpointError: A tensor is stored under two names, or is of the body and the class has no such, or none is.
    """
    names: dict[str, str] = {}
    for name, info in sorted(checkpoint.tensors.items(), key=lambda item: architecture.is_tied(item[0])):
        if info.dtype not in FLOATING:
            continue
        inner = architecture.identify(name)
        if inner is None and architecture.is_unknown_body_tensor(name):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} is none of a {type(architecture.model).__name__} of the sizes in "
                "config.json, and would be passed over. Load it with what saved it and call save_pretrained."
            )
        if inner in names and not architecture.is_tied(name):
            raise CheckpointError(
                f"{checkpoint.path}: stores {names[inner]!r} and {name!r}, which are the same tensor. Load it with "
                "transformers and call save_pretrained."
            )
        if inner is not None:
            names.setdefault(inner, name)
    if not names:
        raise architecture.unrelated_checkpoint_error(checkpoint)
    return names
