"""Grafts with a transformed delta, the common part of methods that do arithmetic on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.adaptation.graft import write_grafted_adaptation
from regraft.errors import KindError

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.adaptation.adaptation import Adaptation, Rule
    from regraft.progress import Progress
    from regraft.upgrade import Upgrade

TRANSFORMABLE_KINDS = ("full", "lora")
"""The kinds whose delta `write_transform` can transform."""


def write_transform(
    adaptation: Adaptation, upgrade: Upgrade, rule: Rule, folder: Path, progress: Progress, *, replace: bool = False
) -> dict[str, list[str]]:
    """Write an adaptation for the new base with transformed deltas: new + rule(delta). The head is copied.

    For a LoRA, the rule gets the dense delta scaling·B·A of each layer, and the closest LoRA of the same rank is
    written. A LoRA whose initialisation changed the old base is written as a plain LoRA. If the upgrade did not change
    a tensor, its delta is preserved bit by bit.

    Args:
        adaptation: An adaptation of `upgrade.old`.
        upgrade: The two bases.
        rule: Returns the transformed delta, given the tensor's name inside the body, the delta (tuned − old) and the
            upgrade's shift (new − old), both in float32 or float64 and in the tensor's shape. Several threads may call
            it at the same time.
        folder: The folder to write, in the format of transformers or PEFT.
        progress: Called for each tensor of a full fine-tune, or for each layer that a LoRA adapts.
        replace: Whether tensors that an adapter stores in place of its base's are copied, not grafted.

    Returns:
        Names of tensors, as `write_graft` returns.

    Raises:
        CheckpointError: A LoRA's initialisation cannot be reproduced from the old base alone.
        MismatchError: A tensor of the body is missing in a base, or has a different shape there.
        KindError: The adaptation's kind is not one of `TRANSFORMABLE_KINDS`, or a LoRA has more than B·A for linear
            layers or stores fused experts separately.
    """
    check_transformable(adaptation)
    transformed = adaptation.family.transform(adaptation, upgrade, rule, progress, replace=replace)
    return write_grafted_adaptation(adaptation, upgrade, transformed, folder, progress)


def check_transformable(adaptation: Adaptation, kinds: tuple[str, ...] = TRANSFORMABLE_KINDS) -> None:
    """Check that an adaptation is of a supported kind, and that a LoRA consists of B·A for linear layers.

    Args:
        adaptation: The adaptation.
        kinds: The supported kinds, as `Adaptation.exact_kind` names them.

    Raises:
        KindError: The adaptation is of another kind, or is a LoRA with more than B·A for linear layers.
    """
    if adaptation.exact_kind not in kinds:
        raise KindError(
            f"{adaptation.path}: this method supports {', '.join(kinds)}, not {adaptation.exact_kind}. Use direct or "
            "init, or convert the adaptation to full or lora first."
        )
    adaptation.family.check_linear(adaptation)
