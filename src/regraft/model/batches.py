"""A model's outputs on examples, batches being of similar length."""

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
# architectures in which what fills up a batch reaches the texts past the attention mask: by convolutions over
# neighbouring tokens, pooling, Fourier transforms, or approximate attention over blocks and hashes
MIXING = {"canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "yoso"}


def plan_batches(model: nn.Module, examples: Examples, *, equal: bool = False) -> list[list[int]]:
    """Divide examples into batches of similar length, the longest first; of equal length for MIXING architectures.

    Args:
        model: A model with a head.
        examples: What it is to be run on.
        equal: Whether the lengths are to be equal, whatever the architecture.

    Returns:
        The indices of each batch's examples.
    """
    lengths = examples.lengths.tolist()
    order = sorted(range(len(examples)), key=lambda index: -lengths[index])
    equal = equal or unwrap_model(model).config.model_type in MIXING
    groups = [list(group) for _, group in itertools.groupby(order, lambda index: lengths[index] if equal else 0)]
    return [group[start : start + BATCH_SIZE] for group in groups for start in range(0, len(group), BATCH_SIZE)]


def for_each_batch(
    model: nn.Module,
    examples: Examples,
    precision: str,
    use: Callable[[Output, dict[str, torch.Tensor], list[int]], None],
    progress: Progress = silent,
    stage: str = "predict",
    *,
    hidden: bool = False,
) -> None:
    """Run a model over examples in evaluation mode, without gradients.

    Args:
        model: A model with a head; its mode is restored afterwards.
        examples: What to run it on.
        precision: `bf16` or `fp32`.
        use: Called with the output, the batch and the indices of its examples.
        progress: Told of each batch.
        stage: What to call this there.
        hidden: Whether the output has hidden states.
    """
    import torch

    on = next(model.parameters()).device
    done = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, on):
            for indices in plan_batches(model, examples):
                batch = {name: tensor.to(on) for name, tensor in examples.batch(indices).items()}
                use(forward(model, batch, hidden=hidden), batch, indices)
                done += len(indices)
                progress(stage, done, len(examples), {})
    finally:
        model.train(was_training)


def predict(model: nn.Module, examples: Examples, precision: str, progress: Progress = silent) -> torch.Tensor:
    """Compute a model's logits.

    Args:
        model: A model with a head.
        examples: What to run it on.
        precision: `bf16` or `fp32`.
        progress: Told of each batch.

    Returns:
        Logits, rows × outputs, in float32 on the CPU, in the order of the examples.
    """
    import torch

    parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        parts.append((batch["row"].cpu(), output.logits.cpu()))

    for_each_batch(model, examples, precision, keep, progress)
    logits = torch.empty(len(examples.targets), parts[0][1].shape[1])
    for rows, part in parts:
        logits[rows] = part
    return logits
