"""The head that an adaptation stores: its task type, its labels, and the tensors that have a row for each of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import model_name
from regraft.errors import MismatchError
from regraft.task import Head, TextClassification
from regraft.task.types import DEFAULT_TYPE, task_types

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
    fitting = adaptation.family.matching_task_types(adaptation.config)
    task_type = task_types().get(adaptation.task_type or DEFAULT_TYPE, TextClassification)
    if adaptation.task_type is None and fitting and task_type not in fitting:
        task_type = fitting[0]
    if adaptation.labels:
        return Head(task_type, adaptation.labels)
    outputs, stored = label_tensors(base, task_type), adaptation.checkpoint.tensors
    sizes = {info.shape[0] for name, info in stored.items() if model_name(name) in outputs and info.shape}
    if len(sizes) != 1:
        raise MismatchError(f"{adaptation.path}: has no head of a {base.config.model_type} ({', '.join(outputs)}).")
    return Head(task_type, tuple(f"LABEL_{i}" for i in range(sizes.pop())))


def check_task_type(adaptation: Adaptation, task: Task) -> None:
    """Refuse an adaptation that is for another type of task.

    Args:
        adaptation: The tuned weights.
        task: The task.

    Raises:
        MismatchError: It records another type, or its settings are of another kind of problem.
    """
    recorded, fitting = adaptation.task_type, adaptation.family.matching_task_types(adaptation.config)
    if recorded == task.type or (recorded is None and (not fitting or type(task) in fitting)):
        return  # where no type fits, what cannot be loaded is said when that is tried
    names = recorded or " or ".join(of.type_name() for of in fitting)
    raise MismatchError(
        f"{adaptation.path} was tuned for {names}, and task {task.name!r} is of type {task.type}. Give the task it was "
        "tuned on, with its `type`."
    )


def label_tensors(base: Base, task_type: type[Task]) -> list[str]:
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
