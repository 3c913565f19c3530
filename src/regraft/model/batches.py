"""Passes of a model over examples, in batches of similar length."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from regraft.model.device import autocast
from regraft.model.outputs import forward, unwrap_model
from regraft.progress import silent
from regraft.task.types.token_logits import TokenLogits

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from regraft.model.outputs import Output
    from regraft.progress import Progress
    from regraft.task.types import Examples

BATCH_SIZE = 64
"""The most examples in a batch, few enough for the memory of common accelerators at common input lengths."""
PADDING_SENSITIVE = {"canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "yoso"}
"""The model types in which padding affects an example in spite of the attention mask: by convolutions over neighbouring
tokens, pooling, Fourier transforms, or approximate attention over blocks and hashes."""


def plan_batches(model: nn.Module, examples: Examples, *, equal_length: bool = False) -> list[list[int]]:
    """Divide examples into batches of similar length, the longest first.

    Args:
        model: A model with a head; if it is `PADDING_SENSITIVE`, each batch has examples of equal length.
        examples: The tokenised examples.
        equal_length: Whether each batch has examples of equal length for any model.

    Returns:
        For each batch, the indices of its examples.
    """
    lengths = examples.lengths.tolist()
    order = sorted(range(len(examples)), key=lambda index: -lengths[index])
    sequences = [order]
    if equal_length or unwrap_model(model).config.model_type in PADDING_SENSITIVE:
        sequences = [list(indices) for _, indices in itertools.groupby(order, lambda index: lengths[index])]
    batches = []
    for indices in sequences:
        batches += [indices[start : start + BATCH_SIZE] for start in range(0, len(indices), BATCH_SIZE)]
    return batches


def for_each_batch(
    model: nn.Module,
    examples: Examples,
    precision: str,
    consume: Callable[[Output, dict[str, torch.Tensor], list[int]], None],
    progress: Progress = silent,
    stage: str = "predict",
    *,
    hidden: bool = False,
) -> None:
    """Run a model over examples in evaluation mode, without gradients.

    Args:
        model: A model with a head; its mode is restored.
        examples: The tokenised examples.
        precision: `bf16` or `fp32`.
        consume: Called for each batch with the output, the batch and the indices of its examples.
        progress: Called after each batch.
        stage: The name of the pass in progress messages.
        hidden: Whether the output has hidden states.
    """
    import torch

    device = next(model.parameters()).device
    num_examples = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, device):
            for indices in plan_batches(model, examples):
                batch = {name: tensor.to(device) for name, tensor in examples.batch(indices).items()}
                consume(forward(model, batch, hidden=hidden), batch, indices)
                num_examples += len(indices)
                progress(stage, num_examples, len(examples), {})
    finally:
        model.train(was_training)


def predict(model: nn.Module, examples: Examples, precision: str, progress: Progress = silent) -> Any:
    """Compute a model's logits.

    Args:
        model: A model with a head; its mode is restored.
        examples: The tokenised examples.
        precision: `bf16` or `fp32`.
        progress: Called after each batch.

    Returns:
        The logits, rows × outputs, in float32 on the CPU, in the order of the examples; of a language model, the states
        that its head reads, with the head.
    """
    import torch

    row_indices: list[torch.Tensor] = []
    logits: list[Any] = []

    def collect(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        row_indices.append(batch["row"].cpu())
        logits.append(output.logits.cpu())

    for_each_batch(model, examples, precision, collect, progress)
    order = torch.cat(row_indices).argsort()
    if isinstance(logits[0], TokenLogits):
        # of a head with tuned rows, each batch has a copy of its own with the same values
        return TokenLogits(torch.cat([batch_logits.states for batch_logits in logits]), logits[0].head)[order]
    return torch.cat(logits)[order]
