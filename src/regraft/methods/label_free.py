"""`label-free`: learn from the old tuned model on raw text alone.

Source: the start and the loss are those of Qin et al., 2023 (arXiv:2305.08702), section 5, without its labels.
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
    """What is learnt from the teacher, and on which texts.

    Args:
        beta: The weight of the hidden states' mean squared error, 0 for none.
        temperature: Softens both models' outputs.
        text: A text file (a text a line) or JSONL file (column `text`) to learn on, in place of the task's training
            texts; the steps stay as many.

    Raises:
        RecipeError: A number is out of its range.
    """

    beta: float = 1.0
    temperature: float = 5.0
    text: str = ""

    def __post_init__(self) -> None:
        """Check every number."""
        if self.beta < 0 or self.temperature <= 0:
            raise RecipeError(
                f"beta must not be negative (found {self.beta}), temperature above 0 ({self.temperature})."
            )


def distil_on_texts(job: Job, model: Any, options: LabelFree) -> Curve:
    """Bring the new model to say what the old one says; no label is read.

    The best weights are those whose outputs on dev are closest to the old model's. How much both err there, and what
    the new base knows better, cannot be seen so.

    Args:
        job: What and where.
        model: What is tuned.
        options: What is learnt, and from which texts.

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
    """Identify the text that is learned on.

    Args:
        options: Which file, if any.
        seed: Plays no part.

    Returns:
        Its digest as `text`.
    """
    from regraft.tuning import Corpus

    return {"text": Corpus((options.text,)).digest()} if options.text else {}


def read_texts(file: str, data: TaskData) -> Split:
    """Read texts without labels as examples of a task.

    Args:
        file: A text or JSONL file.
        data: The task.

    Returns:
        The texts, whose targets are placeholders.

    Raises:
        DataError: The file is missing, has no text, or a row of it cannot be read.
    """
    import numpy as np

    from regraft.errors import DataError
    from regraft.task import Split
    from regraft.tuning import Corpus

    corpus = Corpus((file,))
    corpus.digest()  # says so if there is no such file
    inputs = [data.task.as_inputs(text) for text in corpus.documents()]
    if not inputs:
        raise DataError(f"{file}: holds no text. Give a file with a text a line.")
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
)
