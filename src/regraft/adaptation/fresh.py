"""Loading a base with an untrained head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.strict import load_strictly
from regraft.recipe import preferred_precision
from regraft.weights import is_optional

if TYPE_CHECKING:
    from regraft.base import Base
    from regraft.task import Head


def fresh_model(base: Base, head: Head, seed: int, *, frozen: bool = False) -> Any:
    """Load a base with an untrained head.

    A decoder's config gets the padding token, so that plain transformers reads batches correctly with the saved model.

    Args:
        base: The base.
        head: The task's head.
        seed: The seed of the head's initialisation.
        frozen: Whether the base will not be trained, as in `load_with_fresh_head`.

    Returns:
        The model, in float32 (see `frozen`) on the CPU; all tensors of the body are the base's, apart from a pooler
        that it lacks.

    Raises:
        CheckpointError: transformers cannot load the base, or a tensor of the body is missing, unexpected or misshapen.
    """
    model, _ = load_with_fresh_head(base, head, seed, frozen=frozen)
    if base.is_decoder:
        model.config.pad_token_id = base.pad_id
    return model


def load_with_fresh_head(base: Base, head: Head, seed: int, *, frozen: bool = False) -> tuple[Any, list[str]]:
    """Load a base with an untrained head, and return the names of the untrained tensors too.

    Args:
        base: The base.
        head: The task's head; the base's own head, if that is the head of the task type, is loaded with the base.
        seed: The seed of the head's initialisation.
        frozen: Whether the base will not be trained. A language model is then loaded in the dtype of its files, if the
            device computes fast in bfloat16; any other model is loaded in float32.

    Returns:
        The model, and the names of the untrained tensors: the head's, and those of a pooler that the base lacks.

    Raises:
        CheckpointError: transformers cannot load the base, or a tensor of the body is missing, unexpected or misshapen.
    """
    import transformers

    auto_class: Any = getattr(transformers, head.type.auto_class)
    transformers.set_seed(seed)
    is_whole = head.type.head_in_base
    dtype = "auto" if frozen and is_whole and preferred_precision() == "bf16" else "float32"
    prefix = None if is_whole else base.prefix
    model, fresh_names = load_strictly(auto_class, base.path, prefix, **head.settings, dtype=dtype)
    if base.rows_override:
        model.resize_token_embeddings(base.rows_override, mean_resizing=False)
    if is_whole:
        return model, []
    head_tensors = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith(base.prefix + ".")
    }
    if not head_tensors.keys() & set(fresh_names):  # the base is a classifier itself, with a head for its own labels
        transformers.set_seed(seed)
        initial = auto_class.from_config(model.config).state_dict()
        for name, tensor in head_tensors.items():
            tensor.copy_(initial[name])
        fresh_names = sorted({*fresh_names, *head_tensors})
    return model, fresh_names


def fresh_poolers(base: Base, model: Any) -> list[str]:
    """Return `["pooler"]` if a model on a base has a pooler that the base lacks, and else an empty list."""
    stores_pooler = any(is_optional(name) for name in base.body)
    return ["pooler"] if getattr(model.base_model, "pooler", None) is not None and not stores_pooler else []
