"""An adaptation at work: its labels matched to a task's, and its predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.adaptation import load_model
from regraft.errors import MismatchError
from regraft.progress import Progress, silent
from regraft.tuning.examples import encode
from regraft.tuning.predict import device, predict

if TYPE_CHECKING:
    from regraft.adaptation import Adaptation
    from regraft.task import TaskData
    from regraft.tuning.recipe import Recipe
    from regraft.upgrade import Base


def match_labels(adaptation: Adaptation, data: TaskData) -> TaskData:
    """Put a task's classes into the order of an adaptation's head.

    Args:
        adaptation: The old weights.
        data: The task's examples.

    Returns:
        The same examples, their classes numbered as the head numbers them.

    Raises:
        MismatchError: The label names are not the same.
    """
    if adaptation.labels is None:
        return data
    try:
        return data.relabel(adaptation.labels)
    except MismatchError as error:
        raise MismatchError(f"{adaptation.path} was not tuned for the labels of task {data.name}: {error}") from error


def predictions(
    adaptation: Adaptation, base: Base, data: TaskData, recipe: Recipe, progress: Progress = silent
) -> list[int]:
    """Predict test (dev where there is none) with an adaptation on a base.

    Args:
        adaptation: The weights.
        base: The base they are put on; a full fine-tune is its own.
        data: The examples, classes in the order of the adaptation's head.
        recipe: Whose precision to compute in.
        progress: Told of each batch.

    Returns:
        The predicted class of each example.
    """
    split = data.test or data.dev
    precision = recipe.resolve(len(data.train), 1.0).precision
    model = load_model(adaptation, base, data.labels).to(device())
    found: list[int] = predict(model, encode(base, split, data.max_length), precision, progress).argmax(dim=1).tolist()
    return found
