"""Bases with an untrained head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.strict import load_strictly
from regraft.weights import is_optional

if TYPE_CHECKING:
    from regraft.base import Base
    from regraft.task import Head


def fresh_model(base: Base, head: Head, seed: int) -> Any:
    """Load a base with an untrained classification head.

    A decoder is given the tokenizer's padding token, for plain transformers to read batches right once it is saved.

    Args:
        base: The base.
        head: The task's head.
        seed: What the head is drawn from.

    Returns:
        The model, in float32 on the CPU; every tensor of the body comes from the base.

    Raises:
        CheckpointError: A tensor of the body is missing, has another shape, or has no place in the model.
    """
    model = fresh_parts(base, head, seed)[0]
    if base.is_decoder:
        model.config.pad_token_id = base.pad_id
    return model


def fresh_parts(base: Base, head: Head, seed: int) -> tuple[Any, list[str]]:
    """Load a base with an untrained classification head, and name what of the model is untrained.

    Args:
        base: The base.
        head: The task's head.
        seed: What the head is drawn from.

    Returns:
        The model, and the names of the tensors that were drawn: the head's, and a pooler's that the base lacks.

    Raises:
        CheckpointError: A tensor of the body is missing, has another shape, or has no place in the model.
    """
    import transformers

    auto: Any = getattr(transformers, head.type.auto_class)
    transformers.set_seed(seed)
    model, fresh = load_strictly(auto, base.path, base.prefix, **head.settings, dtype="float32")
    if base.own_rows:
        model.resize_token_embeddings(base.own_rows, mean_resizing=False)
    heads = {n: t for n, t in model.state_dict().items() if not n.startswith(base.prefix + ".")}
    if not heads.keys() & set(fresh):  # the base is a classifier itself: its head is for labels of its own
        transformers.set_seed(seed)
        drawn = auto.from_config(model.config).state_dict()
        for name, tensor in heads.items():
            tensor.copy_(drawn[name])
        fresh = sorted({*fresh, *heads})
    return model, fresh


def fresh_poolers(base: Base) -> list[str]:
    """Name the poolers that a base's classifier has and the base lacks.

    Args:
        base: The base.

    Returns:
        `pooler`, or nothing.
    """
    return [] if any(is_optional(name) for name in base.body) else ["pooler"] * base.has_pooler
