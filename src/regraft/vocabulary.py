"""Matching the vocabularies of two bases and a fine-tune by token, and merging their tokenizers."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import TOKENIZER_FILES, copy_auxiliary_files, read_json, shape_of, write_atomic
from regraft.errors import MAX_LISTED, CheckpointError, MismatchError
from regraft.transformers_folder import check_sizes, read_tokenizer
from regraft.weights import NamedTensors, RowMatch, has_vocabulary_rows, match_rows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "added_tokens.json", "tekken.json", "*.model", "*.spm", "*.tiktoken")
"""Patterns of files with a tokenizer's tokens, by which tokenizers are recognised and vocabularies compared."""
TOKEN_ID_SETTINGS = re.compile(r"_token_(?:id|index)$|suppress_tokens$")
"""Matches the names of settings whose values are ids of tokens, or lists of ids."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The attributes of a tokenizer that are special tokens."""


def match_vocabularies(
    folders: Mapping[str, Path], tensors: Mapping[str, Mapping[str, torch.Tensor]]
) -> RowMatch | None:
    """Match the rows of the embeddings of two bases and a fine-tune by the tokens of their tokenizers.

    Args:
        folders: The folders by role: `old`, `new` and, if there is a fine-tune, `tuned`. A fine-tune without a
            tokenizer has the old base's.
        tensors: The tensors by role, under canonical names if they have a transformers class.

    Returns:
        The match; None if the vocabularies are the same, or if a tokenizer is missing and the numbers of rows are
        equal.

    Raises:
        CheckpointError: The embeddings differ in size and a tokenizer is missing, or the tokenizers differ and a
            checkpoint has no tensor with a row per token.
        MismatchError: A tokenizer has a token without a row in the embeddings.
    """
    num_rows = {role: _num_rows(tensors[role]) for role in folders}
    files = {role: _read_vocabulary_files(folder) for role, folder in folders.items()}
    if "tuned" in files and not files["tuned"] and num_rows["tuned"] == num_rows["old"]:
        files["tuned"] = files["old"]
    if not all(files.values()):
        if len(set(num_rows.values())) > 1:
            without_tokenizer = next(folder for role, folder in folders.items() if not files[role])
            sizes = " and ".join(f"{folders[role]} has {count:,}" for role, count in num_rows.items())
            raise CheckpointError(
                f"the embeddings differ in size: {sizes} rows, and {without_tokenizer} has no tokenizer to match them "
                "by. Copy the base's tokenizer files into it."
            )
        return None
    if all(content == files["old"] for content in files.values()) and len(set(num_rows.values())) == 1:
        return None
    tokenizers = {"old": read_tokenizer(folders["old"])}
    tokenizers |= {role: read_tokenizer(folder) for role, folder in folders.items() if files[role] != files["old"]}
    if not all(num_rows.values()):
        if all(tokenizer.get_vocab() == tokenizers["old"].get_vocab() for tokenizer in tokenizers.values()):
            return None
        without_embeddings = next(folder for role, folder in folders.items() if not num_rows[role])
        raise CheckpointError(
            f"{without_embeddings}: none of its tensors is known to have a row for each token, but the tokenizers "
            "differ. Use checkpoints of a transformers class, or with the same vocabulary."
        )
    vocabularies = {role: ids_by_token(tokenizer, num_rows[role]) for role, tokenizer in tokenizers.items()}
    match = match_rows(
        vocabularies["old"],
        vocabularies.get("new", vocabularies["old"]),
        num_rows["old"],
        num_rows["new"],
        vocabularies.get("tuned"),
        num_rows.get("tuned"),
    )
    return None if match.is_identity else match


