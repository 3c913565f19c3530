"""Output layers in other units than a task's targets have, for the time of a training."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation import label_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from regraft.base import Base
    from regraft.task import TaskData

_WRAPPED = re.compile(r"^base_model\.model\.|modules_to_save\.\w+\.")
"""What PEFT puts into the names of a model's heads."""


@contextlib.contextmanager
def standardised_outputs(model: Any, base: Base, data: TaskData) -> Iterator[None]:
    """Train a model's output layers in the units that its task says, whatever the targets' own are.

    The layers are divided by the unit while the block runs, and their outputs multiplied by it: what a model says of
    an input stays as it is. An optimiser's steps are then as large as they are where targets are of the size of 1.

    Args:
        model: A model with a head for the task, with or without an adapter.
        base: The base it lives on.
        data: The task.

    Yields:
        Nothing; where the task says no units, nothing is done.
    """
    units = data.task.target_scaling(data.train.targets)
    if units is None:
        yield
        return
    layers = _output_layers(model, base, data)
    standardise_outputs(model, base, data)

    def multiply(layer: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        return output * units[1] + (units[0] if layer.bias is not None else 0)

    handles = [layer.register_forward_hook(multiply) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore_output_units(model, base, data)


def standardise_outputs(model: Any, base: Base, data: TaskData) -> None:
    """Have a model say in units of its task what it says in those of the targets.

    Args:
        model: A model with a head for the task.
        base: The base it lives on.
        data: The task.
    """
    _change(model, base, data, lambda value, offset, unit: (value - offset) / unit)


def restore_output_units(model: Any, base: Base, data: TaskData) -> None:
    """Have a model say in the targets' units what it says in those of its task: the reverse of `standardise_outputs`.

    Args:
        model: A model with a head for the task, as a fresh one.
        base: The base it lives on.
        data: The task.
    """
    _change(model, base, data, lambda value, offset, unit: value * unit + offset)


def _change(model: Any, base: Base, data: TaskData, rule: Any) -> None:
    import torch

    units = data.task.target_scaling(data.train.targets)
    if units is None:
        return
    with torch.no_grad():
        for layer in _output_layers(model, base, data):
            layer.weight.copy_(rule(layer.weight, 0.0, units[1]))
            if layer.bias is not None:
                layer.bias.copy_(rule(layer.bias, *units))


def _output_layers(model: Any, base: Base, data: TaskData) -> list[Any]:
    """Find the layers whose outputs are the task's, a PEFT adapter's copies among them."""
    import torch

    names = {name.rpartition(".")[0] for name in label_tensors(base, data.head.type)}
    modules = getattr(model, "module", model).named_modules()
    layers = [(name, module) for name, module in modules if isinstance(module, torch.nn.Linear)]
    return [layer for name, layer in layers if _WRAPPED.sub("", f"{name}.").removesuffix(".") in names]
