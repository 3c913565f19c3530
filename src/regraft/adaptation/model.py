"""Adaptations as models in memory, whatever their family: wholly loaded, or an error that lists what did not fit."""

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
    """Load an adaptation as a model: wholly, or not at all.

    Args:
        adaptation: The tuned weights.
        base: The base an adapter is put on, or that a full fine-tune came from.
        head: The task's head.
        trainable: Whether an adapter can be tuned further, rather than being frozen.

    Returns:
        The model in float32 on the CPU. Every stored tensor is in it, and nothing in it is left as it was drawn.

    Raises:
        CheckpointError: A tensor of the adaptation is missing or has no place in the model.
        MismatchError: The adaptation's head or matrices have other sizes, or its settings are for another base.
    """
    return adaptation.family.load(adaptation, base, head, trainable=trainable)


def check_compatibility(adaptation: Adaptation, upgrade: Upgrade, head: Head) -> Any:
    """Refuse an adaptation that does not fit its base or its task, before anything is written.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        head: The task's head.

    Returns:
        The old deployment: the adaptation on the old base, as a model.

    Raises:
        CheckpointError: A tensor of the adaptation is missing or has no place in the model.
        MismatchError: The adaptation has other sizes than its base, or another number of labels.
    """
    adaptation.family.check_bodies(adaptation, upgrade)
    return load_model(adaptation, upgrade.old, head)


def attach(model: Any, base: Base, head: Head, config: Config | None, seed: int) -> Any:
    """Put a fresh adapter on a model that has a fresh head.

    Args:
        model: From `fresh_model`.
        base: The base it came from.
        head: The head that it has.
        config: What kind of adapter; the heads, and a pooler that the base lacks, are added to what it tunes. None to
            tune the model itself.
        seed: What the adapter is drawn from.

    Returns:
        The model with the adapter: that and the head are trained, its body is frozen.

    Raises:
        KindError: The architecture cannot take that kind.
    """
    return family_of_config(config).attach(model, base, head, config, seed)


def initial_factors(model: Any) -> Mapping[str, torch.Tensor]:
    """Copy what an adapter took out of its base when it was drawn.

    Args:
        model: From `attach`, before the first step.

    Returns:
        A and B of a LoRA such as PiSSA, which its deltas are counted from; nothing of other kinds.
    """
    return family_of_model(model).start(model)


def save_model(model: Any, base: Base, head: Head, into: Path, start: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a tuned model as a plain transformers or PEFT folder.

    A LoRA that took its start out of its base is written as the plain LoRA of twice the rank that it amounts to, if
    the start is at hand, and else as it is: PEFT takes the start out of the base again wherever it loads that.

    Args:
        model: From `fresh_model`, `attach` or `load_model`.
        base: The base it lives on.
        head: The task's head.
        into: The folder to fill.
        start: From `initial_factors`, of a model that was attached; None of others.
    """
    with quiet():
        family_of_model(model).save(model, base, into, start or {})
    write_tokenizer(base, into)
    write_lineage(into, base, head.labels, head.type.type_name())
