"""Bottleneck adapters: small residual layers in a frozen body, saved in PEFT's folder layout.

Source: Houlsby et al., 2019 (arXiv:1902.00751): after attention and after the feed-forward; Pfeiffer et al., 2021
(arXiv:2005.00247): after the feed-forward only.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regraft.errors import CheckpointError, MismatchError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
PLACEMENTS = ("houlsby", "pfeiffer")
# the layer that projects back to the model's width: BERT's kin, DistilBERT, Llama's kin, GPT-2, OPT, ModernBERT
AFTER_ATTENTION = (
    r"(attention\.(output\.dense|out_lin|dense|attn\.o)|self_attn\.(o_proj|out_proj|dense)|attn\.(c_proj|out_proj|Wo))$"
)
AFTER_FEED_FORWARD = (
    r"(layer\.\d+\.output\.dense|ffn\.lin2|mlp\.(down_proj|c_proj|fc2|dense_4h_to_h|Wo)|layers\.\d+\.fc2)$"
)


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """How bottleneck adapters are set up.

    Args:
        inner_size: The width of the bottleneck.
        activation: `gelu` or `relu`.
        placement: `houlsby`, after attention and after the feed-forward, or `pfeiffer`, after the feed-forward only.
        tune_norms: Whether the body's LayerNorms are tuned, and saved.
        tune_head: Whether the classification head is tuned; it is saved in any case.
        modules_to_save: Further modules that are tuned and saved whole; the head is added to them.
        after_attention: A regular expression that finds the linear layer each attention ends with.
        after_feed_forward: The same for each feed-forward.
        task_type: PEFT's name of the type of task; that of the head once it is attached.

    Raises:
        RecipeError: A value is out of its range.
    """

    inner_size: int = 24
    activation: str = "gelu"
    placement: str = "houlsby"
    tune_norms: bool = False
    tune_head: bool = True
    modules_to_save: tuple[str, ...] = ()
    after_attention: str = AFTER_ATTENTION
    after_feed_forward: str = AFTER_FEED_FORWARD
    task_type: str = "SEQ_CLS"

    def __post_init__(self) -> None:
        """Check every value."""
        if type(self.inner_size) is not int or self.inner_size < 1:
            raise RecipeError(f"a bottleneck's inner size is at least 1, found {self.inner_size!r}.")
        if self.activation not in ACTIVATIONS:
            raise RecipeError(f"activation is {' or '.join(ACTIVATIONS)}, found {self.activation!r}.")
        if self.placement not in PLACEMENTS:
            raise RecipeError(f"placement is {' or '.join(PLACEMENTS)}, found {self.placement!r}.")
        for name in ("tune_norms", "tune_head"):
            if type(getattr(self, name)) is not bool:
                raise RecipeError(f"{name} is true or false, found {getattr(self, name)!r}.")
        if isinstance(self.modules_to_save, str):
            raise RecipeError(f"modules_to_save is a list of names, found {self.modules_to_save!r}.")
        for pattern in (self.after_attention, self.after_feed_forward):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise RecipeError(f"the pattern {pattern!r} is no regular expression ({error}).") from error
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))

    def to_dict(self) -> dict[str, Any]:
        """Return what `adapter_config.json` holds.

        Returns:
            The fields, and `peft_type` as PEFT writes it.
        """
        fields = dataclasses.asdict(self) | {"modules_to_save": list(self.modules_to_save)}
        return {"peft_type": "BOTTLENECK", **fields}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], where: str) -> BottleneckConfig:
        """Read what `adapter_config.json` holds.

        Args:
            stored: Its content.
            where: Its path, for messages.

        Returns:
            The config.

        Raises:
            CheckpointError: A value is none that can be.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in stored.items() if name in known})
        except (RecipeError, TypeError) as error:
            raise CheckpointError(f"{where}: {error}") from error


