"""`label-free`: learn from the old model on unlabelled text.

Source: the start and the loss of Qin et al., 2023 (arXiv:2305.08702), section 5, without its labels.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.methods.method import OLD_HEAD_ONLY, Objective

if TYPE_CHECKING:
    from regraft.methods.job import Job
    from regraft.methods.method import Curve
    from regraft.task import Split, TaskData


@dataclasses.dataclass(frozen=True)
class LabelFree:
    """The loss against the teacher, and the texts.

    Args:
        beta: The weight of the mean squared error of hidden states; 0 for none.
        temperature: The temperature of both models' outputs.
        text: A text file (one text per line) or JSONL file (column `text`) to learn from in place of the task's
            training texts; the number of steps stays the same.

    Raises:
        RecipeError: A number is out of range.
    """

    beta: float = 1.0
    temperature: float = 5.0
    text: str = ""

    def __post_init__(self) -> None:
        """Check every number."""
        if self.beta < 0 or self.temperature <= 0:
            raise RecipeError(f"beta must be at least 0 (found {self.beta}), temperature above 0 ({self.temperature}).")


def distil_on_texts(job: Job, model: Any, options: LabelFree) -> Curve:
    """Train the new model to reproduce the old one's outputs, without any label.

    The best weights are those whose outputs on dev are closest to the old model's. Errors that both make, and what the
    new base could do better, cannot be measured without labels.

    Args:
        job: The job.
        model: The model to tune.
        options: The loss, and the texts.

    Returns:
        The learning curve; its `score` is the mean overlap of the class probabilities with the old model's.
    """
    from regraft.tuning import Distillation

    if options.text:
        job = dataclasses.replace(job, data=dataclasses.replace(job.data, train=read_texts(options.text, job.data)))
    job.notes["labels"] = len(job.labelled)
    job.notes["score"] = "overlap of class probabilities with the old model's on dev"
    loss = Distillation(alpha=1.0, beta=options.beta, temperature=options.temperature, decay="none")
    return job.tune(model, loss, teacher_judges=True)


def contents(options: LabelFree, seed: int) -> dict[str, Any]:
    """Identify the content of the text file.

    Args:
        options: The options, with the file's path if there is one.
        seed: Unused, as nothing is drawn.

    Returns:
        The file's digest as `text`; nothing without a file.
    """
    from regraft.tuning import Corpus

    return {"text": Corpus((options.text,)).digest()} if options.text else {}


def read_texts(file: str, data: TaskData) -> Split:
    """Read texts without labels as examples of a task.

    Args:
        file: A text or JSONL file.
        data: The task.

    Returns:
        The texts, with placeholders as targets.

    Raises:
        DataError: The file is missing, has no text, or has a row that cannot be read.
    """
    import numpy as np

    from regraft.errors import DataError
    from regraft.task import Split
    from regraft.tuning import Corpus

    corpus = Corpus((file,))
    corpus.digest()  # raises if there is no such file
    inputs = [data.task.as_inputs(text) for text in corpus.documents()]
    if not inputs:
        raise DataError(f"{file}: has no text. Pass a file with one text per line.")
    placeholders = np.repeat(data.train.targets[:1], len(inputs), axis=0)
    return Split("train", file, inputs, placeholders, np.arange(1, len(inputs) + 1))


LABEL_FREE = Objective(
    "label-free",
    distil_on_texts,
    LabelFree,
    summary="learn from the old model on raw text",
    needs=("text", "training"),
    heads=OLD_HEAD_ONLY,
    contents=contents,
    scores_agreement=True,
)
