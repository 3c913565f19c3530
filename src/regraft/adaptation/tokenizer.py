"""The tokenizer of a base, written beside tuned weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from regraft.transformers_folder import read_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.base import Base


def write_tokenizer(base: Base, into: Path) -> None:
    """Write a base's tokenizer beside tuned weights; a full fine-tune of a decoder has it pad with what its head skips.

    Args:
        base: The base.
        into: The folder, with its `config.json` if it is a full fine-tune.
    """
    from transformers import AutoConfig

    # not the one that texts were encoded with: encoding changes settings of a tokenizer
    tokenizer = copy.deepcopy(base.own_tokenizer) if base.own_tokenizer else read_tokenizer(base.path)
    if base.is_decoder and (into / "config.json").is_file():
        padding = AutoConfig.from_pretrained(into, trust_remote_code=False).get_text_config().pad_token_id
        if padding in tokenizer.all_special_ids:  # any other token would be split off from texts once it is special
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    tokenizer.save_pretrained(into)
