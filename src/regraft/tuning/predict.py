"""A model's outputs on examples, batches being of similar length."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from regraft.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from regraft.progress import Progress
    from regraft.tuning.examples import Examples

BATCH = 64


def device() -> torch.device:
    """Tell where models run.

    Returns:
        The accelerator if there is one, else the CPU.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def autocast(precision: str, on: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute in bfloat16 where that was asked for.

    Args:
        precision: `bf16` or `fp32`.
        on: The device.

    Returns:
        A context manager.
    """
    import torch

    return torch.autocast(on.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def for_each_batch(
    model: nn.Module,
    examples: Examples,
    precision: str,
    use: Callable[[Any, dict[str, torch.Tensor], list[int]], None],
    progress: Progress = silent,
    stage: str = "predict",
    **arguments: Any,
) -> None:
    """Run a model over examples in evaluation mode, without gradients.

    Args:
        model: A classifier; its mode is restored afterwards.
        examples: What to run it on.
        precision: `bf16` or `fp32`.
        use: Called with the output, the batch and the indices of its examples.
        progress: Told of each batch.
        stage: What to call this there.
        arguments: Passed to the model, as `output_hidden_states`.
    """
    import torch

    on = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: -len(examples.columns["input_ids"][i]))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, on):
            for start in range(0, len(order), BATCH):
                indices = order[start : start + BATCH]
                batch = {name: tensor.to(on) for name, tensor in examples.batch(indices).items()}
                inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
                use(model(**inputs, **arguments), batch, indices)
                progress(stage, start + len(indices), len(order), {})
    finally:
        model.train(was_training)


def predict(model: nn.Module, examples: Examples, precision: str, progress: Progress = silent) -> torch.Tensor:
    """Compute a classifier's logits.

    Args:
        model: A classifier.
        examples: What to run it on.
        precision: `bf16` or `fp32`.
        progress: Told of each batch.

    Returns:
        Logits, examples × classes, in float32 on the CPU, in the order of the examples.
    """
    import torch

    rows: list[tuple[list[int], torch.Tensor]] = []

    def keep(output: Any, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        rows.append((indices, output.logits.float().cpu()))

    for_each_batch(model, examples, precision, keep, progress)
    logits = torch.empty(len(examples), rows[0][1].shape[1])
    for indices, part in rows:
        logits[indices] = part
    return logits
