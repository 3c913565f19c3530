"""Classification heads: which tensors they are, and how they are taken to another set of labels."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING, Literal

from regraft.adaptation.adaptation import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adaptation, write_lineage
from regraft.adaptation.lora import START
from regraft.adaptation.model import fresh_model
from regraft.adaptation.save import write_tokenizer
from regraft.checkpoint import Derived, Entry, dtype_name, write_checkpoint, write_safetensors
from regraft.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base

Head = Literal["copy", "fresh", "resize"]
HEADS = ("copy", "fresh", "resize")


def stored_labels(adaptation: Adaptation, base: Base) -> tuple[str, ...]:
    """Return an adaptation's labels, or as many placeholders as its head has outputs.

    Args:
        adaptation: The tuned weights.
        base: A base of its architecture.

    Returns:
        The label names.

    Raises:
        MismatchError: It has no head of that architecture.
    """
    if adaptation.labels:
        return adaptation.labels
    outputs = _outputs(base)
    sizes = {i.shape[0] for n, i in adaptation.checkpoint.tensors.items() if model_name(n) in outputs and i.shape}
    if len(sizes) != 1:
        raise MismatchError(f"{adaptation.path}: has no head of a {base.config.model_type} ({', '.join(outputs)}).")
    return tuple(f"LABEL_{i}" for i in range(sizes.pop()))


def change_head(folder: Path, base: Base, labels: Sequence[str], how: Head, seed: int, into: Path) -> None:
    """Write an adaptation with a head for other labels.

    Args:
        folder: The adaptation.
        base: The base it lives on.
        labels: The labels that are wanted, in the order of the new head's outputs.
        how: `fresh` draws the whole head anew; `resize` keeps it and, of its outputs, those whose label is wanted,
            whatever their place, and draws only those of new labels.
        seed: What is new is drawn from it.
        into: The folder to fill.

    Raises:
        MismatchError: `resize`, and the adaptation does not name its labels or has none that is wanted.
    """
    import torch

    adaptation = load_adaptation(folder)
    known = list(adaptation.labels or ())
    if how == "resize" and not set(known) & set(labels):
        raise MismatchError(
            f"{folder}: its labels ({', '.join(known) or 'it names none'}) have none of {', '.join(labels[:8])}: there "
            "is nothing of its head to keep. Take a fresh head."
        )
    drawn = fresh_model(base, labels, seed).state_dict()
    outputs, prefix = _outputs(base), base.prefix + "."
    changed: dict[str, torch.Tensor] = {}
    for name in adaptation.checkpoint:
        inner = model_name(name)
        if how == "fresh" and inner in drawn and not inner.startswith(prefix):
            changed[name] = drawn[inner]
        elif how == "resize" and inner in outputs:
            old = adaptation.checkpoint[name]
            rows = [old[known.index(label)] if label in known else drawn[inner][i] for i, label in enumerate(labels)]
            changed[name] = torch.stack([row.to(old.dtype) for row in rows])
    _write(adaptation, changed, into)
    if adaptation.kind == "full":
        config = adaptation.config | {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
        (into / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(folder / ADAPTER_CONFIG, into / ADAPTER_CONFIG)
    write_tokenizer(base, into)
    write_lineage(into, base, labels)


def model_name(stored: str) -> str:
    """Return the name in a model of a tensor as transformers, PEFT, or PEFT's prompt learning store it."""
    return stored.removeprefix(START).removeprefix("base_model.")


def _outputs(base: Base) -> list[str]:
    """Name the head's tensors that have a row for each label: those that grow with the number of labels."""
    import torch
    from transformers import AutoModelForSequenceClassification

    shapes = []
    for count in (3, 4):
        config = copy.deepcopy(base.config)
        config.num_labels = count
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    return [name for name, shape in shapes[0].items() if shape != shapes[1][name]]


def _write(adaptation: Adaptation, changed: Mapping[str, torch.Tensor], into: Path) -> None:
    entries = {}
    for name, info in adaptation.checkpoint.tensors.items():
        tensor = changed.get(name)
        if tensor is None:
            entries[name] = Entry(info.dtype, info.shape, ((adaptation.checkpoint, name),))
        else:
            entries[name] = Entry(dtype_name(tensor.dtype), tuple(tensor.shape), ((changed, name),))
    into.mkdir(parents=True, exist_ok=True)
    if adaptation.kind == "full":
        write_checkpoint(into, Derived(entries))
    else:
        write_safetensors(into / ADAPTER_WEIGHTS, Derived(entries))
