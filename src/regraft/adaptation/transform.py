"""Grafts whose delta is changed on the way, tensor by tensor: what methods of pure arithmetic have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.adaptation.graft import write_carried_adaptation
from regraft.errors import KindError

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.adaptation.adaptation import Adaptation, Rule
    from regraft.progress import Progress
    from regraft.upgrade import Upgrade

TRANSFORMABLE = ("full", "lora")


def write_transform(
    adaptation: Adaptation, upgrade: Upgrade, rule: Rule, into: Path, progress: Progress, *, replace: bool = False
) -> dict[str, list[str]]:
    """Write old tuned weights for the new base, every delta changed by a rule: new + rule(delta); the head is copied.

    Of a LoRA the rule gets the dense delta scaling·B·A of each layer, and the closest LoRA of the same rank is written;
    one that took its start out of the old base is written as a plain one. Where the upgrade left a tensor exactly as it
    was, its delta stays as it is, to the bit.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        rule: Gives the delta to add, of the name inside the body, the delta (tuned − old) and the upgrade's shift
            (new − old), both in float32 or float64 and laid out as the tensor is; it may be called from several threads
            at once.
        into: The folder to fill, plain transformers or PEFT.
        progress: Told of each tensor.
        replace: Whether what an adapter stores in place of its base's tensors stays as it is stored.

    Returns:
        Tensors that the outcome's notes name, as `write_graft` does.

    Raises:
        MismatchError: A tensor of the body is not in the bases, or has another shape there.
        KindError: The adaptation's kind has no deltas of its base's tensors.
    """
    check_transformable(adaptation)
    carried = adaptation.family.transform(adaptation, upgrade, rule, progress, replace=replace)
    return write_carried_adaptation(adaptation, upgrade, carried, into, progress)


def check_transformable(adaptation: Adaptation, variants: tuple[str, ...] = TRANSFORMABLE) -> None:
    """Refuse kinds that are no change of their base's tensors.

    Args:
        adaptation: The tuned weights.
        variants: Those that can be worked on.

    Raises:
        KindError: It is of another kind, or a LoRA that is more than B·A.
    """
    if adaptation.variant not in variants:
        raise KindError(
            f"{adaptation.path}: this method works on the deltas of kinds {', '.join(variants)}; a "
            f"{adaptation.variant} it cannot carry. Take direct or init, or convert it to full or lora first."
        )
    adaptation.family.check_linear(adaptation)
