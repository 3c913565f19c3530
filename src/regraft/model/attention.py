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

    from regraft.task.types import Examples

MAX_ATTENTION_ELEMENTS = 1 << 24
"""The number of elements of a model's attention maps for one batch, 64 MB in float32."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """The attention maps, hidden states and outputs of a model on a batch.

    Args:
        attention: For each layer, batch × heads × tokens × keys; virtual tokens, if any, are the first keys.
        hidden: For the embeddings and each layer, batch × tokens × width.
        outputs: The logits, rows × outputs.
    """

    attention: tuple[torch.Tensor, ...]
    hidden: tuple[torch.Tensor, ...]
    outputs: torch.Tensor


def record_activations(model: Any, inputs: Mapping[str, torch.Tensor], precision: str) -> Activations:
    """Run a model on a batch and record its activations, except those at the positions of virtual tokens.

    Args:
        model: A model with a head, inside `eager_attention`.
        inputs: The inputs, padded on the right, including `attention_mask`.
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

    def request_maps(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_attentions": True}

    def take_maps(_: Any, args: Any, output: Any) -> Any:
        nonlocal attention
        attention = output.get("attentions") or ()
        return type(output)(**{name: value for name, value in output.items() if name != "attentions"})

    handles = [body.register_forward_hook(take_maps)]
    parameters = inspect.signature(body.forward).parameters.values()
    if any(p.name == "output_attentions" or p.kind is p.VAR_KEYWORD for p in parameters):
        handles.append(body.register_forward_pre_hook(request_maps, with_kwargs=True))
    try:
        with torch.inference_mode(), autocast(precision, next(model.parameters()).device):
            output = forward(model, inputs, hidden=True)
    finally:
        for handle in handles:
            handle.remove()
    if not attention or any(not isinstance(maps, torch.Tensor) or maps.dim() != 4 for maps in attention):
        raise MismatchError(
            f"a {type(inner).__name__} gives no attention maps, so its heads cannot be compared. Compare its "
            "predictions instead."
        )
    tokens = inputs["attention_mask"].shape[1]
    return Activations(
        attention=tuple(maps[:, :, -tokens:].float() for maps in attention),
        hidden=tuple(states[:, -tokens:].float() for states in output.hidden),
        outputs=output.logits,
    )


@contextlib.contextmanager
def eager_attention(*models: Any) -> Iterator[None]:
    """Switch models to evaluation mode and to an attention implementation that returns its maps, for a while.

    Args:
        models: Models with heads; the same model may be among them twice. Mode and implementation are restored.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            inner = unwrap_model(model)
            implementation = getattr(inner.config, "_attn_implementation", None)
            if implementation not in (None, "eager"):  # all others never compute the maps
                stack.callback(inner.set_attn_implementation, implementation)
                inner.set_attn_implementation("eager")
            stack.callback(model.train, model.training)
            model.eval()
        yield


def attention_batches(examples: Examples, config: Any) -> Iterator[list[int]]:
    """Divide examples into batches whose attention maps fit in bounded memory, the longest examples first.

    Args:
        examples: The examples.
        config: The model's config, for its numbers of layers and heads.

    Yields:
        The indices of examples of similar length.
    """
    lengths = examples.lengths
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    while order:
        elements = config.num_hidden_layers * config.num_attention_heads * int(lengths[order[0]]) ** 2
        size = max(1, MAX_ATTENTION_ELEMENTS // elements)
        yield order[:size]
        order = order[size:]


def random_model(reference: Any, seed: int) -> Any:
    """Build a randomly initialised model of another model's architecture.

    Virtual tokens of the reference are kept, so that attention has the same keys; other adapters are left out.

    Args:
        reference: The model whose config is used.
        seed: The seed of the initialisation.

    Returns:
        A model of the same config on the same device.
    """
    import torch

    inner: Any = unwrap_model(reference)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random_inner = type(inner)(copy.deepcopy(inner.config))
    adapter = getattr(reference, "active_peft_config", None)
    if adapter is None or not adapter.is_prompt_learning:
        return random_inner.to(next(reference.parameters()).device)
    random_parameters = dict(random_inner.base_model.named_parameters())
    prompted = copy.deepcopy(reference)
    with torch.no_grad():
        for name, parameter in unwrap_model(prompted).base_model.named_parameters():
            if name in random_parameters:  # not a pooler, which PEFT stores as a module of its own
                parameter.copy_(random_parameters[name])
    return prompted.to(next(reference.parameters()).device)
