"""The labels of a head: their names, and the tensors that have a row for each."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from regraft.adaptation.lora import model_name
from regraft.errors import MismatchError

if TYPE_CHECKING:
    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base


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
    outputs, stored = label_rows(base), adaptation.checkpoint.tensors
    sizes = {info.shape[0] for name, info in stored.items() if model_name(name) in outputs and info.shape}
    if len(sizes) != 1:
        raise MismatchError(f"{adaptation.path}: has no head of a {base.config.model_type} ({', '.join(outputs)}).")
    return tuple(f"LABEL_{i}" for i in range(sizes.pop()))


def label_rows(base: Base) -> list[str]:
    """Name the head's tensors that have a row for each label: those that grow with the number of labels.

    Args:
        base: A base.

    Returns:
        Their names in the classifier.
    """
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
