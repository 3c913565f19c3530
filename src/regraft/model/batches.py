"""Running a model over examples, in batches of similar length."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from regraft.model.device import autocast
from regraft.model.outputs import forward, unwrap_model
from regraft.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from regraft.model.outputs import Output
    from regraft.progress import Progress
    from regraft.task.types import Examples

BATCH_SIZE = 64
"""The number of examples in a batch, small enough for the memory of common accelerators at common input lengths."""
PADDING_SENSITIVE = {"canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "yoso"}
"""The architectures in which padding affects an example in spite of the attention mask: by convolutions over
neighbouring tokens, pooling, Fourier transforms, or approximate attention over blocks and hashes."""


def plan_batches(model: nn.Module, examples: Examples, *, equal_length: bool = False) -> list[list[int]]:
    """Divide examples into batches of similar length, the longest first; of equal length if padding affects outputs.

    Args:
        model: A model with a head.
        examples: The examples.
        equal_length: Whether to form batches of equal length for any architecture.

    Returns:
        The indices of each batch's examples.
    """
    lengths = examples.lengths.tolist()
    order = sorted(range(len(examples)), key=lambda index: -lengths[index])
    groups = [order]
    if equal_length or unwrap_model(model).config.model_type in PADDING_SENSITIVE:
        groups = [list(group) for _, group in itertools.groupby(order, lambda index: lengths[index])]
    return [group[start : start + BATCH_SIZE] for group in groups for start in range(0, len(group), BATCH_SIZE)]


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
        examples: The examples.
        precision: `bf16` or `fp32`.
        consume: A function of the output, the batch and the indices of its examples, called for each batch.
        progress: A callback for each batch.
        stage: The name of the stage in progress messages.
        hidden: Whether to return hidden states in the output.
    """
    import torch

    device = next(model.parameters()).device
    count = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, device):
            for indices in plan_batches(model, examples):
                batch = {name: tensor.to(device) for name, tensor in examples.batch(indices).items()}
                consume(forward(model, batch, hidden=hidden), batch, indices)
                count += len(indices)
                progress(stage, count, len(examples), {})
    finally:
        model.train(was_training)


def predict(model: nn.Module, examples: Examples, precision: str, progress: Progress = silent) -> torch.Tensor:
    """Compute a model's logits.

    Args:
        model: A model with a head.
        examples: The examples.
        precision: `bf16` or `fp32`.
        progress: A callback for each batch.

    Returns:
        The logits, rows × outputs, in float32 on the CPU, in the order of the examples.
    """
    import torch

    parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def collect(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        parts.append((batch["row"].cpu(), output.logits.cpu()))

    for_each_batch(model, examples, precision, collect, progress)
    logits = torch.empty(len(examples.targets), parts[0][1].shape[1])
    for rows, part in parts:
        logits[rows] = part
    return logits
