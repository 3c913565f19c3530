"""Second moments of the inputs of a model's linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.model.batches import for_each_batch
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from regraft.model.outputs import Output
    from regraft.task.types import Examples

MAX_FULL_WIDTH = 4096
"""The most inputs of a layer whose moments are computed in full: 128 MiB in float64. Of layers with more inputs, only
the diagonal is computed."""


def input_moments(model: nn.Module, examples: Examples, progress: Progress = silent) -> dict[str, torch.Tensor]:
    """Compute E[x·xᵀ] over the inputs x of each linear layer, without the inputs at padding tokens.

    Args:
        model: A model with a head and without an adapter; its mode is restored.
        examples: The tokenised examples that the model is run on.
        progress: Called after each batch.

    Returns:
        The second moments by layer name, inputs × inputs; of layers with more inputs than `MAX_FULL_WIDTH`, only the
        diagonal, one value per input. In float64 on the CPU.
    """
    from torch import nn

    sums: dict[str, torch.Tensor] = {}
    num_inputs: dict[str, int] = {}
    mask: Any = None

    def store_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal mask
        mask = kwargs["attention_mask"].bool()

    def accumulate_for(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def accumulate(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            is_per_token = args[0].shape[:-1] == mask.shape
            inputs = (args[0][mask] if is_per_token else args[0].flatten(0, -2)).double()
            moments = inputs.T @ inputs if inputs.shape[1] <= MAX_FULL_WIDTH else inputs.square().sum(dim=0)
            sums[name] = sums[name] + moments.cpu() if name in sums else moments.cpu()
            num_inputs[name] = num_inputs.get(name, 0) + len(inputs)

        return accumulate

    def ignore(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        """Do nothing: the hooks accumulate the moments."""

    handles = [model.register_forward_pre_hook(store_mask, with_kwargs=True)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(accumulate_for(name)))
    try:
        for_each_batch(model, examples, "fp32", ignore, progress, "inputs")
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / num_inputs[name] for name, total in sums.items()}
