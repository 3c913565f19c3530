"""Writing a base's tokenizer into the folder of an adaptation."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from regraft.transformers_folder import read_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.base import Base


def write_tokenizer(base: Base, folder: Path) -> None:
    """Write a base's tokenizer into an adaptation's folder.

    For a full fine-tune of a decoder, the tokenizer is set to pad with the token that the head skips, if that token is
    special.

    Args:
        base: The base.
        folder: The folder, which has a `config.json` if it is a full fine-tune.
    """
    from transformers import AutoConfig

    # a new copy, because encoding texts changes the settings of a tokenizer
    tokenizer = copy.deepcopy(base.tokenizer_override) if base.tokenizer_override else read_tokenizer(base.path)
    if base.is_decoder and (folder / "config.json").is_file():
        padding = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().pad_token_id
        if padding in tokenizer.all_special_ids:  # making another token special would change how texts are split
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    tokenizer.save_pretrained(folder)
