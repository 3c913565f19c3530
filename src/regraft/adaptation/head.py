"""Replacing the head of an adaptation by a head for different labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from regraft.adaptation.labels import label_tensor_names
from regraft.adaptation.load import load_adaptation
from regraft.adaptation.lora import name_without_prefix
from regraft.adaptation.record import write_lineage
from regraft.adaptation.tokenizer import write_tokenizer
from regraft.checkpoint import DerivedTensors, TensorSpec, dtype_name
from regraft.errors import MAX_LISTED, MismatchError
from regraft.progress import silent

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from regraft.base import Base
    from regraft.task import Head

HeadPolicy = Literal["copy", "fresh", "resize"]
HEAD_POLICIES: tuple[HeadPolicy, ...] = get_args(HeadPolicy)
"""The values of `HeadPolicy`, which `change_head` explains."""


def change_head(
    path: Path, base: Base, head: Head, policy: HeadPolicy, initial: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write an adaptation with a head for different labels.

    Args:
        path: The folder of the adaptation.
        base: The base that the adaptation is for.
        head: The new head.
        policy: `fresh` initialises all tensors of the head. `resize` copies them, apart from the outputs of labels that
            the adaptation lacks, which are initialised. `copy` copies all of them.
        initial: The tensors of the base with an initialised new head, by parameter name.
        folder: The folder to write.

    Raises:
        CheckpointError: The adaptation or the base cannot be loaded.
        MismatchError: The policy is `resize`, and the adaptation records no label that the new head has.
    """
    import torch

    adaptation = load_adaptation(path)
    row_by_label = {label: row for row, label in enumerate(adaptation.labels or ())}
    if policy == "resize" and not row_by_label.keys() & set(head.labels):
        raise MismatchError(
            f"{path}: its labels ({', '.join(row_by_label) or 'none are recorded'}) include none of "
            f"{', '.join(head.labels[:MAX_LISTED])}, so no output can be kept. Use a fresh head."
        )
    output_names = label_tensor_names(base, head.type)
    prefix = base.prefix + "."
    entries = {}
    for name, stored_tensor in adaptation.checkpoint.tensors.items():
        parameter = name_without_prefix(name)
        tensor = None
        if policy == "fresh" and parameter in initial and not parameter.startswith(prefix):
            tensor = initial[parameter]
        elif policy == "resize" and parameter in output_names:
            old = adaptation.checkpoint[name]
            rows = [
                old[row_by_label[label]] if label in row_by_label else initial[parameter][index]
                for index, label in enumerate(head.labels)
            ]
            tensor = torch.stack([row.to(old.dtype) for row in rows])
        if tensor is None:
            entries[name] = TensorSpec(stored_tensor.dtype, stored_tensor.shape, ((adaptation.checkpoint, name),))
        else:
            entries[name] = TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape), (({name: tensor}, name),))
    folder.mkdir(parents=True, exist_ok=True)
    family = adaptation.family
    family.write(folder, DerivedTensors(entries), family.config_for_head(adaptation.config, head), silent)
    write_tokenizer(base, folder)
    write_lineage(folder, base, head.labels, head.type.type_name())
