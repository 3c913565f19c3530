"""The head of a language model, as a function of the last hidden states, and the check that it is that function."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from regraft.errors import KindError
from regraft.task.types.token_logits import TokenLogits, VocabularyHead

if TYPE_CHECKING:
    from torch import nn

MAX_RELATIVE_ERROR = 0.02
"""The largest difference between the logits of a model and those of its head as it is described, relative to their
norm: bfloat16 rounds to 0.4 %, and a forgotten scale or soft cap makes a far larger difference."""
_checked: weakref.WeakSet[Any] = weakref.WeakSet()
"""The models whose heads have been checked."""


def has_vocabulary_head(model: Any) -> bool:
    """Return whether a transformers model is a language model, whose outputs are the logits of tokens."""
    return model.get_output_embeddings() is not None


def language_model_body(model: Any) -> Any:
    """Return the module whose last hidden states the head of a language model reads.

    It is the body, or the decoder inside it, if the language model calls the decoder directly, as OPT does.

    Args:
        model: A transformers model, which may contain the layers of an adapter.
    """
    decoder = model.get_decoder()
    return decoder if any(module is decoder for module in model.base_model.modules()) else model.base_model


def vocabulary_head(model: Any) -> VocabularyHead:
    """Return the head of a language model.

    Args:
        model: A transformers model, which may contain the layers of an adapter.

    Returns:
        The head, with the model's current parameters.
    """
    layer = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # PEFT's tuned copy of the head
        layer = layer.modules_to_save[layer.active_adapters[0]]
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    soft_cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if hasattr(layer, "token_adapter"):  # tuned rows of some tokens
        rows = layer.token_adapter
        return VocabularyHead(rows.get_merged_weights(rows.active_adapters), rows.base_layer.bias, scale, soft_cap)
    if hasattr(layer, "base_layer"):  # an adapter on the head
        return VocabularyHead(scale=scale, soft_cap=soft_cap, project=layer)
    return VocabularyHead(layer.weight, layer.bias, scale, soft_cap)


def check_vocabulary_head(model: Any) -> None:
    """Check that a language model's logits are those of its head; a model is checked once.

    Args:
        model: A transformers model.

    Raises:
        KindError: The model computes its logits in a way that `vocabulary_head` does not describe.
    """
    import torch

    if model in _checked:
        return
    states: Any = None

    def record(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal states
        states = output.last_hidden_state

    handle = language_model_body(model).register_forward_hook(record)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            logits = model(input_ids=torch.tensor([[0, 1, 2, 3]], device=device), use_cache=False).logits[0].float()
            described = TokenLogits(states[0], vocabulary_head(model)).dense().float()
    finally:
        handle.remove()
        model.train(was_training)
    if not (logits - described).norm() <= MAX_RELATIVE_ERROR * logits.norm():
        raise KindError(
            f"a {type(model).__name__} computes its logits in a way that regraft does not know, so its losses would be "
            "wrong. Use a model whose logits are its head's outputs."
        )
    _checked.add(model)
