"""Adaptations of any family as models in memory: completely loaded, or an error that lists what does not fit."""

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
        adaptation: The adaptation.
        base: The base of the adapter or full fine-tune.
        head: The task's head.
        trainable: Whether an adapter will be tuned further, rather than being frozen.

    Returns:
        The model, in float32 on the CPU, with all stored tensors and no untrained ones.

    Raises:
        CheckpointError: A tensor of the adaptation is missing or unexpected.
        MismatchError: The head or other tensors have other sizes, or the settings are for another base.
    """
    return adaptation.family.load(adaptation, base, head, trainable=trainable)


def load_old_model(adaptation: Adaptation, upgrade: Upgrade, head: Head) -> Any:
    """Check that an adaptation is compatible with both bases and the task's head, before anything is written.

    Args:
        adaptation: An adaptation of `upgrade.old`.
        upgrade: The two bases.
        head: The task's head.

    Returns:
        The old deployment: the adaptation on the old base, as a model.

    Raises:
        CheckpointError: A tensor of the adaptation is missing or unexpected.
        MismatchError: Tensors have other sizes than the base's, or the number of labels differs.
    """
    adaptation.family.check_bodies(adaptation, upgrade)
    return load_model(adaptation, upgrade.old, head)


def prepare_for_tuning(model: Any, base: Base, head: Head, config: Config | None, seed: int) -> Any:
    """Put a fresh adapter on a model with a fresh head.

    Args:
        model: A model from `fresh_model`.
        base: Its base.
        head: Its head.
        config: The adapter's config; None for a full fine-tune. The head, and a pooler that the base lacks, are tuned
            in addition.
        seed: The seed of the adapter's initialisation.

    Returns:
        The model with the adapter. The adapter and the head are trainable; the body is frozen.

    Raises:
        KindError: The architecture does not support that kind of adapter.
    """
    return family_of_config(config).prepare_for_tuning(model, base, head, config, seed)


def initial_factors(model: Any) -> Mapping[str, torch.Tensor]:
    """Return the initial factors of a LoRA whose initialisation changed its base, such as PiSSA.

    Args:
        model: A model from `attach`, before the first step.

    Returns:
        Copies of A and B, which have to be subtracted from the tuned ones; empty for other kinds.
    """
    return family_of_model(model).initial_factors(model)


def save_model(model: Any, base: Base, head: Head, into: Path, start: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a tuned model as a plain transformers or PEFT folder.

    A LoRA whose initialisation changed its base is written as the equivalent plain LoRA of twice the rank if its
    initial factors are passed; otherwise unchanged: PEFT repeats the initialisation when it loads the adapter.

    Args:
        model: A model from `fresh_model`, `attach` or `load_model`.
        base: Its base.
        head: Its head.
        into: The folder to write.
        start: The result of `initial_factors`, for a model from `attach`.
    """
    with quiet():
        family_of_model(model).save(model, base, into, start or {})
    write_tokenizer(base, into)
    write_lineage(into, base, head.labels, head.type.type_name())
