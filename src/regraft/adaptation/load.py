"""Opening adaptations of any kind from their folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from regraft.adaptation.adaptation import Adaptation
from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, check_sizes
from regraft.adaptation.families import FULL, family_of
from regraft.adaptation.kinds import kind_of
from regraft.adaptation.labels import output_names
from regraft.adaptation.model_class import check_model_class
from regraft.adaptation.record import labels_of_config, read_lineage, reconcile_labels
from regraft.checkpoint import Checkpoint, check_unquantised, read_json
from regraft.errors import MAX_LISTED, CheckpointError


def load_adaptation(path: str | Path) -> Adaptation:
    """Open an adaptation, and check that its files are complete.

    Args:
        path: An outcome folder, or a folder written by `save_pretrained` of transformers or PEFT.

    Returns:
        The adaptation, whose tensors are read when they are used.

    Raises:
        CheckpointError: A file is missing, ambiguous, truncated, malformed, quantised or of an unsupported kind, or
            records contradict each other.
    """
    folder = Path(path)
    if (folder / "adaptation").is_dir():
        if configs := [name for name in (ADAPTER_CONFIG, "config.json") if (folder / name).is_file()]:
            raise CheckpointError(
                f"{folder}: has both {configs[0]} and a folder adaptation/. Use the one that was tuned."
            )
        folder = folder / "adaptation"
    if not folder.is_dir():
        problem = f"is a file. Use its folder, {folder.parent}" if folder.is_file() else "no such folder"
        raise CheckpointError(f"{path}: {problem}.")
    labels, base, task_type = read_lineage(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        config = read_json(folder / ADAPTER_CONFIG)
        check_adapter(folder, config)
        checkpoint = Checkpoint.open(folder / ADAPTER_WEIGHTS)
        check_sizes(checkpoint, config, folder / ADAPTER_CONFIG)
        peft_type = str(config.get("peft_type"))
        family = family_of(peft_type)
        if family is None:
            raise CheckpointError(
                f"{folder}/{ADAPTER_CONFIG}: peft_type is {peft_type}, which the installed PEFT lacks. Update PEFT."
            )
        return Adaptation(folder, kind_of(peft_type), family, labels, base, checkpoint, config, task_type)
    named_adapters = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if named_adapters and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has no adapter, but its subfolders do: {', '.join(named_adapters[:MAX_LISTED])}. PEFT saves a "
            f"named adapter in a folder of that name. Use {folder / named_adapters[0]}."
        )
    checkpoint = Checkpoint.open(folder)
    expected = ADAPTER_CONFIG if (folder / ADAPTER_WEIGHTS).is_file() else "config.json"
    if not (folder / expected).is_file():
        raise CheckpointError(f"{folder}: has no {expected}. Copy the one that was saved with these weights.")
    config = read_json(folder / "config.json")
    check_unquantised(folder, checkpoint.tensors)
    check_model_class(folder, config)
    adaptation = Adaptation(folder, "full", FULL, labels, base, checkpoint, config, task_type)
    configured = labels_of_config(config, folder)
    if configured == output_names(adaptation):  # which a task type may name otherwise than the labels
        return adaptation
    return dataclasses.replace(adaptation, labels=reconcile_labels(labels, configured, folder))
