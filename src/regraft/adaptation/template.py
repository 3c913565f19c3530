"""The tokenizer, chat template and end of text with which a language model is deployed on either base."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from regraft.adaptation.tokens import match_token_rows
from regraft.base_tokens import read_end_ids
from regraft.errors import MAX_LISTED
from regraft.transformers_folder import read_tokenizer
from regraft.vocabulary import has_tokenizer, merged_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.task import Task
    from regraft.upgrade import Upgrade

logger = logging.getLogger(__name__)


def with_deployment_tokenizers(adaptation: Adaptation, upgrade: Upgrade, task: Task) -> Upgrade:
    """Return an upgrade whose bases read and end texts as the adaptation does, with the chat template of the task.

    The template, the special tokens and the tokens that end a text are part of the old deployment's behaviour. So the
    new deployment keeps those of the adaptation, or else of the old base, unless the task names others. Texts are
    divided into tokens by the adaptation's tokenizer on both sides, and ids are mapped by token. Differences from the
    new base's tokenizer are logged.

    Args:
        adaptation: An adaptation of `upgrade.old`.
        upgrade: The two bases, as `with_adaptation_tokens` returns them.
        task: The task, whose type may have the key `template`.

    Returns:
        The upgrade; unchanged if the head of the task's models is not the base's own.
    """
    if not task.head_in_base:
        return upgrade
    old, new = upgrade.old, upgrade.new
    source = copy.deepcopy(old.tokenizer_override or adaptation.tokenizer or read_tokenizer(old.path))
    template, template_text = task.chat_template
    if template_text is not None and not source.chat_template:
        source.chat_template = template_text  # the old deployment has none to keep
    old = old.with_tokenizer(source)
    match = match_token_rows(adaptation, upgrade)
    end_ids = adaptation_end_ids(adaptation, old)
    old = old.with_end_ids(end_ids)
    own = read_tokenizer(new.path)
    _log_differences(source, own, end_ids, new)
    if match is None:
        target = copy.deepcopy(own if template == "new-base" else source)
        new_end_ids = new.end_ids if template == "new-base" else end_ids
        texts = None
    else:
        folder = adaptation.path if has_tokenizer(adaptation.path) else old.path
        target = new.tokenizer_override or merged_tokenizer(new.path, folder, match)
        if template == "new-base":
            target.chat_template = own.chat_template
        texts = source
        ids = target.get_vocab()
        tokens = source.convert_ids_to_tokens(sorted(end_ids))
        new_end_ids = frozenset(ids[token] for token in tokens if token in ids)
    if template_text is not None:
        target.chat_template = template_text
    if texts is not None:
        texts = copy.deepcopy(texts)
        texts.chat_template = target.chat_template
    new = new.with_tokenizer(target, text_tokenizer=texts).with_end_ids(new_end_ids)
    return upgrade.with_bases(old, new)


def with_task_template(base: Base, task: Task) -> Base:
    """Return a base with the chat template that a task names by a file; without one, the base itself.

    Args:
        base: The base.
        task: The task, whose type may have the key `template`.
    """
    template_text = task.chat_template[1] if task.head_in_base else None
    if template_text is None:
        return base
    tokenizer = read_tokenizer(base.path)
    tokenizer.chat_template = template_text
    return base.with_tokenizer(tokenizer)


def with_adaptation_texts(adaptation: Adaptation, base: Base) -> Base:
    """Return a base that reads and ends texts as an adaptation of it does.

    Args:
        adaptation: The adaptation.
        base: Its base, with the tokens that only the adaptation has.
    """
    tokenizer = base.tokenizer_override or adaptation.tokenizer or read_tokenizer(base.path)
    return base.with_tokenizer(tokenizer).with_end_ids(adaptation_end_ids(adaptation, base))


def text_digest(*bases: Base) -> str:
    """Hash the chat templates and the tokens that end a text, which the weights' fingerprints do not include.

    Args:
        *bases: The bases, as `with_deployment_tokenizers` or `with_task_template` returns them.

    Returns:
        A hexadecimal SHA-256 digest.
    """
    settings = [[base.tokenizer.chat_template, sorted(base.end_ids)] for base in bases]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def adaptation_end_ids(adaptation: Adaptation, old: Base) -> frozenset[int]:
    """Return the ids of the tokens that end a text of the old deployment, besides its tokenizer's.

    Args:
        adaptation: The adaptation, whose folder may have a `generation_config.json`.
        old: The old base.
    """
    own = read_end_ids(adaptation.path)
    return old.end_ids if own is None else own


def _log_differences(
    source: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, end_ids: frozenset[int], new: Base
) -> None:
    differences = list(_differences(source, own))
    new_ends = own.convert_ids_to_tokens(sorted(new.end_ids))
    old_ends = source.convert_ids_to_tokens(sorted(end_ids))
    if set(new_ends) != set(old_ends):
        differences.append(f"texts end by {_list(old_ends)}, not {_list(new_ends)}")
    if differences:
        logger.warning(
            "The old deployment differs from %s: %s. What it has is used on the new base too, unless the task's "
            "`template` says otherwise.",
            new.path,
            "; ".join(differences),
        )


def _differences(source: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> Iterator[str]:
    if source.chat_template != own.chat_template:
        yield "the chat template is another" if own.chat_template else "the new base has no chat template"
    for name in ("bos_token", "eos_token"):
        if getattr(source, name) != getattr(own, name):
            yield f"{name} is {getattr(source, name)!r}, not {getattr(own, name)!r}"


def _list(tokens: Any) -> str:
    return ", ".join(map(repr, tokens[:MAX_LISTED])) or "none"
