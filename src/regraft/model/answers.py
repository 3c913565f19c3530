"""Answers that a language model writes to prompts: greedy for evaluation, sampled for training."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError
from regraft.model.batches import PADDING_SENSITIVE
from regraft.model.device import autocast
from regraft.model.examples import check_known
from regraft.model.outputs import unwrap_model, unwrap_parallel
from regraft.progress import quiet, silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.task import Split, TaskData

MAX_BATCH_TOKENS = 2**14
"""The most tokens of a batch, prompts and answers together: a cache of 0.4 GB for a model of 30 layers and a width of
576 in float32, and more rows than make decoding faster."""
MAX_BATCH_SIZE = 64
"""The most prompts of a batch: a larger one waits longer for its longest answer."""


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """The settings with which a model writes answers.

    Args:
        stop_ids: The ids of the tokens that end an answer.
        max_new_tokens: The most tokens of an answer, including the token that ends it.
        pad_id: The token id that prompts are padded with, on the left.
        sampling_seed: The seed of answers that are sampled at temperature 1; None for greedy answers.
    """

    stop_ids: frozenset[int]
    max_new_tokens: int
    pad_id: int
    sampling_seed: int | None = None


def answer_settings(base: Base, data: TaskData, sampling_seed: int | None = None) -> AnswerSettings:
    """Return the settings with which models on a base answer a task's prompts.

    Args:
        base: The base, for its tokenizer and the tokens that its `generation_config.json` ends texts with.
        data: The task's data, whose type writes answers.
        sampling_seed: As in `AnswerSettings`.
    """
    stop_ids = data.task.stop_ids(base.tokenizer) | base.end_ids
    return AnswerSettings(frozenset(stop_ids), data.task.max_answer_tokens, base.pad_id, sampling_seed)


def encode_prompts(base: Base, data: TaskData, split: Split) -> list[list[int]]:
    """Tokenise the prompts of a split, such that answers of `max_new_tokens` fit behind them.

    Args:
        base: The base, for its tokenizer and its maximum input length.
        data: The task's data, whose type writes answers.
        split: The split of the data.

    Raises:
        DataError: The answers leave no room for prompts, or the tokenizer makes no token of a prompt.
    """
    room = base.max_input_length - data.task.max_answer_tokens
    if room < 1:
        raise DataError(
            f"task {data.name!r}: max_new_tokens is {data.task.max_answer_tokens:,}, but {base.path} takes "
            f"{base.max_input_length:,} tokens, prompt and answer together. Lower it."
        )
    tokenizer = base.text_tokenizer or base.tokenizer
    prompts = data.task.encode_prompts(split, tokenizer, min(data.max_length, room))
    for row_number, ids in zip(split.row_numbers.tolist(), prompts, strict=True):
        if not ids:
            raise DataError(
                f"{split.source}, row {row_number}: the tokenizer of {base.path} makes no token of the prompt. Remove "
                "the row."
            )
    if base.text_tokenizer is not None:
        check_known(base, prompts, split)
        return [base.text_ids[ids].tolist() for ids in prompts]
    base.check_tokens(tokenizer, {token for ids in prompts for token in ids})
    return prompts


def generate_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: AnswerSettings,
    precision: str,
    progress: Progress = silent,
) -> list[list[int]]:
    """Let a language model answer prompts, in batches of similar length that are padded on the left.

    Args:
        model: The language model, with or without an adapter; its mode is restored.
        prompts: The token ids of each prompt.
        settings: The settings; those in the model's `generation_config`, such as a repetition penalty, are not used.
        precision: `bf16` or `fp32`.
        progress: Called after each batch.

    Returns:
        The token ids of each answer, up to and including the token that ends it.
    """
    import torch
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    is_sampled = settings.sampling_seed is not None
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=is_sampled,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(settings.stop_ids),
        pad_token_id=settings.pad_id,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if is_sampled else {}),
    )
    answers: list[list[int]] = [[] for _ in prompts]
    num_answered = 0
    with torch.no_grad(), autocast(precision, device), _generating(model), _sampling(settings.sampling_seed, device):
        equal_length = unwrap_model(model).config.model_type in PADDING_SENSITIVE or _has_virtual_tokens(model)
        for indices in _plan_batches([len(prompt) for prompt in prompts], settings.max_new_tokens, equal_length):
            width = max(len(prompts[index]) for index in indices)
            padded = [[settings.pad_id] * (width - len(prompts[index])) + list(prompts[index]) for index in indices]
            mask = [[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in indices]
            with quiet():
                output = unwrap_parallel(model).generate(
                    input_ids=torch.tensor(padded, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    generation_config=config,
                )
            for index, ids in zip(indices, output[:, width:].tolist(), strict=True):
                answers[index] = _until_stop(ids, settings.stop_ids)
            num_answered += len(indices)
            progress("answer", num_answered, len(prompts), {})
    return answers


def _has_virtual_tokens(model: nn.Module) -> bool:
    """Return whether an adapter puts virtual tokens first: padding would separate them from the prompt.

    PEFT ignores positions, so that the distance of a token to the virtual tokens would depend on the padding.
    """
    config = getattr(unwrap_parallel(model), "active_peft_config", None)
    return bool(config and config.is_prompt_learning)


def _plan_batches(lengths: Sequence[int], max_new_tokens: int, equal_length: bool) -> Iterator[list[int]]:
    """Divide prompts into batches of similar or equal length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        width = lengths[order[0]] + max_new_tokens
        size = max(1, min(MAX_BATCH_SIZE, MAX_BATCH_TOKENS // width))
        if equal_length:
            size = min(size, sum(lengths[index] == lengths[order[0]] for index in order))
        yield order[:size]
        order = order[size:]


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    """Return the ids up to and including the first that ends an answer."""
    end = next((position + 1 for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


@contextlib.contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Switch a model to evaluation mode, without the generation settings of its own, inside the context."""
    from transformers import GenerationConfig

    inner = unwrap_model(model)
    own_config, was_training, use_cache = inner.generation_config, model.training, inner.config.use_cache
    # transformers completes a config that is passed by the model's own, which may have a repetition penalty
    inner.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    inner.config.use_cache = True
    # torch copies the head's weights for each row of a batch if the states are a slice, as those of the last tokens are
    hook = inner.get_output_embeddings().register_forward_pre_hook(lambda _, states: (states[0].contiguous(),))
    model.eval()
    try:
        yield
    finally:
        hook.remove()
        inner.generation_config = own_config
        inner.config.use_cache = use_cache
        model.train(was_training)


@contextlib.contextmanager
def _sampling(seed: int | None, device: Any) -> Iterator[None]:
    """Seed the generators of random numbers inside the context; do nothing without a seed."""
    import torch

    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
