"""Changes of a model's output layers between the units of the targets and standardised units."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation import fresh_model, label_tensor_names
from regraft.errors import MismatchError
from regraft.model.batches import predict
from regraft.model.device import device
from regraft.model.examples import encode
from regraft.model.outputs import unwrap_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import nn

    from regraft.base import Base
    from regraft.task import TaskData
    from regraft.task.metric import Floats

_PEFT_NAME_PARTS = re.compile(r"^base_model\.model\.|modules_to_save\.\w+\.")
"""The parts that PEFT adds to the names of a model's heads."""
MAX_MEAN_EXAMPLES = 256
"""The most training texts on which an output layer without a bias is fitted to the targets' mean."""
MEAN_RIDGE = 0.01
"""The penalty of that fit, relative to the mean square of the features: small, since the fit must be close."""
MAX_MEAN_ERROR = 5.0
"""The largest error of that fit, in deviations of the targets, from which a training starts. Arbitrary: from a larger
one, little but the mean would be learnt."""


@contextlib.contextmanager
def standardised_outputs(model: nn.Module, base: Base, data: TaskData) -> Iterator[None]:
    """Standardise a model's output layers inside the context, without a change of its outputs.

    The targets' mean is subtracted from the layers' biases, and weights and biases are divided by the targets' scale.
    A layer without a bias is only divided by the scale. Hooks convert the layers' outputs back, in float32, so the
    model's predictions stay, while an optimiser's steps are as large, relative to the outputs, as with targets of unit
    scale. After the context, the weights and biases are in the units of the targets again.

    Args:
        model: A model with a head for the task, with or without an adapter.
        base: The model's base, for the names of the output layers.
        data: The task's data; if the task type does not scale its targets, the context does nothing.
    """
    scaling = data.task.target_scaling(data.train.targets)
    if scaling is None:
        yield
        return
    mean, scale = scaling
    layers = _output_layers(model, base, data)
    standardise_outputs(model, base, data)

    def rescale(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float() * scale + (mean if layer.bias is not None else 0)  # bf16 would round a large mean

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


def fresh_scaled_model(base: Base, data: TaskData, seed: int, *, frozen: bool = False) -> Any:
    """Build a base with a fresh head whose outputs begin where the task type says, in the units of the targets.

    Args:
        base: The base.
        data: The task's data. If its type neither scales its targets nor has `initial_outputs`, the head is as
            `fresh_model` builds it.
        seed: The seed of the head's initialisation.
        frozen: Whether the base will not be trained, as in `fresh_model`.

    Returns:
        The model, in float32 (see `frozen`) on the CPU.

    Raises:
        CheckpointError: A tensor of the base is missing, unexpected or misshapen.
        MismatchError: The head has no bias, and the mean of the targets is too far from 0 to be learnt without.
    """
    model = fresh_model(base, data.head, seed, frozen=frozen)
    initial_outputs = data.task.initial_outputs(data.train.targets) if data.labelled else None
    if initial_outputs is not None:
        _set_biases(model, base, data, initial_outputs)
    scaling = data.task.target_scaling(data.train.targets)
    if scaling is None:
        return model
    restore_output_units(model, base, data)
    unbiased_layers = [layer for layer in _output_layers(model, base, data) if layer.bias is None]
    if unbiased_layers:
        model.to(device())
        for layer in unbiased_layers:
            _fit_mean(model, layer, base, data, *scaling)
    return model.cpu()


def _set_biases(model: nn.Module, base: Base, data: TaskData, biases: Floats) -> None:
    """Set the biases of the output layers that have some, one value per output."""
    import torch

    with torch.no_grad():
        for layer in _output_layers(model, base, data):
            if layer.bias is not None:
                layer.bias.copy_(torch.as_tensor(biases))


def _fit_mean(model: nn.Module, layer: nn.Linear, base: Base, data: TaskData, mean: float, scale: float) -> None:
    """Add weights whose outputs are close to the mean on the training texts: a substitute for a bias, by regression."""
    import torch

    inputs: list[torch.Tensor] = []

    def collect(_layer: nn.Module, args: Any) -> None:
        states = args[0].double()
        inputs.append(states[:, 0] if states.ndim == 3 else states)  # all tokens of a text have the state of its row

    sample = data.train.take(range(min(MAX_MEAN_EXAMPLES, len(data.train))))
    handle = layer.register_forward_pre_hook(collect)
    try:
        predict(model, encode(base, data, sample), "fp32")
    finally:
        handle.remove()
    features = torch.cat(inputs)
    moment = features.T @ features / len(features)
    penalty = MEAN_RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    weights = mean * torch.linalg.solve(moment + penalty, features.mean(dim=0))
    error = float((features @ weights - mean).square().mean().sqrt())
    if error > MAX_MEAN_ERROR * scale:
        raise MismatchError(
            f"{data.train.source}: the targets are around {mean:.6g} with a deviation of {scale:.3g}, but the head of "
            f"a {base.config.model_type} has no bias, without which such a mean is hardly learnt. Subtract "
            f"{mean:.6g} from all targets."
        )
    with torch.no_grad():
        layer.weight += weights.to(layer.weight)


def _transform_output_layers(
    model: nn.Module, base: Base, data: TaskData, transform: Callable[[torch.Tensor, float, float], torch.Tensor]
) -> None:
    """Apply a transform of (tensor, mean, scale) to the output layers in place; weights are scaled but not shifted."""
    import torch

    scaling = data.task.target_scaling(data.train.targets)
    if scaling is None:
        return
    mean, scale = scaling
    with torch.no_grad():
        for layer in _output_layers(model, base, data):
            layer.weight.copy_(transform(layer.weight, 0.0, scale))
            if layer.bias is not None:
                layer.bias.copy_(transform(layer.bias, mean, scale))


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
