"""Adaptations of any family as models in memory: loading, attaching fresh adapters, and saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.families import family_of_config, family_of_model
from regraft.adaptation.record import write_lineage
from regraft.adaptation.tokenizer import write_tokenizer
from regraft.progress import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.adaptation.kinds import Config
    from regraft.base import Base
    from regraft.task import Head
    from regraft.upgrade import Upgrade


def load_model(adaptation: Adaptation, base: Base, head: Head, *, trainable: bool = False) -> Any:
    """Load an adaptation as a model, completely or not at all.

    Args:
        adaptation: The adaptation on disk.
        base: The base it was tuned on, or was carried over to.
        head: The task's head.
        trainable: Whether an adapter will be tuned further; otherwise it is frozen.

    Returns:
        The model, in float32 on the CPU, with all stored tensors and no untrained ones.

    Raises:
        CheckpointError: A tensor of the adaptation is missing or unexpected, or a setting is unknown or invalid.
        MismatchError: A tensor's shape, the number of labels or a setting does not fit the base or the head.
    """
    return adaptation.family.load(adaptation, base, head, trainable=trainable)


def load_old_model(adaptation: Adaptation, upgrade: Upgrade, head: Head) -> Any:
    """Load an adaptation on the old base, after checking that a stored body has the tensors of both bases.

    Args:
        adaptation: An adaptation of `upgrade.old`.
        upgrade: The two bases.
        head: The task's head.

    Returns:
        The old model, in float32 on the CPU.

    Raises:
        CheckpointError: A tensor of the adaptation is missing or unexpected, or a setting is unknown or invalid.
        MismatchError: A tensor is missing in a base or has a different shape there, or the adaptation does not fit the
            old base or the head.
    """
    adaptation.family.check_bodies(adaptation, upgrade)
    return load_model(adaptation, upgrade.old, head)


def prepare_for_tuning(model: Any, base: Base, head: Head, config: Config | None, seed: int) -> Any:
    """Prepare a model with a fresh head for tuning: attach a fresh adapter, or nothing for a full fine-tune.

    Args:
        model: A model from `fresh_model`, which is modified.
        base: Its base.
        head: Its head.
        config: The adapter's config; None for a full fine-tune.
        seed: The seed of the adapter's initialisation.

    Returns:
        The model with the adapter. The adapter, the head, and a pooler that the base lacks are trainable; the rest of
        the body is frozen. For a full fine-tune, `model` itself, of which all parameters are trainable.

    Raises:
        KindError: The architecture does not support that kind of adapter.
        MismatchError: The pattern of a bottleneck adapter does not fit the model.
        RecipeError: A LoRA's rank exceeds the rank of a weight that it is initialised from.
    """
    return family_of_config(config).prepare_for_tuning(model, base, head, config, seed)


def keeps_base(config: Config | None) -> bool:
    """Return whether an adaptation of a config leaves its base as it is, in whatever dtype it is stored.

    Args:
        config: The adapter's config; None for a full fine-tune, which trains the base. A LoRA such as PiSSA changes the
            base's weights when it is initialised.
    """
    return config is not None and not family_of_config(config).changed_base(config.to_dict())


def initial_factors(model: Any) -> Mapping[str, torch.Tensor]:
    """Return the initial factors of a LoRA whose initialisation changed its base, such as PiSSA.

    Args:
        model: A model from `prepare_for_tuning`, before the first step.

    Returns:
        Copies of the tensors of A and B by stored name, for `save_model`; empty for other kinds.
    """
    return family_of_model(model).initial_factors(model)


def save_model(
    model: Any, base: Base, head: Head, folder: Path, initial_factors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a tuned model as a plain transformers or PEFT folder.

    With its initial factors, a LoRA whose initialisation changed its base is written as the equivalent plain LoRA of
    twice the rank. Without them, it is written unchanged: PEFT repeats the initialisation when it loads the adapter.

    Args:
        model: A model from `fresh_model`, `prepare_for_tuning` or `load_model`.
        base: Its base.
        head: Its head.
        folder: The folder to write.
        initial_factors: The result of the function `initial_factors`, for a model from `prepare_for_tuning`.

    Raises:
        CheckpointError: A LoRA with initial factors is a DoRA or adapts more than linear layers.
    """
    with quiet():
        family_of_model(model).save(model, base, folder, initial_factors or {})
    write_tokenizer(base, folder)
    write_lineage(folder, base, head.labels, head.type.type_name())
