"""Attention maps and hidden states of a model on a batch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from regraft.errors import MismatchError
from regraft.model.device import autocast
from regraft.model.outputs import forward, unwrap_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn

    from regraft.task.types import Examples

MAX_ATTENTION_ELEMENTS = 2**24
"""The most elements of a model's attention maps for a batch of several examples, 64 MiB in float32, arbitrary: larger
batches run faster, and take more memory."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """The attention maps, hidden states and outputs of a model on a batch.

    Args:
        attention: The attention maps of each layer, batch × heads × tokens × keys; virtual tokens, if any, are the
            first keys.
        hidden: The hidden states after the embeddings and after each layer, batch × tokens × width.
        outputs: The logits, rows × outputs.
    """

    attention: tuple[torch.Tensor, ...]
    hidden: tuple[torch.Tensor, ...]
    outputs: torch.Tensor


def record_activations(model: nn.Module, batch: Mapping[str, torch.Tensor], precision: str) -> Activations:
    """Run a model on a batch and record its activations at the tokens of the text, without those at virtual tokens.

    Args:
        model: A model with a head; the call is made in the context of `eager_attention`.
        batch: The batch, from `Examples.batch`, on the model's device.
        precision: `bf16` or `fp32`.

    Returns:
        The activations, in float32 on the model's device.

    Raises:
        MismatchError: The architecture has no attention maps.
    """
    import torch

    inner = unwrap_model(model)
    body = inner.base_model
    attention: Any = ()

    def request_maps(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_attentions": True}

    def take_maps(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal attention
        attention = output.get("attentions") or ()
        # PEFT's prefix tuning takes the second output as the pooled one, so no maps, self or cross, may be left
        return type(output)(**{name: value for name, value in output.items() if not name.endswith("attentions")})

    handles = [body.register_forward_hook(take_maps)]
    parameters = inspect.signature(body.forward).parameters.values()
    if any(p.name == "output_attentions" or p.kind is p.VAR_KEYWORD for p in parameters):
        handles.append(body.register_forward_pre_hook(request_maps, with_kwargs=True))
    try:
        with torch.inference_mode(), autocast(precision, next(model.parameters()).device):
            output = forward(model, batch, hidden=True)
    finally:
        for handle in handles:
            handle.remove()
    if not attention or any(not isinstance(maps, torch.Tensor) or maps.dim() != 4 for maps in attention):
        raise MismatchError(
            f"a {type(inner).__name__} gives no attention maps, so its heads cannot be compared. Compare its "
            "predictions instead."
        )
    num_tokens = batch["attention_mask"].shape[1]  # virtual tokens come first
    return Activations(
        attention=tuple(maps[:, :, -num_tokens:].float() for maps in attention),
        hidden=tuple(states[:, -num_tokens:].float() for states in output.hidden),
        outputs=output.logits,
    )


@contextlib.contextmanager
def eager_attention(*models: nn.Module) -> Iterator[None]:
    """Switch models, inside the context, to evaluation mode and to an attention implementation that returns the maps.

    Args:
        models: Models with heads; the same model may be among them twice.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            inner = unwrap_model(model)
            implementation = getattr(inner.config, "_attn_implementation", None)
            if implementation not in (None, "eager"):  # no other implementation computes the maps
                stack.callback(inner.set_attn_implementation, implementation)
                inner.set_attn_implementation("eager")
            stack.callback(model.train, model.training)
            model.eval()
        yield


def attention_batches(examples: Examples, config: Any) -> Iterator[list[int]]:
    """Divide examples into batches that keep to `MAX_ATTENTION_ELEMENTS` or have one example, the longest first.

    Args:
        examples: The tokenised examples.
        config: The model's config, for its numbers of layers and heads.

    Yields:
        For each batch, the indices of its examples, which are of similar length.
    """
    lengths = examples.lengths
    order = sorted(range(len(examples)), key=lambda index: -lengths[index])
    while order:
        elements_per_example = config.num_hidden_layers * config.num_attention_heads * int(lengths[order[0]]) ** 2
        batch_size = max(1, MAX_ATTENTION_ELEMENTS // elements_per_example)
        yield order[:batch_size]
        order = order[batch_size:]


def random_model(reference: nn.Module, seed: int) -> Any:
    """Build a randomly initialised model with the architecture of a reference.

    If the reference has virtual tokens, they are copied, so that attention has the same keys; its head is then copied
    too. Other adapters are left out.

    Args:
        reference: A model with a head, with or without an adapter.
        seed: The seed of the initialisation.

    Returns:
        A model with the reference's config, on the reference's device.
    """
    import torch

    inner = unwrap_model(reference)
    device = next(reference.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        without_adapter = type(inner)(copy.deepcopy(inner.config))
    peft_config: Any = getattr(reference, "active_peft_config", None)
    if peft_config is None or not peft_config.is_prompt_learning:
        return without_adapter.to(device)
    random_parameters = dict(without_adapter.base_model.named_parameters())
    with_virtual_tokens = copy.deepcopy(reference)
    with torch.no_grad():
        for name, parameter in unwrap_model(with_virtual_tokens).base_model.named_parameters():
            if name in random_parameters:  # PEFT wraps a pooler, whose parameters then have different names
                parameter.copy_(random_parameters[name])
    return with_virtual_tokens.to(device)
