"""Changes of a model's output layers between the units of the targets and standardised units."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation import label_tensor_names
from regraft.model.outputs import unwrap_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import nn

    from regraft.base import Base
    from regraft.task import TaskData

_PEFT_NAME_PARTS = re.compile(r"^base_model\.model\.|modules_to_save\.\w+\.")
"""The parts that PEFT adds to the names of a model's heads."""


@contextlib.contextmanager
def standardised_outputs(model: nn.Module, base: Base, data: TaskData) -> Iterator[None]:
    """Standardise a model's output layers inside the context, without a change of its outputs.

    The targets' mean is subtracted from the layers' biases, and weights and biases are divided by the targets' scale.
    Hooks convert the layers' outputs back, so the model's predictions stay, while an optimiser's steps are as large,
    relative to the outputs, as with targets of unit scale. After the context, the weights and biases are in the units
    of the targets again.

    Args:
        model: A model with a head for the task, with or without an adapter.
        base: The model's base, for the names of the output layers.
        data: The task's data; if the task type does not scale its targets, the context does nothing.
    """
    import torch

    scaling = data.task.target_scaling(data.train.targets)
    if scaling is None:
        yield
        return
    mean, scale = torch.as_tensor(scaling[0]), scaling[1]
    layers = _output_layers(model, base, data)
    standardise_outputs(model, base, data)

    def rescale(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * scale + (mean.to(output) if layer.bias is not None else 0)

    handles = [layer.register_forward_hook(rescale) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore_output_units(model, base, data)


def standardise_outputs(model: nn.Module, base: Base, data: TaskData) -> None:
    """Change a model's output layers from the units of the targets to standardised units, in place.

    Args:
        model: A model with a head for the task, with or without an adapter.
        base: The model's base, for the names of the output layers.
        data: The task's data; if the task type does not scale its targets, nothing changes.
    """
    _transform_output_layers(model, base, data, lambda tensor, mean, scale: (tensor - mean) / scale)


def restore_output_units(model: nn.Module, base: Base, data: TaskData) -> None:
    """Change a model's output layers from standardised units to the units of the targets: undo `standardise_outputs`.

    Args:
        model: A model with a head for the task, with or without an adapter, whose outputs are in standardised units,
            as a fresh head's are.
        base: The model's base, for the names of the output layers.
        data: The task's data; if the task type does not scale its targets, nothing changes.
    """
    _transform_output_layers(model, base, data, lambda tensor, mean, scale: tensor * scale + mean)


def _transform_output_layers(
    model: nn.Module, base: Base, data: TaskData, transform: Callable[[torch.Tensor, Any, float], torch.Tensor]
) -> None:
    """Apply a transform of (tensor, mean, scale) to the output layers in place; weights are scaled but not shifted."""
    import torch

    scaling = data.task.target_scaling(data.train.targets)
    if scaling is None:
        return
    mean, scale = torch.as_tensor(scaling[0]), scaling[1]
    with torch.no_grad():
        for layer in _output_layers(model, base, data):
            layer.weight.copy_(transform(layer.weight, 0.0, scale))
            if layer.bias is not None:
                layer.bias.copy_(transform(layer.bias, mean.to(layer.bias), scale))


def _output_layers(model: nn.Module, base: Base, data: TaskData) -> list[nn.Linear]:
    """Return the linear layers that produce the task's outputs, and a PEFT adapter's copies of these layers."""
    from torch import nn

    output_names = {name.rpartition(".")[0] for name in label_tensor_names(base, data.head.type)}
    layers = []
    for name, module in unwrap_parallel(model).named_modules():
        base_name = _PEFT_NAME_PARTS.sub("", f"{name}.").removesuffix(".")
        if isinstance(module, nn.Linear) and base_name in output_names:
            layers.append(module)
    return layers