def ids_by_token(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> dict[str, int]:
    """Return the ids of a tokenizer's tokens, except a padding token for which the embeddings have no row.

    Args:
        tokenizer: A tokenizer, which may have added a padding token without resizing the embeddings.
        num_rows: The number of rows of the embeddings.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    padding = tokenizer.pad_token
    return {token: token_id for token, token_id in vocabulary.items() if token_id < num_rows or token != padding}


def check_same_vocabulary(
    folders: Mapping[str, Path], tensors: Mapping[str, Mapping[str, torch.Tensor]], result: str
) -> None:
    """Check that a fine-tune has the same tokens in the same rows as its base.

    Args:
        folders: The folders of the roles `old` and `tuned`.
        tensors: The tensors of these roles.
        result: The result of the computation that follows, such as `a LoRA`, for error messages.

    Raises:
        CheckpointError: The embeddings differ in size and a tokenizer is missing, or a tokenizer cannot be read.
        MismatchError: The tokens, their rows or the numbers of rows differ.
    """
    match = match_vocabularies(
        {"old": folders["old"], "new": folders["tuned"]}, {"old": tensors["old"], "new": tensors["tuned"]}
    )
    if match is None:
        return
    old = folders["old"]
    has_same_rows = all(old_row in (-1, row) for row, old_row in enumerate(match.old_row_indices))
    has_same_tokens = not (match.added_tokens or match.removed_tokens)
    if has_same_tokens and has_same_rows:
        raise MismatchError(
            f"{folders['tuned']}: its embeddings have {match.num_new_rows:,} rows, but the embeddings of {old} have "
            f"{match.num_old_rows:,} for the same tokens, so {result} of it would not fit. Resize them with "
            "resize_token_embeddings of transformers first, or graft the fine-tune (regraft weights graft)."
        )
    difference = f"its tokens are in different rows than in {old}"
    if match.removed_tokens:
        listed = ", ".join(map(repr, match.removed_tokens[:MAX_LISTED]))
        difference = f"it lacks {len(match.removed_tokens):,} tokens ({listed}) of {old}"
    if match.added_tokens:
        listed = ", ".join(map(repr, match.added_tokens[:MAX_LISTED]))
        difference = f"it has {len(match.added_tokens):,} tokens ({listed}) that {old} lacks"
    raise MismatchError(
        f"{folders['tuned']}: {difference}, so {result} of it would not fit. Graft the fine-tune "
        "(regraft weights graft)."
    )


def check_same_rows(folders: Mapping[str, Path], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Check that two checkpoints have their common tokens in the same rows, if both have a tokenizer.

    Args:
        folders: The folders of the two checkpoints by role.
        tensors: The tensors of the same roles.

    Raises:
        MismatchError: A token has different ids.
    """
    first, second = folders
    files = [_read_vocabulary_files(folder) for folder in folders.values()]
    if not all(files) or files[0] == files[1]:
        return
    ids = {role: ids_by_token(read_tokenizer(folder), _num_rows(tensors[role])) for role, folder in folders.items()}
    moved = sorted(token for token, row in ids[first].items() if ids[second].get(token, row) != row)
    if moved:
        raise MismatchError(
            f"{folders[first]} and {folders[second]} have {len(moved):,} tokens in different rows, such as "
            f"{moved[0]!r} in {ids[first][moved[0]]} and {ids[second][moved[0]]}. Use checkpoints with the same "
            "vocabulary."
        )


def write_vocabulary(folder: Path, new: Path, tuned: Path, old: Path, match: RowMatch) -> None:
    """Write the tokenizer of a graft, and update the ids of tokens in its configs.

    Args:
        folder: The graft's folder, with the fine-tune's configs. Its tokenizer files are replaced.
        new: The new base's folder.
        tuned: The fine-tune's folder, which may lack a tokenizer.
        old: The old base's folder, whose tokenizer is used if the fine-tune has none.
        match: The match of the rows of the three vocabularies.

    Raises:
        CheckpointError: The fine-tune's tokens cannot be added with the ids of the match.
        MismatchError: The new tokenizer would not split texts into the fine-tune's tokens.
    """
    tokenizer = merged_tokenizer(new, tuned, match)
    for stale in {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}:
        stale.unlink()
    if match.tuned_only or _special_settings(tokenizer) != _special_settings(read_tokenizer(new)):
        tokenizer.save_pretrained(folder)
    else:
        copy_auxiliary_files(new, folder, TOKENIZER_FILES)
    ids = tokenizer.get_vocab()
    source = read_tokenizer(tuned if has_tokenizer(tuned) else old)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            fallback = read_json(new / name) if (new / name).is_file() else {}
            config = _with_new_ids(read_json(folder / name), source, ids, fallback)
            text_config = config.get("text_config")
            if name == "config.json" and (not isinstance(text_config, dict) or "vocab_size" in config):
                config["vocab_size"] = len(match.new_row_indices)
            if isinstance(text_config, dict):
                text_config["vocab_size"] = len(match.new_row_indices)
            write_atomic(folder / name, json.dumps(config, indent=2) + "\n")


def merged_tokenizer(new: Path, tuned: Path, match: RowMatch) -> PreTrainedTokenizerBase:
    """Return the new base's tokenizer with the fine-tune's additional tokens, special tokens and chat template.

    Args:
        new: The new base's folder.
        tuned: The fine-tune's folder, which may lack a tokenizer.
        match: The match of the rows of their vocabularies.

    Raises:
        CheckpointError: The tokens cannot be added with the ids of the match.
        MismatchError: The new tokenizer would not split texts into the fine-tune's tokens.
    """
    from transformers import AddedToken

    tokenizer = read_tokenizer(new)
    if not has_tokenizer(tuned):
        return tokenizer
    source = read_tokenizer(tuned)
    source_tokens = {token.content: token for token in source.added_tokens_decoder.values()}
    for token in sorted(match.tuned_only, key=match.tuned_only.__getitem__):
        added: Any = source_tokens.get(token, AddedToken(token, normalized=False))
        tokenizer.add_tokens([added], special_tokens=added.special)
    vocabulary = tokenizer.get_vocab()
    misplaced = [token for token, row in match.tuned_only.items() if vocabulary.get(token) != row]
    if misplaced:
        raise CheckpointError(
            f"{tuned}: its token {misplaced[0]!r} cannot be added to the tokenizer of {new}, whose ids have gaps. Add "
            "the fine-tune's tokens to the new base first (add_tokens and resize_token_embeddings of transformers)."
        )
    texts = {token: source.convert_tokens_to_string([token]).strip() for token in match.tuned_only}
    learned = [
        token for token, text in texts.items() if text and source.tokenize(text) == [token] != tokenizer.tokenize(text)
    ]
    if learned:
        listed = ", ".join(map(repr, learned[:MAX_LISTED]))
        raise MismatchError(
            f"{tuned}: {len(learned):,} of its additional tokens ({listed}) were learned by its tokenizer, and cannot "
            f"be added to the tokenizer of {new}. Give the new base a tokenizer with these tokens, and rows for them, "
            "first."
        )
    for name in SPECIAL_TOKENS:
        special = getattr(source, name, None)
        if special is not None and special in vocabulary:
            setattr(tokenizer, name, special)
    chat_template = getattr(source, "chat_template", None)
    if chat_template:
        tokenizer.chat_template = chat_template
    return tokenizer


def _special_settings(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], Any]:
    return dict(tokenizer.special_tokens_map), getattr(tokenizer, "chat_template", None)


