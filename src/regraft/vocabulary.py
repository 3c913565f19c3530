"""The vocabularies of two bases and a fine-tune: rows matched by token, and the vocabulary of what comes of them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import TOKENIZER_FILES, copy_auxiliary_files, read_json, shape_of, write_atomic
from regraft.errors import CheckpointError, MismatchError
from regraft.transformers_folder import check_sizes, read_tokenizer
from regraft.weights import NamedTensors, RowMatch, has_vocabulary_rows, match_rows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "vocab.*", "added_tokens.json", "tekken.json", "*.model", "*.spm", "*.tiktoken")
TOKEN_IDS = re.compile(r"_token_(?:id|index)$|suppress_tokens$")  # settings that name tokens by their ids
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def match_vocabularies(
    folders: Mapping[str, Path], tensors: Mapping[str, Mapping[str, torch.Tensor]]
) -> RowMatch | None:
    """Match the rows of the embeddings of two bases and a fine-tune by the tokens of their tokenizers.

    Args:
        folders: Of the sides `old`, `new` and, if there is one, `tuned`; a fine-tune without a tokenizer of its own has
            the old base's.
        tensors: Their tensors, as their classes name them if they have one.

    Returns:
        The match; None where the vocabularies are the same, or a side has no tokenizer and equally many rows.

    Raises:
        CheckpointError: The embeddings differ in size and there is no tokenizer to match them by.
        MismatchError: A tokenizer has more tokens than its embeddings have rows.
    """
    rows = {side: _rows(tensors[side]) for side in folders}
    files = {side: _files(folder) for side, folder in folders.items()}
    if "tuned" in files and not files["tuned"] and rows["tuned"] == rows["old"]:
        files["tuned"] = files["old"]
    if not all(files.values()):
        if len(set(rows.values())) > 1:
            bare = next(folder for side, folder in folders.items() if not files[side])
            sizes = " and ".join(f"{folders[side]} has {count:,}" for side, count in rows.items())
            raise CheckpointError(
                f"the embeddings differ in size: {sizes} rows, and {bare} holds no tokenizer to match them by. Copy "
                "the base's tokenizer files into it."
            )
        return None
    if all(content == files["old"] for content in files.values()) and len(set(rows.values())) == 1:
        return None
    others = {side: read_tokenizer(folder) for side, folder in folders.items() if files[side] != files["old"]}
    tokenizers = {"old": read_tokenizer(folders["old"]), **others}
    if not all(rows.values()):
        if all(tokenizer.get_vocab() == tokenizers["old"].get_vocab() for tokenizer in tokenizers.values()):
            return None
        unknown = next(folder for side, folder in folders.items() if not rows[side])
        raise CheckpointError(
            f"{unknown}: no tensor of it is known to have a row for each token, and the tokenizers differ, so rows "
            "cannot be matched. Give checkpoints of a class that transformers has, or of one vocabulary."
        )
    vocabularies = {side: ids_by_token(tokenizer, rows[side]) for side, tokenizer in tokenizers.items()}
    match = match_rows(
        vocabularies["old"], vocabularies.get("new", vocabularies["old"]), rows["old"], rows["new"],
        vocabularies.get("tuned"), rows.get("tuned"),
    )  # fmt: skip
    return None if match.is_identity else match


def ids_by_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    """Return the ids of a tokenizer's tokens, but for a padding token that was added without a row of its own.

    Args:
        tokenizer: The tokenizer.
        rows: How many rows the embeddings have.

    Returns:
        The ids by token.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    padding = tokenizer.pad_token
    return {token: i for token, i in vocabulary.items() if i < rows or token != padding}


