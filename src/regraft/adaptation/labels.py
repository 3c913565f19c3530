"""The head that an adaptation stores: its task type, its labels, and the tensors that have a row for each of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import model_name
from regraft.errors import MismatchError
from regraft.task import Head, TextClassification

if TYPE_CHECKING:
    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.task import Task


def stored_head(adaptation: Adaptation, base: Base) -> Head:
    """Return the head of an adaptation, with as many placeholders as it has outputs where it names no labels.

    Args:
        adaptation: The tuned weights.
        base: A base of its architecture.

    Returns:
        The head.

    Raises:
        MismatchError: It has no head of that architecture.
    """
    # a type that there is none for is refused where the adaptation is loaded
    task_type = next(iter(adaptation.family.fitting_types(adaptation.config)), TextClassification)
    if adaptation.labels:
        return Head(task_type, adaptation.labels)
    outputs, stored = label_rows(base, task_type), adaptation.checkpoint.tensors
    sizes = {info.shape[0] for name, info in stored.items() if model_name(name) in outputs and info.shape}
    if len(sizes) != 1:
        raise MismatchError(f"{adaptation.path}: has no head of a {base.config.model_type} ({', '.join(outputs)}).")
    return Head(task_type, tuple(f"LABEL_{i}" for i in range(sizes.pop())))


def label_rows(base: Base, task_type: type[Task]) -> list[str]:
    """Name the head's tensors that have a row for each label: those that grow with the number of labels.

    Args:
        base: A base.
        task_type: What the head is for.

    Returns:
        Their names in the model.
    """
    import torch
    import transformers

    auto: Any = getattr(transformers, task_type.auto_class)
    shapes = []
    for count in (3, 4):
        config = copy.deepcopy(base.config)
        config.num_labels = count
        with torch.device("meta"):
            model = auto.from_config(config)
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    return [name for name, shape in shapes[0].items() if shape != shapes[1][name]]
