"""Forward passes whose output for each example does not depend on the other examples of the batch."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.model.vocabulary_head import has_vocabulary_head, language_model_body, vocabulary_head
from regraft.task.types import ROW_TENSORS
from regraft.task.types.token_logits import TokenLogits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn


@dataclasses.dataclass(frozen=True)
class Output:
    """The output of a model for a batch.

    Args:
        logits: The logits, rows × outputs, in float32 or wider; of a language model, the states that its head reads,
            with the head, because logits of all tokens would take rows × vocabulary numbers.
        example: For each row, the index of its example in the batch.
        token: For each row, the index of its token in `hidden`, where virtual tokens, if any, come first.
        hidden: The hidden states after the embeddings and after each layer, batch × tokens × width; empty unless
            requested.
    """

    logits: Any
    example: torch.Tensor
    token: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()

    def row_states(self) -> torch.Tensor:
        """Select the hidden states of the rows, after the embeddings and after every layer but the last.

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
        All tensors except those that describe the rows, `ROW_TENSORS`.
    """
    return {name: tensor for name, tensor in batch.items() if name not in ROW_TENSORS}


def forward(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    hidden: bool = False,
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> Output:
    """Run a model on a batch that is padded on the right, each example as if it were alone.

    This differs from a call of the model in four respects. If the batch has `token`, the head is computed at the rows
    only. The head of a language model is not computed at all: losses compute it in chunks. Hidden states are also
    returned for a model with a prefix adapter, for which PEFT drops them. A decoder's head that reads the last
    token of a text reads the same token as for the text alone, whatever the batch is padded with.

    In a model of `PADDING_SENSITIVE`, padding affects the outputs all the same: its batches must have examples of equal
    length.

    Args:
        model: A model with a head, with or without an adapter.
        batch: The model's inputs, including `attention_mask`, and the row tensors `example` and `token` unless each
            example has a single row, at the token that the head reads.
        hidden: Whether to return hidden states.
        parameters: Parameters by name that replace the model's; gradients flow through them.

    Returns:
        The logits and hidden states, with the position of each row.
    """
    import torch

    inner = unwrap_model(model)
    inputs: dict[str, Any] = model_inputs(batch)
    body = inner.base_model
    mask = inputs["attention_mask"]
    all_examples = torch.arange(len(mask), device=mask.device)
    has_token_rows = "token" in batch
    if has_token_rows:
        example = batch["example"]
        token = batch["token"]
        last_token = None
    else:
        example = all_examples
        token = torch.zeros_like(all_examples)
        last_token = last_token_indices(model, inputs)
    hidden_states: tuple[torch.Tensor, ...] = ()
    token_logits: TokenLogits | None = None
    is_language_model = has_token_rows and has_vocabulary_head(inner)
    if is_language_model:
        body = language_model_body(inner)
        inputs["use_cache"] = False  # a cache of keys and values is read only by generation

    def request_hidden(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_hidden_states": True}

    def take_hidden(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal hidden_states
        hidden_states = output.hidden_states
        return type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})

    def select_rows(module: nn.Module, args: Any, output: Any) -> Any:
        """Replace the body's last hidden states by the rows' states, so that the head reads no other states."""
        nonlocal token, token_logits
        states = output.last_hidden_state
        num_virtual_tokens = states.shape[1] - mask.shape[1]  # they come first
        if has_token_rows:
            token = token + num_virtual_tokens
            if is_language_model:
                # read here, because `functional_call` replaces parameters during the call only
                token_logits = TokenLogits(states[example, token], vocabulary_head(inner))
                states = states[:, :0]
            else:
                states = states[example, token][None]
        else:
            token = last_token + num_virtual_tokens
            # repeated at every token, because heads differ in the token that they read
            states = states[all_examples, token][:, None].expand_as(states)
        return type(output)(**{**output, "last_hidden_state": states})

    handles = []
    if hidden:
        handles.append(body.register_forward_pre_hook(request_hidden, with_kwargs=True))
        handles.append(body.register_forward_hook(take_hidden))
    if has_token_rows or last_token is not None:
        handles.append(body.register_forward_hook(select_rows))
    config = inner.config.get_text_config()
    try:
        with contextlib.nullcontext() if last_token is None else _with_padding_token(config):
            if parameters is None:
                logits = model(**inputs).logits
            else:
                from torch.func import functional_call

                replacements = _with_tied_names(model, parameters)
                logits = functional_call(model, replacements, (), inputs, tie_weights=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if token_logits is not None:
        return Output(token_logits, example, token, hidden_states)
    if has_token_rows:
        logits = logits[0]  # `select_rows` made one sequence of all rows
    return Output(_at_least_float32(logits), example, token, hidden_states)


def last_token_indices(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the index of the token that a decoder's head reads when it is given a text alone, for each text.

    As in the decoder's transformers class, the head reads the last token whose id is not `config.pad_token_id`; of a
    text of padding tokens only, the first token. In three cases it reads the last token, whatever its id: if
    `config.pad_token_id` is null, if virtual tokens precede the embeddings (the class then sees no token ids), and in
    XLNet.

    Args:
        model: A model with a head, with or without an adapter.
        batch: The model's inputs, padded on the right.

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


def unwrap_parallel(model: nn.Module) -> Any:
    """Return the model inside DistributedDataParallel, or an unwrapped model as it is."""
    return getattr(model, "module", model)


def unwrap_model(model: nn.Module) -> Any:
    """Return the transformers model inside DistributedDataParallel and PEFT, or an unwrapped model as it is."""
    inner = unwrap_parallel(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters that require gradients, by their names inside DistributedDataParallel."""
    parameters = unwrap_parallel(model).named_parameters()
    return {name: parameter for name, parameter in parameters if parameter.requires_grad}


def _with_tied_names(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return parameters by all names of those that are tied to them.

    `functional_call` would do so itself, but restores a parameter wrongly if modules share the module that owns it, as
    tied embeddings share PEFT's tuned rows of tokens.
    """
    replacements = {
        id(parameter): parameters[name]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in parameters
    }
    return {
        f"{module_name}.{name}" if module_name else name: replacements[id(parameter)]
        for module_name, module in model.named_modules()  # each module once
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in replacements
    }


def _has_soft_prompt(model: nn.Module) -> bool:
    """Return whether an adapter prepends virtual tokens to the embeddings; a prefix acts on keys and values instead."""
    config = getattr(unwrap_parallel(model), "active_peft_config", None)
    return bool(config and config.is_prompt_learning and config.peft_type.value != "PREFIX_TUNING")


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor of half precision to float32, the lowest precision that losses are computed in."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextlib.contextmanager
def _with_padding_token(config: Any) -> Iterator[None]:
    """Set a padding token in a config inside the context: without one, transformers refuses batches."""
    pad_id = config.pad_token_id
    config.pad_token_id = pad_id or 0  # any id: `select_rows` puts the same states at every token
    try:
        yield
    finally:
        config.pad_token_id = pad_id