def check_one_vocabulary(
    folders: Mapping[str, Path], tensors: Mapping[str, Mapping[str, torch.Tensor]], what: str
) -> None:
    """Refuse a fine-tune with other tokens than its base, where there is no new base whose vocabulary would count.

    Args:
        folders: Of the sides `old` and `tuned`.
        tensors: Their tensors.
        what: What is to be made of the two, as in `a LoRA`.

    Raises:
        MismatchError: Tokens were added, or stand in other rows, or the embeddings have others that stand for none.
    """
    sides = {"old": folders["old"], "new": folders["tuned"]}
    rows = match_vocabularies(sides, {"old": tensors["old"], "new": tensors["tuned"]})
    if rows is None:
        return
    if not rows.added_tokens and all(old in (-1, row) for row, old in enumerate(rows.old_row_indices)):
        raise MismatchError(
            f"{folders['tuned']}: its embeddings have {rows.num_new_rows:,} rows and those of {folders['old']} "
            f"{rows.num_old_rows:,} for the same tokens, so {what} of it would not fit. Give it as many with "
            "resize_token_embeddings of transformers first, or graft it as it is (regraft weights graft)."
        )
    added = f" has {len(rows.added_tokens):,} tokens more ({', '.join(map(repr, rows.added_tokens[:4]))})"
    raise MismatchError(
        f"{folders['tuned']}:{added if rows.added_tokens else ' has its tokens in other rows'} than {folders['old']}, "
        f"so its embeddings have no counterpart, and {what} of it would not know its tokens. Graft it as it is "
        "(regraft weights graft)."
    )


