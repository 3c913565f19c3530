"""Forward passes whose output for each example is the same as without the rest of the batch."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.task.types import ROW_TENSORS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch


@dataclasses.dataclass(frozen=True)
class Output:
    """The output of a model for a batch.

    Args:
        logits: The logits, rows × outputs, in float32 or wider.
        example: The index in the batch of each row's example.
        token: The token index of each row, counted with virtual tokens, as in `hidden`.
        hidden: The hidden states of the embeddings and of each layer, batch × tokens × width.
    """

    logits: torch.Tensor
    example: torch.Tensor
    token: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()

    def row_states(self) -> torch.Tensor:
        """Return the hidden states at the rows, after the embeddings and after every layer but the last.

        Returns:
            The states, rows × layers × width, in float32 or wider.
        """
        import torch

        return _at_least_float32(torch.stack([layer[self.example, self.token] for layer in self.hidden[:-1]], dim=1))


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch that a model takes as arguments.

    Args:
        batch: The batch, from `Examples.batch`.

    Returns:
        All tensors but those that describe the rows.
    """
    return {name: tensor for name, tensor in batch.items() if name not in ROW_TENSORS}


def forward(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    *,
    hidden: bool = False,
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> Output:
    """Run a model on a batch that is padded on the right; each example's output is the same as without the others.

    The head is computed at the batch's rows only. In two respects this differs from calling the model: hidden states
    are also returned under a prefix, where PEFT drops them; and a decoder's head that reads the last token of a text
    reads the token that it would read of that text alone, whatever the batch is padded with.

    Args:
        model: A model with a head, with or without an adapter.
        batch: Its inputs, including `attention_mask`, and the row tensors unless each example has a single row.
        hidden: Whether to return hidden states.
        parameters: Parameters by name to compute with instead of the model's own; gradients flow through them.

    Returns:
        The output.
    """
    import torch

    inner = unwrap_model(model)
    inputs = model_inputs(batch)
    body = inner.base_model
    mask = inputs["attention_mask"]
    examples = torch.arange(len(mask), device=mask.device)
    has_token_rows = "token" in batch
    if has_token_rows:
        example = batch["example"]
        token = batch["token"]
        last = None
    else:
        example = examples
        token = torch.zeros_like(examples)
        last = last_token_indices(model, inputs)
    layers: tuple[torch.Tensor, ...] = ()

    def request_hidden(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_hidden_states": True}

    def take_hidden(_: Any, args: Any, output: Any) -> Any:
        nonlocal layers
        layers = output.hidden_states
        return type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})

    def select_rows(_: Any, args: Any, output: Any) -> Any:
        """Leave the head nothing to read but the rows' states."""
        nonlocal token
        states = output.last_hidden_state
        virtual_tokens = states.shape[1] - mask.shape[1]  # they come first
        if has_token_rows:
            token = token + virtual_tokens
            states = states[example, token][None]
        else:
            token = last + virtual_tokens
            states = states[examples, token][:, None].expand_as(states)  # at every token, whichever the head reads
        return type(output)(**{**output, "last_hidden_state": states})

    handles = []
    if hidden:
        handles.append(body.register_forward_pre_hook(request_hidden, with_kwargs=True))
        handles.append(body.register_forward_hook(take_hidden))
    if has_token_rows or last is not None:
        handles.append(body.register_forward_hook(select_rows))
    config = inner.config.get_text_config()
    try:
        with contextlib.nullcontext() if last is None else _with_padding_token(config):
            if parameters is None:
                logits = model(**inputs).logits
            else:
                from torch.func import functional_call

                logits = functional_call(model, dict(parameters), (), inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    return Output(_at_least_float32(logits[0] if has_token_rows else logits), example, token, layers)


def last_token_indices(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the token that a decoder's head reads of each text alone, as its transformers class determines it.

    It is the last token that is not `config.pad_token_id`. It is simply the last token if that id is null, if there are
    virtual tokens in front of the embeddings (the class then sees no token ids), and in XLNet. Of a text that consists
    of the padding token alone, it is the first token.

    Args:
        model: A model with a head, with or without an adapter.
        batch: Its inputs, padded on the right.

    Returns:
        The index of a token for each text, not counting virtual tokens; None if the head does not read the last token.
    """
    import torch

    from regraft.base import is_causal

    inner = unwrap_model(model)
    mask = batch["attention_mask"]
    summary = getattr(inner, "sequence_summary", None)
    if not is_causal(inner.config) or (summary is not None and summary.summary_type != "last"):
        return None
    pad_id = inner.config.get_text_config().pad_token_id
    if pad_id is None or summary is not None or _has_soft_prompt(model):
        return mask.sum(dim=1) - 1
    indices: torch.Tensor = torch.arange(mask.shape[1], device=mask.device) * mask * (batch["input_ids"] != pad_id)
    return indices.amax(dim=1)


def unwrap_parallel(model: Any) -> Any:
    """Return the model inside DistributedDataParallel.

    Args:
        model: A model, wrapped or not.
    """
    return getattr(model, "module", model)


def unwrap_model(model: Any) -> Any:
    """Return the transformers model inside wrappers for several devices or for PEFT.

    Args:
        model: A model with a head, wrapped or not.
    """
    inner = unwrap_parallel(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _has_soft_prompt(model: Any) -> bool:
    """Return whether an adapter prepends virtual tokens to the embeddings; a prefix acts on keys and values instead."""
    config = getattr(unwrap_parallel(model), "active_peft_config", None)
    return bool(config and config.is_prompt_learning and config.peft_type.value != "PREFIX_TUNING")


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor of half precision to float32, the least that losses are computed in."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextlib.contextmanager
def _with_padding_token(config: Any) -> Iterator[None]:
    """Set some padding token in a config for a while: without one, transformers refuses batches."""
    pad_id = config.pad_token_id
    config.pad_token_id = pad_id or 0
    try:
        yield
    finally:
        config.pad_token_id = pad_id
