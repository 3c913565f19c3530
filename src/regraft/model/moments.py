"""Second moments of the inputs of a model's linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.model.batches import for_each_batch
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from regraft.model.outputs import Output
    from regraft.task.types import Examples

MAX_FULL_WIDTH = 4096
"""The width up to which all moments of a layer's inputs are kept, 128 MB in float64; of wider ones, the diagonal."""


def input_moments(model: Any, examples: Examples, progress: Progress = silent) -> dict[str, torch.Tensor]:
    """Compute E[x·xᵀ] over the inputs x of each linear layer, at all tokens that are not padding.

    Args:
        model: A model without an adapter.
        examples: The examples to run it on.
        progress: A callback for each batch.

    Returns:
        The second moments by layer name, [in, in], or only their diagonal, [in], for layers wider than 4,096; in
        float64 on the CPU.
    """
    from torch import nn

    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    mask: Any = None

    def store_mask(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal mask
        mask = kwargs["attention_mask"].bool()

    def accumulate_for(name: str) -> Any:
        def accumulate(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            inputs = args[0]
            rows = inputs[mask] if inputs.shape[:-1] == mask.shape else inputs.flatten(0, -2)
            rows = rows.double()
            moments = rows.T @ rows if rows.shape[1] <= MAX_FULL_WIDTH else rows.square().sum(dim=0)
            sums[name] = sums[name] + moments.cpu() if name in sums else moments.cpu()
            counts[name] = counts.get(name, 0) + len(rows)

        return accumulate

    def ignore(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        """Do nothing: the hooks have accumulated the moments."""

    handles = [model.register_forward_pre_hook(store_mask, with_kwargs=True)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(accumulate_for(name)))
    try:
        for_each_batch(model, examples, "fp32", ignore, progress, "inputs")
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}
