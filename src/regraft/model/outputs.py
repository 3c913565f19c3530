"""What a model gives for a batch, each text's output being what it is alone."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.task.types import ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch


@dataclasses.dataclass(frozen=True)
class Output:
    """What a model gives for a batch.

    Args:
        logits: rows × outputs, in float32 or wider.
        example: Of which example of the batch each row is.
        token: At which token of it each row is; virtual tokens come first, as in `hidden`.
        hidden: Of the embeddings and each layer, batch × tokens × width.
    """

    logits: torch.Tensor
    example: torch.Tensor
    token: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()

    def row_states(self) -> torch.Tensor:
        """Return the hidden states at the rows, after the embeddings and after every layer but the last.

        Returns:
            rows × layers × width, in float32 or wider.
        """
        import torch

        return _full(torch.stack([layer[self.example, self.token] for layer in self.hidden[:-1]], dim=1))


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what of a batch a model takes.

    Args:
        batch: From `Examples.batch`.

    Returns:
        Its tensors but for those that say which rows it has.
    """
    return {name: tensor for name, tensor in batch.items() if name not in ROWS}


def forward(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    *,
    hidden: bool = False,
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> Output:
    """Run a model of any kind on a batch that is padded on the right; each example's output is what it has alone.

    The head is computed at the batch's rows only. Two more things are done here that PEFT and transformers do not do:
    hidden states under a prefix are returned, and a decoder's head that reads the last token of a text is fed that of
    each text alone, whatever the batch is padded with.

    Args:
        model: A model with a head, with or without an adapter.
        batch: Its inputs, `attention_mask` among them, and the rows if they are not one an example.
        hidden: Whether hidden states are wanted.
        parameters: By name, what to compute with in place of the model's own; gradients flow through them.

    Returns:
        Its output.
    """
    import torch

    classifier, inputs = unwrap_model(model), model_inputs(batch)
    body, mask = classifier.base_model, inputs["attention_mask"]
    by_token = "token" in batch
    texts, last = torch.arange(len(mask), device=mask.device), None if by_token else last_read(model, inputs)
    example, token = (batch["example"], batch["token"]) if by_token else (texts, torch.zeros_like(texts))
    layers: tuple[torch.Tensor, ...] = ()

    def ask(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_hidden_states": True}

    def keep(_: Any, args: Any, output: Any) -> Any:
        nonlocal layers
        layers = output.hidden_states
        return type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})

    def spread(_: Any, args: Any, output: Any) -> Any:
        nonlocal token
        states = output.last_hidden_state
        virtual = states.shape[1] - mask.shape[1]  # virtual tokens come first
        if by_token:
            token = token + virtual
            states = states[example, token][None]
        else:
            token = last + virtual
            states = states[texts, token][:, None].expand_as(states)
        return type(output)(**{**output, "last_hidden_state": states})

    handles = []
    if hidden:
        handles = [body.register_forward_pre_hook(ask, with_kwargs=True), body.register_forward_hook(keep)]
    if by_token or last is not None:  # then it does not matter which token the class takes for the last one
        handles.append(body.register_forward_hook(spread))
    try:
        with _any_padding(classifier.config.get_text_config()) if last is not None else contextlib.nullcontext():
            if parameters is None:
                logits = model(**inputs).logits
            else:
                from torch.func import functional_call

                logits = functional_call(model, dict(parameters), (), inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    return Output(_full(logits[0] if by_token else logits), example, token, layers)


def last_read(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Compute which token a decoder's head reads of each text alone, as its transformers class finds it.

    That is the last one that is not `config.pad_token_id`, or simply the last one where that is null, under a prompt
    (the class sees no token ids then), and in XLNet. A text of nothing but that id is read at its first token.

    Args:
        model: A classifier, with or without an adapter.
        batch: Its inputs, padded on the right.

    Returns:
        The index of a token for each text, virtual tokens not counted; None for a model that does not read the last.
    """
    import torch

    from regraft.base import is_causal

    classifier, mask = unwrap_model(model), batch["attention_mask"]
    summary = getattr(classifier, "sequence_summary", None)
    if not is_causal(classifier.config) or (summary is not None and summary.summary_type != "last"):
        return None
    padding = classifier.config.get_text_config().pad_token_id
    if padding is None or summary is not None or _is_prompted(model):
        return mask.sum(dim=1) - 1
    places: torch.Tensor = torch.arange(mask.shape[1], device=mask.device) * mask * (batch["input_ids"] != padding)
    return places.amax(dim=1)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of half precision in float32: losses are computed in no less."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextlib.contextmanager
def _any_padding(config: Any) -> Iterator[None]:
    """Make a config name some padding token for a while: without one, transformers refuses batches."""
    before = config.pad_token_id
    config.pad_token_id = before or 0
    try:
        yield
    finally:
        config.pad_token_id = before


def unwrap_model(model: Any) -> Any:
    """Return the transformers model inside what wraps it for many devices or for PEFT.

    Args:
        model: A model with a head, wrapped or not.
    """
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _is_prompted(model: Any) -> bool:
    config = getattr(getattr(model, "module", model), "active_peft_config", None)
    return bool(config and config.is_prompt_learning and config.peft_type.value != "PREFIX_TUNING")