def check_same_rows(folders: Mapping[str, Path], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Refuse two checkpoints that have a token in different rows: by number, one token would stand for another.

    Args:
        folders: Of both; one without a tokenizer is passed over.
        tensors: Their tensors.

    Raises:
        MismatchError: A token has another id in each.
    """
    first, second = folders
    files = [_files(folder) for folder in folders.values()]
    if not all(files) or files[0] == files[1]:
        return
    ids = {side: ids_by_token(read_tokenizer(folder), _rows(tensors[side])) for side, folder in folders.items()}
    moved = sorted(token for token, row in ids[first].items() if ids[second].get(token, row) != row)
    if moved:
        raise MismatchError(
            f"{folders[first]} and {folders[second]} have {len(moved):,} tokens in different rows, as {moved[0]!r} in "
            f"{ids[first][moved[0]]} and {ids[second][moved[0]]}: row by row, one token would be held against another. "
            "Give two of one vocabulary."
        )


def write_vocabulary(folder: Path, new: Path, tuned: Path, old: Path, rows: RowMatch) -> None:
    """Write the tokenizer of a graft, and have its configs name tokens by their ids there.

    Args:
        folder: The graft, with the configs of the fine-tune; its tokenizer files are replaced.
        new: The new base.
        tuned: The fine-tune.
        old: The old base, whose tokenizer a fine-tune without one has.
        rows: The match of their rows.
    """
    tokenizer = merged_tokenizer(new, tuned, rows)
    for stale in {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}:
        stale.unlink()
    if rows.tuned_only or _meaning(tokenizer) != _meaning(read_tokenizer(new)):
        tokenizer.save_pretrained(folder)
    else:
        copy_auxiliary_files(new, folder, TOKENIZER_FILES)
    ids = tokenizer.get_vocab()
    source = read_tokenizer(tuned if has_tokenizer(tuned) else old)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            instead = read_json(new / name) if (new / name).is_file() else {}
            settings = _renumbered(read_json(folder / name), source, ids, instead)
            text = settings.get("text_config")
            if name == "config.json" and (not isinstance(text, dict) or "vocab_size" in settings):
                settings["vocab_size"] = len(rows.new_row_indices)
            if isinstance(text, dict):
                text["vocab_size"] = len(rows.new_row_indices)
            write_atomic(folder / name, json.dumps(settings, indent=2) + "\n")


def merged_tokenizer(new: Path, tuned: Path, rows: RowMatch) -> PreTrainedTokenizerBase:
    """Make the tokenizer of the new base with the fine-tune's own tokens, special tokens and chat template.

    Args:
        new: The new base.
        tuned: The fine-tune.
        rows: The match of their rows.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: The tokens cannot be added where the match has them.
        MismatchError: The new tokenizer would not divide texts into them.
    """
    from transformers import AddedToken

    tokenizer = read_tokenizer(new)
    if not has_tokenizer(tuned):
        return tokenizer
    source = read_tokenizer(tuned)
    added_before = {token.content: token for token in source.added_tokens_decoder.values()}
    for token in sorted(rows.tuned_only, key=rows.tuned_only.__getitem__):
        added: Any = added_before.get(token, AddedToken(token, normalized=False))
        tokenizer.add_tokens([added], special_tokens=added.special)
    vocabulary = tokenizer.get_vocab()
    misplaced = [token for token, row in rows.tuned_only.items() if vocabulary.get(token) != row]
    if misplaced:
        raise CheckpointError(
            f"{tuned}: its token {misplaced[0]!r} cannot be added to the tokenizer of {new}, whose ids have gaps. Add "
            "the fine-tune's tokens to the new base first (add_tokens and resize_token_embeddings of transformers)."
        )
    texts = {token: source.convert_tokens_to_string([token]).strip() for token in rows.tuned_only}
    apart = [t for t, text in texts.items() if text and source.tokenize(text) == [t] != tokenizer.tokenize(text)]
    if apart:
        raise MismatchError(
            f"{tuned}: {len(apart):,} tokens of its own ({', '.join(map(repr, apart[:4]))}) are part of what its "
            f"tokenizer learned, rather than added to it, and the tokenizer of {new} cannot be taught them. Give the "
            "new base a tokenizer with these tokens, and rows for them, first."
        )
    for name in SPECIAL:
        special = getattr(source, name, None)
        if special is not None and special in vocabulary:
            setattr(tokenizer, name, special)
    if template := getattr(source, "chat_template", None):
        tokenizer.chat_template = template
    return tokenizer


def _meaning(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], Any]:
    return dict(tokenizer.special_tokens_map), getattr(tokenizer, "chat_template", None)


def _renumbered(
    settings: Mapping[str, Any], source: PreTrainedTokenizerBase, ids: Mapping[str, int], instead: Mapping[str, Any]
) -> dict[str, Any]:
    """Return settings with the ids of the grafted vocabulary, the new base's where a token is in it no longer."""

    def renumber(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            inner = instead.get(key)
            return _renumbered(value, source, ids, inner if isinstance(inner, dict) else {})
        numbers = value if isinstance(value, list) else [value]
        if not TOKEN_IDS.search(key) or not all(type(each) is int and 0 <= each < len(source) for each in numbers):
            return value
        present = [ids[token] for token in source.convert_ids_to_tokens(numbers) if token in ids]
        if numbers and not present:
            return instead.get(key)
        return present if isinstance(value, list) else present[0]

    return {key: renumber(key, value) for key, value in settings.items()}


def _rows(tensors: Mapping[str, torch.Tensor]) -> int:
    if isinstance(tensors, NamedTensors) and tensors.embeddings in tensors:
        return shape_of(tensors, str(tensors.embeddings))[0]
    by_token = tensors.token_tensors if isinstance(tensors, NamedTensors) else filter(has_vocabulary_rows, tensors)
    return max((shape_of(tensors, name)[0] for name in by_token), default=0)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer of its own.

    Args:
        folder: An adaptation's or a base's.

    Returns:
        True if it has a vocabulary's file.
    """
    return any(file.is_file() for pattern in FILES for file in folder.glob(pattern))


def _files(folder: Path) -> dict[str, bytes]:
    """Read the files of a tokenizer's vocabulary; equal files are one vocabulary."""
    check_sizes(folder)
    files = {file.name: file for pattern in FILES for file in folder.glob(pattern) if file.is_file()}
    return {name: file.read_bytes() for name, file in sorted(files.items())}
