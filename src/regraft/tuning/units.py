"""Training output layers on standardised targets, and restoring the targets' own units."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation import label_tensor_names
from regraft.model.outputs import unwrap_parallel

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from regraft.base import Base
    from regraft.task import TaskData

_PEFT_NAME_PARTS = re.compile(r"^base_model\.model\.|modules_to_save\.\w+\.")
"""The parts that PEFT adds to the names of a model's heads."""


@contextlib.contextmanager
def standardised_outputs(model: Any, base: Base, data: TaskData) -> Iterator[None]:
    """Standardise a model's output layers inside the context, without a change of its outputs.

    The layers' weights are divided by the targets' scale, and their outputs multiplied by it: the model predicts the
    same, and an optimiser's steps are as large, relative to the outputs, as with targets of unit scale.

    Args:
        model: A model with a head for the task, with or without an adapter.
        base: The model's base.
        data: The task; if it does not scale its targets, the context does nothing.
    """
    units = data.task.target_scaling(data.train.targets)
    if units is None:
        yield
        return
    mean, scale = units
    layers = _output_layers(model, base, data)
    standardise_outputs(model, base, data)

    def rescale(layer: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        return output * scale + (mean if layer.bias is not None else 0)

    handles = [layer.register_forward_hook(rescale) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore_output_units(model, base, data)


def standardise_outputs(model: Any, base: Base, data: TaskData) -> None:
    """Change a model's output layers from the units of the targets to standardised ones, in place.

    Args:
        model: A model with a head for the task.
        base: The model's base.
        data: The task; if it does not scale its targets, nothing changes.
    """
    _transform_output_layers(model, base, data, lambda value, mean, scale: (value - mean) / scale)


def restore_output_units(model: Any, base: Base, data: TaskData) -> None:
    """Change a model's output layers from standardised units to those of the targets: undo `standardise_outputs`.

    Args:
        model: A model with a head for the task; a fresh head's outputs are in standardised units.
        base: The model's base.
        data: The task; if it does not scale its targets, nothing changes.
    """
    _transform_output_layers(model, base, data, lambda value, mean, scale: value * scale + mean)


def _transform_output_layers(model: Any, base: Base, data: TaskData, transform: Any) -> None:
    import torch

    units = data.task.target_scaling(data.train.targets)
    if units is None:
        return
    mean, scale = units
    with torch.no_grad():
        for layer in _output_layers(model, base, data):
            layer.weight.copy_(transform(layer.weight, 0.0, scale))
            if layer.bias is not None:
                layer.bias.copy_(transform(layer.bias, mean, scale))


def _output_layers(model: Any, base: Base, data: TaskData) -> list[Any]:
    """Return the linear layers that produce the task's outputs, including a PEFT adapter's copies of them."""
    import torch

    names = {name.rpartition(".")[0] for name in label_tensor_names(base, data.head.type)}
    modules = unwrap_parallel(model).named_modules()
    layers = [(name, module) for name, module in modules if isinstance(module, torch.nn.Linear)]
    return [layer for name, layer in layers if _PEFT_NAME_PARTS.sub("", f"{name}.").removesuffix(".") in names]
