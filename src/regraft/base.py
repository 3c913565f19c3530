"""Base models, as transformers loads them."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import TYPE_CHECKING

from regraft.architecture import architecture_of
from regraft.base_tokens import BaseTokens
from regraft.checkpoint import (
    FLOATING,
    Checkpoint,
    DerivedTensors,
    check_finite,
    check_unquantised,
    find_path,
    fingerprint,
    read_json,
)
from regraft.errors import CheckpointError
from regraft.naming import named_tensors
from regraft.transformers_folder import read_tokenizer
from regraft.vocabulary import ids_by_token

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from regraft.architecture import Architecture
    from regraft.weights import NamedTensors

PRETRAINING = "pretraining.json"
"""The file in a base's folder that records its pre-training by regraft."""
MIN_TEXT_TOKENS = 8  # arbitrary: a lower limit is probably an error, because models take hundreds
"""The fewest tokens of text that a base must take, besides special tokens."""


@dataclasses.dataclass(frozen=True)
class Base(BaseTokens):
    """A base model, from which models are tuned for tasks; see `BaseTokens` for its fields."""

    @classmethod
    def open(cls, name: str | Path) -> Base:
        """Open a base model, and check that its files are complete.

        Args:
            name: A folder, or a hub id with an optional `@revision`.

        Returns:
            The base, whose tensors are read on access.

        Raises:
            CheckpointError: There is no such base; a file is missing, truncated or malformed; or the base is an
                adapter, quantised, an encoder-decoder or multimodal.
        """
        path = find_path(name)
        if path.is_file():
            raise CheckpointError(f"{path}: is a file. Use the folder that save_pretrained of transformers wrote.")
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: is an adapter, not a base. Use the base that it was tuned on.")
        checkpoint = Checkpoint.open(path)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: has no config.json. Copy the one that was saved with these weights.")
        base = cls(str(name), path, checkpoint)
        check_unquantised(path, base.checkpoint.tensors)
        if base.is_encoder_decoder:
            raise CheckpointError(
                f"{path}: a {base.config.model_type} is an encoder-decoder, which regraft does not run. Carry its "
                "weights over by arithmetic (regraft weights graft)."
            )
        if getattr(base.config, "text_config", None) is not None:
            raise CheckpointError(
                f"{path}: is a {base.config.model_type}, a multimodal model, but regraft carries over text models. "
                "Save its text model separately: load it with its class for causal language models, such as "
                "Gemma3ForCausalLM, and call save_pretrained."
            )
        _ = base.body  # checks the names of the tensors
        return base

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """The ids of the base's tokens, without the additional tokens of an adaptation."""
        tokenizer = read_tokenizer(self.path) if self.tokenizer_override else self.tokenizer
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        if max(vocabulary.values(), default=0) < self.embedding_rows:
            return vocabulary
        return ids_by_token(read_tokenizer(self.path), self.embedding_rows)

    @functools.cached_property
    def embedding_rows(self) -> int:
        """The number of rows of the token embeddings, including rows without a token."""
        stored = self.body.get(str(self.architecture.embeddings))
        return self.checkpoint.tensors[stored].shape[0] if stored else len(self.tokenizer)

    @functools.cached_property
    def architecture(self) -> Architecture:
        """The architecture of the body."""
        return architecture_of(self.config)

    @property
    def prefix(self) -> str:
        """The name of the body inside a model with a head, such as `bert` in `bert.encoder.layer.0…`."""
        return self.architecture.prefix

    @functools.cached_property
    def has_pooler(self) -> bool:
        """Whether a classifier on the base has a pooler, which the base itself may lack."""
        return getattr(self.classifier_body, "pooler", None) is not None

    @functools.cached_property
    def classifier(self) -> PreTrainedModel:
        """A classifier of texts on the base, on the meta device."""
        return self.model_with_head("AutoModelForSequenceClassification")

    def model_with_head(self, auto_class: str) -> PreTrainedModel:
        """Build a model with a head on the base, on the meta device.

        Args:
            auto_class: The name of the auto class of transformers that loads such a model.
        """
        import torch
        import transformers

        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, auto_class).from_config(self.config)
        return model

    @property
    def classifier_body(self) -> torch.nn.Module:
        """The body of `classifier`, on the meta device; of a language model without a classifier, its body."""
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        if type(self.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and self.is_decoder:
            return self.architecture.model
        return self.classifier.base_model

    @functools.cached_property
    def is_decoder(self) -> bool:
        """Whether the base is a causal language model, whose classifier reads the last token."""
        return is_causal(self.config)

    @functools.cached_property
    def is_encoder_decoder(self) -> bool:
        """Whether the base's classifier has an encoder and a decoder, as in T5 and BART, even if only one is stored."""
        from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

        return self.config.is_encoder_decoder or type(self.config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    @functools.cached_property
    def max_input_length(self) -> int:
        """The maximal number of tokens of an input, including special tokens.

        Raises:
            CheckpointError: The settings leave fewer than `MIN_TEXT_TOKENS` tokens for text.
        """
        positions = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        if positions < 0:  # XLNet has no limit
            positions = sys.maxsize
        for name, module in self.architecture.model.named_modules():
            if name.endswith(".position_embeddings") and getattr(module, "padding_idx", None) is not None:
                positions -= module.padding_idx + 1  # RoBERTa counts positions from the padding's id plus 1
        length = min(positions, self.tokenizer.model_max_length)
        num_special = self.tokenizer.num_special_tokens_to_add()
        if length < num_special + MIN_TEXT_TOKENS:
            raise CheckpointError(
                f"{self.path}: takes {length} tokens (max_position_embeddings in config.json, model_max_length in "
                f"tokenizer_config.json), of which {num_special} are special tokens: too few remain for text. Correct "
                "these settings."
            )
        return length

    @functools.cached_property
    def body(self) -> dict[str, str]:
        """The stored names of the body's floating-point tensors, by their canonical names inside the body."""
        return body_names(self.checkpoint, self.architecture)

    @functools.cached_property
    def parameters(self) -> DerivedTensors:
        """The parameters of the body as transformers loads them, by their names in memory inside the body."""
        return self.architecture.in_memory(self.checkpoint)

    @functools.cached_property
    def language_head(self) -> DerivedTensors:
        """The parameters of the base's language-modelling head outside the body, by their names in memory.

        A head that is tied to the embeddings has their values. Empty for an encoder, and for a decoder without a head.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.config.model_type)
        if not self.is_decoder or name is None:
            return DerivedTensors({})
        model = architecture_of(self.config, name)
        stored = model.in_memory(self.checkpoint)
        specs = {}
        for parameter in model.parameters:
            source = model.ties.get(parameter, parameter)
            if not parameter.startswith(f"{model.prefix}.") and source in stored:
                specs[parameter] = stored.specs[source]
        return DerivedTensors(specs)

    @property
    def ties_head(self) -> bool:
        """Whether the language-modelling head has the weights of the embeddings."""
        return bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    @functools.cached_property
    def model_parameters(self) -> DerivedTensors:
        """The parameters of the body and of the language-modelling head, by the names of both properties."""
        return DerivedTensors({**self.language_head.specs, **self.parameters.specs})

    @functools.cached_property
    def language_head_fingerprint(self) -> str | None:
        """The fingerprint of a language-modelling head that is not tied to the embeddings; None without one."""
        stored = {name for name in self.checkpoint if self.architecture.identify(name) is None}
        names = {name: name for name in stored if name.removeprefix(f"{self.prefix}.") in self.language_head}
        return fingerprint(self.checkpoint, hashed_name=names.get) if names else None

    @functools.cached_property
    def named_tensors(self) -> NamedTensors:
        """The tensors by their canonical names, without obsolete buffers and tied duplicates."""
        return named_tensors(self.checkpoint, self.config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the body, which does not depend on the head, the stored names or the shards."""
        canonical_names = {stored: canonical for canonical, stored in self.body.items()}
        return fingerprint(self.checkpoint, hashed_name=canonical_names.get)

    def check_finite(self) -> None:
        """Check that the body has no infinite or NaN values; later calls do not read it again.

        Raises:
            CheckpointError: The body has infinite or NaN values; the message counts them by tensor.
        """
        _ = self._is_finite

    @functools.cached_property
    def _is_finite(self) -> bool:
        check_finite(self.checkpoint, names=set(self.body.values()))
        return True

    @functools.cached_property
    def stored_fingerprint(self) -> str:
        """The fingerprint of regraft 0.1, of the stored names without the body's prefix.

        It is of the floating-point tensors under the prefix or, if there are none, of all floating-point tensors.
        """
        floating = [name for name, tensor in self.checkpoint.tensors.items() if tensor.dtype in FLOATING]
        prefix = f"{self.prefix}."
        body = [name for name in floating if name.startswith(prefix)] or floating
        return fingerprint(self.checkpoint, hashed_name={name: name.removeprefix(prefix) for name in body}.get)

    @functools.cached_property
    def parent_fingerprint(self) -> str | None:
        """The fingerprint of the base that this base was pre-trained from; None if regraft did not pre-train it."""
        try:
            record = read_json(self.path / PRETRAINING)
            return str(record["base"]["fingerprint"])
        except (CheckpointError, KeyError, TypeError):
            return None


def is_causal(config: PretrainedConfig) -> bool:
    """Return whether a config belongs to a causal language model, rather than a masked language model.

    Args:
        config: A config of transformers, of which only the class counts.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )
    from transformers.modeling_layers import GenericForSequenceClassification

    config_class = type(config)
    classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(config_class, ())
    reads_last_token = isinstance(classifier, type) and issubclass(classifier, GenericForSequenceClassification)
    is_causal_lm = config_class in MODEL_FOR_CAUSAL_LM_MAPPING
    return (reads_last_token or is_causal_lm) and config_class not in MODEL_FOR_MASKED_LM_MAPPING


def body_names(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Return the stored names of the body's floating-point tensors, by their canonical names inside the body.

    Args:
        checkpoint: The stored tensors, with or without a head.
        architecture: The architecture of the body.

    Raises:
        CheckpointError: A tensor is stored twice or unknown to the class, or no tensor belongs to the body.
    """
    names: dict[str, str] = {}
    for name, stored_tensor in sorted(checkpoint.tensors.items(), key=lambda item: architecture.is_tied(item[0])):
        if stored_tensor.dtype not in FLOATING:
            continue
        canonical_name = architecture.identify(name)
        if canonical_name is None and architecture.is_unknown_body_tensor(name):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} does not belong to a {type(architecture.model).__name__} with the "
                "sizes in config.json, and would be ignored. Load it with the tool that saved it, and call "
                "save_pretrained."
            )
        if canonical_name in names and not architecture.is_tied(name):
            raise CheckpointError(
                f"{checkpoint.path}: stores the same tensor as {names[canonical_name]!r} and {name!r}. Load it with "
                "transformers and call save_pretrained."
            )
        if canonical_name is not None:
            names.setdefault(canonical_name, name)
    if not names:
        raise architecture.unrelated_checkpoint_error(checkpoint)
    return names
