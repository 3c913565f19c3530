"""Grafting an adaptation onto the new base, from files to files, without tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.adaptation.record import write_lineage
from regraft.adaptation.tokenizer import write_tokenizer
from regraft.adaptation.tokens import match_token_rows
from regraft.vocabulary import write_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.adaptation.adaptation import Adaptation, GraftedAdaptation
    from regraft.progress import Progress
    from regraft.upgrade import Upgrade


def write_graft(
    adaptation: Adaptation, upgrade: Upgrade, folder: Path, progress: Progress, *, replace: bool = False
) -> dict[str, list[str]]:
    """Write an adaptation for the new base: new + (tuned − old), or the adapter. The head is copied.

    A LoRA whose initialisation changed the old base is written as the equivalent plain LoRA. Tensors that an adapter
    stores in place of its base's are grafted like those of a full fine-tune.

    Source: Qin et al., 2023 (arXiv:2305.08702), section 4.1.

    Args:
        adaptation: An adaptation of `upgrade.old`.
        upgrade: The two bases.
        folder: The folder to write, in the format of transformers or PEFT.
        progress: Called for each tensor of a full fine-tune.
        replace: Whether tensors that an adapter stores in place of its base's are copied, not grafted.

    Returns:
        Names of tensors, for the outcome's notes: `grafted_in_place_of_the_base` lists the grafted tensors that an
        adapter stores in place of the base's, `copied_as_a_base_lacks_it` the tensors with a counterpart in only one
        base. A list without names is left out.

    Raises:
        CheckpointError: An adapter's initialisation cannot be reproduced from the old base alone.
        MismatchError: A tensor of the body is missing in a base, or has a different shape there.
    """
    grafted = adaptation.family.graft(adaptation, upgrade, replace=replace)
    return write_grafted_adaptation(adaptation, upgrade, grafted, folder, progress)


def write_grafted_adaptation(
    adaptation: Adaptation, upgrade: Upgrade, grafted: GraftedAdaptation, folder: Path, progress: Progress
) -> dict[str, list[str]]:
    """Write a grafted adaptation, with its tokenizer and lineage.

    Args:
        adaptation: The adaptation of `upgrade.old`.
        upgrade: The two bases.
        grafted: The content of the adaptation on the new base.
        folder: The folder to write, in the format of transformers or PEFT.
        progress: Called for each tensor of a full fine-tune.

    Returns:
        Names of tensors, as `write_graft` returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = adaptation.family
    family.write(folder, grafted.tensors, grafted.config, progress)
    row_match = match_token_rows(adaptation, upgrade)
    if row_match is not None and (family.tunes_base or row_match.tuned_only):
        write_vocabulary(folder, upgrade.new.path, adaptation.path, upgrade.old.path, row_match)
        if upgrade.new.text_tokenizer is not None:  # a language model, with the chat template of its task
            write_tokenizer(upgrade.new, folder)
    else:
        write_tokenizer(upgrade.new, folder)
    write_lineage(folder, upgrade.new, adaptation.labels, adaptation.task_type)
    notes = {
        "grafted_in_place_of_the_base": list(grafted.replaced),
        "copied_as_a_base_lacks_it": family.unmatched_tensor_names(adaptation, upgrade),
    }
    return {key: names for key, names in notes.items() if names}