def _with_new_ids(
    config: Mapping[str, Any], source: PreTrainedTokenizerBase, ids: Mapping[str, int], fallback: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a config with the ids of the grafted vocabulary.

    A setting none of whose tokens remain has the new base's value.
    """

    def convert(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            new_config = fallback.get(key)
            return _with_new_ids(value, source, ids, new_config if isinstance(new_config, dict) else {})
        old_ids = value if isinstance(value, list) else [value]
        are_in_range = all(type(old_id) is int and 0 <= old_id < len(source) for old_id in old_ids)
        are_ids = TOKEN_ID_SETTINGS.search(key) is not None and are_in_range
        if not are_ids:
            return value
        new_ids = [ids[token] for token in source.convert_ids_to_tokens(old_ids) if token in ids]
        if old_ids and not new_ids:
            return fallback.get(key)
        return new_ids if isinstance(value, list) else new_ids[0]

    return {key: convert(key, value) for key, value in config.items()}


def _num_rows(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the number of rows of the embeddings, or else of the largest tensor with a row per token, or else 0."""
    if isinstance(tensors, NamedTensors) and tensors.embeddings in tensors:
        return shape_of(tensors, str(tensors.embeddings))[0]
    names = tensors.token_tensors if isinstance(tensors, NamedTensors) else filter(has_vocabulary_rows, tensors)
    return max((shape_of(tensors, name)[0] for name in names), default=0)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer.

    Args:
        folder: An adaptation's or a base's folder.
    """
    return any(file.is_file() for pattern in VOCABULARY_FILES for file in folder.glob(pattern))


def _read_vocabulary_files(folder: Path) -> dict[str, bytes]:
    """Return the content of a tokenizer's vocabulary files; equal files mean equal vocabularies."""
    check_sizes(folder)
    files = {file.name: file for pattern in VOCABULARY_FILES for file in folder.glob(pattern) if file.is_file()}
    return {name: file.read_bytes() for name, file in sorted(files.items())}
