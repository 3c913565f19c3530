"""What an upgrade brought and what a deployment loses of it: models measured on the texts or the task of `keep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint import temporary_folder
from regraft.errors import DataError
from regraft.model.batches import for_each_batch
from regraft.model.corpus import Corpus, pack
from regraft.model.deployment import Deployment
from regraft.model.device import deploy
from regraft.progress import Progress, silent
from regraft.task import Task, read_task
from regraft.task.types import Examples
from regraft.task.types.answer_metrics import LOSS
from regraft.task.types.token_likelihood import TOKENS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.base import Base
    from regraft.model.outputs import Output
    from regraft.task import Metric, TaskData

TASK_SUFFIXES = (".yaml", ".yml")
"""The suffixes of task files; any other file of `keep` has texts."""
BLOCK_TOKENS = 256
"""Tokens per block of text: more context than most sentences need, and within the input length of every decoder."""
MAX_BLOCKS = 64
"""The most blocks of text, 16,384 tokens: a standard error of some 0.02 nats, and seconds per model on a CPU."""
SPLIT_SEED = 0
"""The seed by which dev is held out of a task that has none, so that all models are measured on the same examples."""


def keep_source(task: Task) -> str | None:
    """Return the file of texts or the task file that a task names in `keep`; None if it names none."""
    return getattr(task, "keep", None)  # only some task types have the key


def check_keep(task: Task) -> None:
    """Check that what a task names in `keep` can be read, before models run for long.

    Args:
        task: The task, with or without `keep`.

    Raises:
        DataError: A file is missing or malformed, or is a task whose models write no text.
    """
    keep_digest(task)


def keep_digest(task: Task) -> str | None:
    """Return the digest of the texts or of the task's data that a task names in `keep`; None if it names none.

    Args:
        task: The task, with or without `keep`.

    Raises:
        DataError: A file is missing or malformed.
    """
    keep = keep_source(task)
    if keep is None:
        return None
    return _load_task(keep).digest() if _is_task(keep) else Corpus((keep,)).digest()


def keep_metric(task: Task) -> Metric | None:
    """Return the metric of a task's `keep`: that of the task file, or for texts the loss in nats per token.

    Args:
        task: The task; None is returned if it has no `keep`.

    Raises:
        DataError: The task file of `keep` is malformed.
    """
    keep = keep_source(task)
    if keep is None:
        return None
    return _load_task(keep).scoring if _is_task(keep) else LOSS


def measure_keep(
    model: nn.Module, base: Base, data: TaskData, precision: str, progress: Progress = silent
) -> float | None:
    """Measure a language model on what the task names in `keep`: texts, or the test split of a task.

    Texts are measured on at most `MAX_BLOCKS` blocks of `BLOCK_TOKENS` tokens. Losses of models with different
    vocabularies are per token of their own, and cannot be compared. A task without a test split is measured on dev.

    Args:
        model: A language model, with or without an adapter; it is moved to the device.
        base: The model's base, for its tokenizer.
        data: The data of the task that has `keep`.
        precision: `bf16` or `fp32`.
        progress: Called after each batch.

    Returns:
        The score by `keep_metric`; None if the task has no `keep`.

    Raises:
        DataError: The texts or the task cannot be read, the texts are too short, or the task's models write no text.
    """
    keep = keep_source(data.task)
    if keep is None:
        return None
    if not _is_task(keep):
        return _loss_on_texts(model, base, keep, precision, progress)
    measured = _load_task(keep)
    return Deployment(model, base, measured, precision, progress).score(measured.test or measured.dev)


def _is_task(keep: str) -> bool:
    return Path(keep).suffix.lower() in TASK_SUFFIXES


def _load_task(path: str) -> TaskData:
    """Read a task that language models can be measured on."""
    data = read_task(Task.load(path), SPLIT_SEED)  # without the warnings of `load_data`, for each model again
    if not data.task.head_in_base:
        raise DataError(
            f"{path}: `keep` names a task of type {data.task.type}, which needs a head that bases lack. Name a text "
            "file or a task of type text-generation."
        )
    data.require_labels("`keep`")
    return data


def _loss_on_texts(model: nn.Module, base: Base, file: str, precision: str, progress: Progress) -> float:
    """Return a language model's mean loss in nats per token of the texts of a file."""
    size = min(BLOCK_TOKENS, base.max_input_length)
    with temporary_folder() as folder:
        # copied, because the file of the blocks is deleted with the folder
        blocks = np.array(pack(Corpus((file,)), base, size, folder / "tokens.bin", progress)[:MAX_BLOCKS])
    return loss_on_blocks(model, base, blocks, precision, progress)


def loss_on_blocks(
    model: nn.Module,
    base: Base,
    blocks: np.ndarray[Any, np.dtype[np.uint32]],
    precision: str,
    progress: Progress = silent,
) -> float:
    """Compute the loss of a language model on text, whose logits are computed chunk by chunk.

    Args:
        model: A decoder with its head, with or without an adapter; it is moved to the device.
        base: The model's base.
        blocks: Token ids, blocks × tokens, from `pack`.
        precision: `bf16` or `fp32`.
        progress: Called after each batch.

    Returns:
        The mean cross-entropy in nats of all tokens but the first of each block.
    """
    examples = Examples(
        columns={"input_ids": blocks.tolist()},
        targets=blocks[:, 1:].astype(np.int64).ravel(),
        pad={"input_ids": base.pad_id},
        tokens=[list(range(blocks.shape[1] - 1))] * len(blocks),
        are_targets_tokens=True,
    )
    total = 0.0

    def add(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        nonlocal total
        total += float(TOKENS.loss(output.logits, batch["targets"]).double().sum())

    for_each_batch(deploy(model, precision), examples, precision, add, progress, "keep")
    return total / len(examples.targets)
