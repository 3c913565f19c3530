"""What the linear layers of a model are fed: the second moments of their inputs on real text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.model.batches import for_each_batch
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from regraft.model.outputs import Output
    from regraft.task.types import Examples

WIDEST = 4096


def input_moments(model: Any, examples: Examples, progress: Progress = silent) -> dict[str, torch.Tensor]:
    """Measure E[x·xᵀ] of the inputs x of each linear layer, over all tokens that are no padding.

    Args:
        model: A model without an adapter.
        examples: What it is run on.
        progress: Told of each batch.

    Returns:
        By the layer's name, [in, in]; for layers wider than 4,096 the diagonal only, [in]. In float64 on the CPU.
    """
    from torch import nn

    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    mask: dict[str, torch.Tensor] = {}

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask["now"] = kwargs["attention_mask"].bool()

    def watch(name: str) -> Any:
        def add(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            fed = args[0]
            rows = fed[mask["now"]] if fed.shape[:-1] == mask["now"].shape else fed.flatten(0, -2)
            rows = rows.double()
            seen = rows.T @ rows if rows.shape[1] <= WIDEST else rows.square().sum(dim=0)
            sums[name] = sums[name] + seen.cpu() if name in sums else seen.cpu()
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(watch(name)))

    def ignore(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        """The hooks have seen what matters."""

    try:
        for_each_batch(model, examples, "fp32", ignore, progress, "inputs")
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}