class Bottleneck(nn.Module):
    """x + W_up·σ(W_down·x): the identity at the start, for W_up begins at 0.

    Args:
        width: The model's width, to which it projects back.
        config: How it is set up; from here it is read again when the model is saved.
    """

    def __init__(self, width: int, config: BottleneckConfig):
        super().__init__()
        self.config = config
        self.down = nn.Linear(width, config.inner_size)
        self.activation = ACTIVATIONS[config.activation]()
        self.up = nn.Linear(config.inner_size, width)
        nn.init.normal_(self.down.weight, std=0.01)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Change x, [..., width], by what passes the bottleneck."""
        changed: torch.Tensor = x + self.up(self.activation(self.down(x)))
        return changed


def attach_bottlenecks(model: Any, config: BottleneckConfig) -> Any:
    """Put fresh bottleneck adapters into a classifier, in place; only what the config names is left to be tuned.

    Args:
        model: A transformers classifier.
        config: Size, placement and what else is tuned.

    Returns:
        The model, with a module `bottleneck` in each layer that was wrapped.

    Raises:
        MismatchError: The patterns do not find one layer a block, or a module that is saved is not there.
    """
    body = model.base_model
    modules = {name for part in (model, body) for name, _ in part.named_modules()}
    if strangers := [name for name in config.modules_to_save if name not in modules]:
        raise MismatchError(f"modules_to_save names {', '.join(strangers[:4])}, which a {type(model).__name__} lacks.")
    patterns = [config.after_feed_forward] + [config.after_attention] * (config.placement == "houlsby")
    for pattern in patterns:
        layers = [name for name, _ in body.named_modules() if re.search(pattern, name)]
        if len(layers) != model.config.num_hidden_layers:
            raise MismatchError(
                f"the pattern {pattern!r} finds {len(layers)} layers in a {type(model).__name__} of "
                f"{model.config.num_hidden_layers} blocks ({', '.join(layers[:3])}). Give after_attention and "
                "after_feed_forward that find the linear layer each attention and each feed-forward ends with."
            )
        for name in layers:
            layer = body.get_submodule(name)
            layer.bottleneck = Bottleneck(model.config.hidden_size, config)  # which stores it under that name
            layer.register_forward_hook(_pass_through)
    model.requires_grad_(False)
    for name, parameter in _stored(model).items():
        in_head = any(name.startswith(module + ".") for module in config.modules_to_save)
        parameter.requires_grad_(config.tune_head or not in_head)
    return model


def config_in(model: Any) -> BottleneckConfig:
    """Return how a model's adapters are set up.

    Args:
        model: From `attach_bottlenecks`.

    Returns:
        The config, which is the same in all of them.
    """
    return next(module.config for module in model.modules() if isinstance(module, Bottleneck))


def bottleneck_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's adapters as they are stored.

    Args:
        model: From `attach_bottlenecks`.

    Returns:
        The tensors by name in the model: adapters, whole modules, and LayerNorms if they are tuned.
    """
    return {name: parameter.detach() for name, parameter in _stored(model).items()}


def set_bottleneck_state(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a model's adapters.

    Args:
        model: From `attach_bottlenecks`.
        tensors: One for each name of `bottleneck_state`, of the same shape.
    """
    with torch.no_grad():
        for name, parameter in _stored(model).items():
            parameter.copy_(tensors[name])


def _stored(model: Any) -> dict[str, nn.Parameter]:
    config, prefix = config_in(model), model.base_model_prefix + "."
    norms = tuple(f"{n}." for n, m in model.named_modules() if config.tune_norms and "Norm" in type(m).__name__)
    whole = tuple(f"{name}." for name in config.modules_to_save) + norms
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".bottleneck." in name or name.startswith(whole) or name.removeprefix(prefix).startswith(whole)
    }


def _pass_through(layer: Any, inputs: Iterable[Any], output: torch.Tensor) -> torch.Tensor:
    changed: torch.Tensor = layer.bottleneck(output)
    return changed
