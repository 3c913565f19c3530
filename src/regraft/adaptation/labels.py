"""The head that an adaptation stores: its task type, its labels, and the tensors with a row per label."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import name_without_prefix
from regraft.errors import MismatchError
from regraft.task import Head, TextClassification
from regraft.task.types import DEFAULT_TYPE, task_types

if TYPE_CHECKING:
    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.task import Task


def stored_head(adaptation: Adaptation, base: Base) -> Head:
    """Return the task type and the labels of the head that an adaptation stores.

    Args:
        adaptation: The adaptation.
        base: A base of its architecture.

    Returns:
        The head, with the recorded labels; without a record, `LABEL_0`, `LABEL_1` … for the outputs. Its task type is
        the recorded one; without a record, one that fits the config.

    Raises:
        MismatchError: No labels are recorded, and the stored tensors do not determine their number.
    """
    matching_types = adaptation.family.matching_task_types(adaptation.config)
    task_type = task_types().get(adaptation.task_type or DEFAULT_TYPE, TextClassification)
    if adaptation.task_type is None and matching_types and task_type not in matching_types:
        task_type = matching_types[0]
    if task_type.head_in_base:
        return Head(task_type, ())
    if adaptation.labels:
        return Head(task_type, adaptation.labels)
    output_names = label_tensor_names(base, task_type)
    output_counts = {
        stored_tensor.shape[0]
        for name, stored_tensor in adaptation.checkpoint.tensors.items()
        if name_without_prefix(name) in output_names and stored_tensor.shape
    }
    if len(output_counts) != 1:
        raise MismatchError(
            f"{adaptation.path}: records no labels, and the tensors with a row per label of a {base.config.model_type} "
            f"classifier ({', '.join(output_names)}) are missing or differ in their number of rows. Was it tuned on "
            f"{base.path}?"
        )
    return Head(task_type, tuple(f"LABEL_{i}" for i in range(output_counts.pop())))


def output_names(adaptation: Adaptation) -> tuple[str, ...] | None:
    """Return the names of the head's outputs in a model's config; None if an adaptation records no labels."""
    if adaptation.labels is None:
        return None
    task_type = task_types().get(adaptation.task_type or DEFAULT_TYPE, TextClassification)
    return Head(task_type, adaptation.labels).output_names


def check_task_type(adaptation: Adaptation, task: Task) -> None:
    """Check that an adaptation belongs to a task's type.

    Args:
        adaptation: The adaptation.
        task: The task, whose type is compared.

    Raises:
        MismatchError: The adaptation records another type, or records none and its config fits only other types.
    """
    recorded = adaptation.task_type
    matching_types = adaptation.family.matching_task_types(adaptation.config)
    if recorded == task.type or (recorded is None and (not matching_types or type(task) in matching_types)):
        return  # if no type matches, loading raises an error with the reason
    names = recorded or " or ".join(task_type.type_name() for task_type in matching_types)
    remedy = "Use the task it was tuned on, with its `type`"
    if recorded is None and adaptation.kind == "full":
        remedy += f", or correct problem_type ({adaptation.config.get('problem_type')!r:.60}) in its config.json"
    raise MismatchError(
        f"{adaptation.path} was tuned for {names}, but task {task.name!r} is of type {task.type}. {remedy}."
    )


def check_num_outputs(adaptation: Adaptation, num_outputs: int, head: Head) -> None:
    """Check that an adaptation's head has as many outputs as a task's.

    Args:
        adaptation: The adaptation.
        num_outputs: The number of outputs of its head.
        head: The head of the task.

    Raises:
        MismatchError: The numbers differ.
    """
    if head.type.head_in_base or num_outputs == head.num_outputs:
        return
    names = adaptation.labels or ()
    labels = f" ({', '.join(names)})" if len(names) == num_outputs else ""
    hint = ""
    for task_type in adaptation.family.matching_task_types(adaptation.config):
        if task_type.head_settings(())["num_labels"] == num_outputs:
            hint = f", such as one of type {task_type.type_name()}"
    raise MismatchError(
        f"{adaptation.path}: its head has {num_outputs} output{'' if num_outputs == 1 else 's'}{labels}, the task has "
        f"{head}. Use the task it was tuned on{hint}."
    )


def label_tensor_names(base: Base, task_type: type[Task]) -> list[str]:
    """Return the names of the head's tensors with a row per label.

    Args:
        base: The base, whose architecture determines the head.
        task_type: The head's task type.
    """
    import torch
    import transformers

    auto_class: Any = getattr(transformers, task_type.auto_class)
    shapes = []
    for num_labels in (3, 4):  # arbitrary: a tensor has a row per label if its shape differs between the two
        config = copy.deepcopy(base.config)
        config.num_labels = num_labels
        with torch.device("meta"):
            model = auto_class.from_config(config)
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    return [name for name, shape in shapes[0].items() if shape != shapes[1][name]]
