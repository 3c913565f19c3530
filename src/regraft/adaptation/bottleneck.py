"""Bottleneck adapters: small residual layers in a frozen body, saved in PEFT's folder layout.

Source: Houlsby et al., 2019 (arXiv:1902.00751), for adapters after attention and after the feed-forward; Pfeiffer et
al., 2021 (arXiv:2005.00247), for adapters after the feed-forward only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regraft.errors import MAX_LISTED, MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from regraft.adaptation.bottleneck_config import BottleneckConfig

INIT_STD = 0.01  # as in Houlsby et al.
ACTIVATION_CLASSES = {"gelu": nn.GELU, "relu": nn.ReLU}


class Bottleneck(nn.Module):
    """A bottleneck adapter, x + W_up·σ(W_down·x + b_down) + b_up, where σ is the activation.

    It is initialised to the identity, with W_up = 0 and b_up = 0.

    Args:
        width: The width of the model's hidden states.
        config: The config, which `bottleneck_config` returns to save it with the model.
    """

    def __init__(self, width: int, config: BottleneckConfig):
        super().__init__()
        self.config = config
        self.down = nn.Linear(width, config.inner_size)
        self.activation = ACTIVATION_CLASSES[config.activation]()
        self.up = nn.Linear(config.inner_size, width)
        nn.init.normal_(self.down.weight, std=INIT_STD)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the adapter to hidden states x, [..., width]."""
        adapted: torch.Tensor = x + self.up(self.activation(self.down(x)))
        return adapted


def attach_bottlenecks(model: Any, config: BottleneckConfig) -> Any:
    """Attach fresh bottleneck adapters to a model, in place, and freeze all parameters that are not tuned.

    Args:
        model: A transformers model with a head.
        config: The placement and size of the adapters, and the modules to save in full.

    Returns:
        The model, with a module `bottleneck` in each adapted layer.

    Raises:
        MismatchError: A pattern does not match as many layers as there are blocks, or the model lacks a module to save.
    """
    body = model.base_model
    modules = {name for root in (model, body) for name, _ in root.named_modules()}
    absent = [name for name in config.modules_to_save if name not in modules]
    if absent:
        raise MismatchError(
            f"modules_to_save names {', '.join(absent[:MAX_LISTED])}, which a {type(model).__name__} lacks. Was the "
            "adapter tuned on another base?"
        )
    patterns = [config.after_feed_forward]
    if config.placement == "houlsby":
        patterns.append(config.after_attention)
    for pattern in patterns:
        layers = [name for name, _ in body.named_modules() if re.search(pattern, name)]
        if len(layers) != model.config.num_hidden_layers:
            raise MismatchError(
                f"the pattern {pattern!r} matches {len(layers)} layers in a {type(model).__name__} of "
                f"{model.config.num_hidden_layers} blocks ({', '.join(layers[:MAX_LISTED])}). Set after_attention and "
                "after_feed_forward to match the last linear layer of each attention and each feed-forward."
            )
        for name in layers:
            layer = body.get_submodule(name)
            layer.bottleneck = Bottleneck(model.config.hidden_size, config)  # registers it as a submodule
            layer.register_forward_hook(_apply_bottleneck)
    model.requires_grad_(False)
    for name, parameter in _saved_parameters(model).items():
        in_head = any(name.startswith(module + ".") for module in config.modules_to_save)
        parameter.requires_grad_(config.tune_head or not in_head)
    return model


def bottleneck_config(model: Any) -> BottleneckConfig:
    """Return the config of a model's bottleneck adapters.

    Args:
        model: A model from `attach_bottlenecks`.
    """
    return next(module.config for module in model.modules() if isinstance(module, Bottleneck))


def bottleneck_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that are saved: adapters, the modules to save in full, and tuned norms.

    Args:
        model: A model from `attach_bottlenecks`.

    Returns:
        The tensors by their names in the model.
    """
    return {name: parameter.detach() for name, parameter in _saved_parameters(model).items()}


def set_bottleneck_state(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors into a model.

    Args:
        model: A model from `attach_bottlenecks`.
        tensors: Tensors with the names and shapes of `bottleneck_state`.
    """
    with torch.no_grad():
        for name, parameter in _saved_parameters(model).items():
            parameter.copy_(tensors[name])


def _saved_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of `bottleneck_state` by their names in the model."""
    config = bottleneck_config(model)
    prefix = model.base_model_prefix + "."
    prefixes = [f"{name}." for name in config.modules_to_save]
    if config.tune_norms:
        prefixes += [f"{name}." for name, module in model.named_modules() if "Norm" in type(module).__name__]
    saved_prefixes = tuple(prefixes)

    def is_saved(name: str) -> bool:
        # modules_to_save may name modules of the model or of its body
        return (
            ".bottleneck." in name
            or name.startswith(saved_prefixes)
            or name.removeprefix(prefix).startswith(saved_prefixes)
        )

    return {name: parameter for name, parameter in model.named_parameters() if is_saved(name)}


def _apply_bottleneck(layer: Any, inputs: Iterable[Any], output: torch.Tensor) -> torch.Tensor:
    """Apply the adapter of a layer to its output; a forward hook."""
    adapted: torch.Tensor = layer.bottleneck(output)
    return adapted
