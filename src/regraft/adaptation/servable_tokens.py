"""The rules that follow from a server's single tokenizer and chat template, which all its adapters share.

Sources: vLLM removed the tokenizer of a LoRA and `lora_extra_vocab_size`; SGLang's `LoRAManager.validate_new_adapter`
refuses adapters that add tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from regraft.checkpoint import read_json
from regraft.errors import MAX_LISTED
from regraft.transformers_folder import read_tokenizer
from regraft.vocabulary import ids_by_token

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base

TEMPLATE_FILE = "chat_template.jinja"
"""The file in which transformers 5 stores a chat template; older versions store it in `tokenizer_config.json`."""


def tokenizer_problems(
    adaptation: Adaptation, base: Base
) -> Iterator[tuple[Literal["refused", "wrong", "setting"], str, str]]:
    """Compare an adaptation's tokenizer, special tokens and chat template with those of the base that is served.

    Args:
        adaptation: The adaptation.
        base: The base that the server loads.

    Yields:
        The severity, the problem and the remedy, as in `ServingProblem`.
    """
    tokenizer = adaptation.tokenizer
    if tokenizer is None:
        problem = "its folder has no tokenizer, so its chat template and end of text cannot be compared"
        yield "setting", problem, "copy the tokenizer that it was tuned with into its folder"
        return
    served = read_tokenizer(base.path)
    other_tokenizer = f"--tokenizer (SGLang: --tokenizer-path) {adaptation.path}, for all adapters"
    ids = ids_by_token(tokenizer, base.embedding_rows)
    if tokenizer.pad_token != tokenizer.eos_token:  # a server pads nothing
        ids.pop(str(tokenizer.pad_token), None)
    added = sorted(ids.keys() - base.vocabulary.keys())
    unused_rows = set(range(base.embedding_rows)).difference(base.vocabulary.values())
    if rowless := [token for token in added if ids[token] not in unused_rows]:
        problem = f"its tokenizer has {len(rowless):,} tokens that the base lacks ({_list(rowless)})"
        yield "refused", problem, "convert it to full, and serve that as a model of its own"
    elif added:
        problem = f"its tokenizer has {len(added):,} tokens for rows that the base does not use ({_list(added)})"
        yield "setting", problem, other_tokenizer
    moved = sorted(token for token, row in ids.items() if base.vocabulary.get(token, row) != row)
    if moved:
        problem = f"{len(moved):,} tokens have other ids than in the base ({_list(moved)})"
        yield "wrong", problem, "recycle it onto this base"
    if not (added or moved) and _reads_otherwise(tokenizer, served):
        problem = "its tokenizer puts other special tokens around a text than the base's"
        yield "setting", problem, other_tokenizer
    unknown_ends = sorted(_end_ids(tokenizer, adaptation.path) - _end_ids(served, base.path))
    if unknown_ends:
        tokens = _list([str(token) for token in tokenizer.convert_ids_to_tokens(unknown_ends)])
        yield (
            "setting",
            f"it ends its answers by {tokens}, where the base does not stop",
            (f'in each request: "stop_token_ids": {unknown_ends}'),
        )
    yield from _template_problems(adaptation.path, tokenizer, served)


def _template_problems(
    folder: Path, tokenizer: PreTrainedTokenizerBase, served: PreTrainedTokenizerBase
) -> Iterator[tuple[Literal["setting"], str, str]]:
    template, served_template = _template(tokenizer), _template(served)
    if template == served_template:
        return
    if template is None:
        problem = "it has no chat template, but the base has one, which chat requests would use"
        yield "setting", problem, "send plain prompts (/v1/completions), or start the server with --chat-template FILE"
        return
    remedy = f"--chat-template {folder / TEMPLATE_FILE}"
    if not (folder / TEMPLATE_FILE).is_file():
        remedy = f"write chat_template of {folder / 'tokenizer_config.json'} to a file, and --chat-template FILE"
    difference = "the base has none" if served_template is None else "it is not the base's"
    yield "setting", f"it has a chat template, and {difference}; a server has one for all adapters", remedy


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template of chats without tools, which a tokenizer may have among several."""
    template: Any = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _reads_otherwise(tokenizer: PreTrainedTokenizerBase, served: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers of the same tokens differ in the beginning of a text or in what they add to it."""
    return bool(tokenizer("")["input_ids"] != served("")["input_ids"] or tokenizer.bos_token != served.bos_token)


def _end_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> set[int]:
    """Return the ids by which generation ends: the tokenizer's, and those of the folder's configs."""
    values = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        values += value if isinstance(value, list) else [value]
    return {value for value in values if isinstance(value, int)}


def _list(tokens: list[str]) -> str:
    return ", ".join([*map(repr, tokens[:MAX_LISTED]), *(["…"] if len(tokens) > MAX_LISTED else [])])
