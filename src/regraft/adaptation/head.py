"""Heads taken to another set of labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from regraft.adaptation.fresh import fresh_model
from regraft.adaptation.labels import label_tensors
from regraft.adaptation.load import load_adaptation
from regraft.adaptation.lora import model_name
from regraft.adaptation.record import write_lineage
from regraft.adaptation.tokenizer import write_tokenizer
from regraft.checkpoint import DerivedTensors, TensorSpec, dtype_name
from regraft.errors import MismatchError
from regraft.progress import silent

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.base import Base
    from regraft.task import Head

HeadPolicy = Literal["copy", "fresh", "resize"]
HEAD_POLICIES = ("copy", "fresh", "resize")


def change_head(folder: Path, base: Base, head: Head, how: HeadPolicy, seed: int, into: Path) -> None:
    """Write an adaptation with a head for other labels.

    Args:
        folder: The adaptation.
        base: The base it lives on.
        head: What is wanted.
        how: `fresh` draws the whole head anew; `resize` keeps it and, of its outputs, those whose label is wanted,
            whatever their place, and draws only those of new labels.
        seed: What is new is drawn from it.
        into: The folder to fill.

    Raises:
        MismatchError: `resize`, and the adaptation does not name its labels or has none that is wanted.
    """
    import torch

    adaptation = load_adaptation(folder)
    rows_of = {label: row for row, label in enumerate(adaptation.labels or ())}
    if how == "resize" and not rows_of.keys() & set(head.labels):
        raise MismatchError(
            f"{folder}: its labels ({', '.join(rows_of) or 'it names none'}) have none of "
            f"{', '.join(head.labels[:8])}: there is nothing of its head to keep. Take a fresh head."
        )
    drawn = fresh_model(base, head, seed).state_dict()
    outputs, prefix = label_tensors(base, head.type), base.prefix + "."
    entries = {}
    for name, info in adaptation.checkpoint.tensors.items():
        inner, tensor = model_name(name), None
        if how == "fresh" and inner in drawn and not inner.startswith(prefix):
            tensor = drawn[inner]
        elif how == "resize" and inner in outputs:
            old = adaptation.checkpoint[name]
            rows = [old[rows_of[label]] if label in rows_of else drawn[inner][i] for i, label in enumerate(head.labels)]
            tensor = torch.stack([row.to(old.dtype) for row in rows])
        if tensor is None:
            entries[name] = TensorSpec(info.dtype, info.shape, ((adaptation.checkpoint, name),))
        else:
            entries[name] = TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape), (({name: tensor}, name),))
    into.mkdir(parents=True, exist_ok=True)
    family = adaptation.family
    family.write(into, DerivedTensors(entries), family.settings_for_head(adaptation.config, head), silent)
    write_tokenizer(base, into)
    write_lineage(into, base, head.labels, head.type.type_name())
