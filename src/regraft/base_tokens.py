"""The tokenizer of a base model: its own, or that of an adaptation whose texts the base reads."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from typing import TYPE_CHECKING, Any, Self

from regraft.checkpoint import Checkpoint, read_json
from regraft.errors import CheckpointError
from regraft.transformers_folder import read_config, read_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy as np
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class BaseTokens:
    """The files of a base model, and the tokens in which it reads and ends texts.

    Args:
        name: The name that the user passed: a folder or a hub id (`id@revision` pins a revision).
        path: The transformers folder on this machine.
        checkpoint: The stored tensors, which are read on access.
        tokenizer_override: A tokenizer to use instead of the base's, for an adaptation with additional tokens.
        rows_override: The number of rows of the embeddings with the additional tokens.
        text_tokenizer: The tokenizer that divides texts into tokens, if it has other ids than the base's; the ids are
            mapped by token.
        end_ids_override: The ids of the tokens that end a generated text, instead of those in the base's folder.
    """

    name: str
    path: Path
    checkpoint: Checkpoint
    tokenizer_override: PreTrainedTokenizerBase | None = dataclasses.field(default=None, repr=False, compare=False)
    rows_override: int | None = None
    text_tokenizer: PreTrainedTokenizerBase | None = dataclasses.field(default=None, repr=False, compare=False)
    end_ids_override: frozenset[int] | None = dataclasses.field(default=None, repr=False, compare=False)

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """The transformers config."""
        return read_config(self.checkpoint)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; its padding token defaults to the end-of-sequence or else the unknown token.

        Raises:
            CheckpointError: There is no valid tokenizer, or it adds a special token without a row in the embeddings.
        """
        tokenizer = copy.deepcopy(self.tokenizer_override) if self.tokenizer_override else read_tokenizer(self.path)
        self.check_tokens(tokenizer, tokenizer("")["input_ids"])
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= self.vocabulary_size:
            tokenizer.pad_token = None  # it was added without resizing the embeddings
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    @property
    def pad_id(self) -> int:
        """The id of the padding token, or 0 if there is none: padding is masked."""
        pad_id = self.tokenizer.pad_token_id
        return 0 if pad_id is None else int(pad_id)

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids of the tokens that end a generated text, from `generation_config.json` or else `config.json`."""
        if self.end_ids_override is not None:
            return self.end_ids_override
        ids = read_end_ids(self.path)
        if ids is None:
            stored = getattr(self.config.get_text_config(), "eos_token_id", None)
            ids = frozenset(token for token in _as_list(stored) if isinstance(token, int))
        return ids

    def with_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, text_tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Self:
        """Return the base with another tokenizer for the same rows of the embeddings.

        Args:
            tokenizer: The tokenizer in place of the base's.
            text_tokenizer: The tokenizer that divides texts into tokens, if it has other ids.
        """
        return self._replace(tokenizer_override=tokenizer, text_tokenizer=text_tokenizer)

    def with_end_ids(self, ids: frozenset[int]) -> Self:
        """Return the base with other tokens that end a generated text.

        Args:
            ids: The ids of the tokens.
        """
        return self._replace(end_ids_override=ids)

    def _replace(self, **fields: Any) -> Self:
        """Replace fields, and keep cached properties that do not depend on them, such as the fingerprint."""
        replaced = dataclasses.replace(self, **fields)
        dependent = {"tokenizer", "vocabulary_size", "max_input_length", "end_ids", "text_ids"}
        field_names = {field.name for field in dataclasses.fields(self)}
        for name, value in vars(self).items():
            if name not in dependent | field_names:
                vars(replaced)[name] = value
        return replaced

    @functools.cached_property
    def text_ids(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The id of each token of `text_tokenizer` in the base; −1 for a token that the base lacks."""
        import numpy as np

        assert self.text_tokenizer is not None  # otherwise ids are not mapped
        ids = self.tokenizer.get_vocab()
        source = self.text_tokenizer.get_vocab()
        new_ids = np.full(max(source.values()) + 1, -1, dtype=np.int64)
        for token, token_id in source.items():
            new_ids[token_id] = ids.get(token, -1)
        return new_ids

    @functools.cached_property
    def vocabulary_size(self) -> int:
        """The number of rows of the embeddings, with an adaptation's additional tokens; unlimited if unknown."""
        return self.rows_override or int(getattr(self.config.get_text_config(), "vocab_size", None) or sys.maxsize)

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
        """Check that the embeddings have a row for every token.

        Args:
            tokenizer: The tokenizer that produced the ids.
            ids: Ids of tokens, 0 or more.

        Raises:
            CheckpointError: An id is not the index of a row.
        """
        highest = max(ids, default=0)
        if highest >= self.vocabulary_size:
            raise CheckpointError(
                f"{self.path}: its tokenizer produces token {tokenizer.convert_ids_to_tokens(highest)!r} "
                f"({highest:,}), but its embeddings have {self.vocabulary_size:,} rows: the token was added without "
                "resize_token_embeddings. Use the tokenizer that was saved with these weights."
            )


def read_end_ids(folder: Path) -> frozenset[int] | None:
    """Return the ids of the tokens that end a generated text, from a folder's `generation_config.json`.

    Args:
        folder: A transformers or PEFT folder.

    Returns:
        The ids; None without such a file, or if it names none.
    """
    file = folder / "generation_config.json"
    stored = read_json(file).get("eos_token_id") if file.is_file() else None
    return None if stored is None else frozenset(token for token in _as_list(stored) if isinstance(token, int))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
