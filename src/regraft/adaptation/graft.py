"""Old weights put onto the new base, without any tuning, straight from files to files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.adaptation.record import write_lineage
from regraft.adaptation.tokenizer import write_tokenizer
from regraft.adaptation.tokens import match_token_rows
from regraft.vocabulary import write_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.adaptation.adaptation import Adaptation, CarriedAdaptation
    from regraft.progress import Progress
    from regraft.upgrade import Upgrade


def write_graft(
    adaptation: Adaptation, upgrade: Upgrade, into: Path, progress: Progress, *, replace: bool = False
) -> dict[str, list[str]]:
    """Write old tuned weights for the new base: new + (tuned − old), or the adapter; the head is copied.

    A LoRA that took its start out of the old base is written as the plain LoRA that it amounts to there. What an
    adapter stores in place of its base's tensors is grafted like a full fine-tune's.

    Source: Qin et al., 2023 (arXiv:2305.08702), section 4.1.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        into: The folder to fill, plain transformers or PEFT.
        progress: Told of each tensor.
        replace: Whether an adapter's tensors take the place of the new base's as they are stored.

    Returns:
        Tensors that the outcome's notes name: `grafted_in_place_of_the_base`, those of an adapter that take the place
        of the base's; `copied_as_a_base_lacks_it`, those of a full fine-tune that pre-training left out of one base.

    Raises:
        MismatchError: A tensor of the body is not in the bases, or has another shape there.
    """
    carried = adaptation.family.graft(adaptation, upgrade, replace=replace)
    return write_carried_adaptation(adaptation, upgrade, carried, into, progress)


def write_carried_adaptation(
    adaptation: Adaptation, upgrade: Upgrade, carried: CarriedAdaptation, into: Path, progress: Progress
) -> dict[str, list[str]]:
    """Write what an adaptation became on the new base, with the tokenizer and whose base it is.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        carried: What it became.
        into: The folder to fill, plain transformers or PEFT.
        progress: Told of each piece.

    Returns:
        Tensors that the outcome's notes name, as `write_graft` does.
    """
    into.mkdir(parents=True, exist_ok=True)
    family = adaptation.family
    family.write(into, carried.tensors, carried.settings, progress)
    rows = match_token_rows(adaptation, upgrade)
    if rows is not None and (family.tunes_base or rows.tuned_only):
        write_vocabulary(into, upgrade.new.path, adaptation.path, upgrade.old.path, rows)
    else:
        write_tokenizer(upgrade.new, into)
    write_lineage(into, upgrade.new, adaptation.labels, adaptation.task_type)
    notes = {
        "grafted_in_place_of_the_base": list(carried.replaced),
        "copied_as_a_base_lacks_it": family.unmatched_tensors(adaptation, upgrade),
    }
    return {key: names for key, names in notes.items() if names}
