"""`label-free`: learn from the old model on unlabelled text.

Source: the start and the loss of Qin et al., 2023 (arXiv:2305.08702), section 5, without the loss on labels.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError, RecipeError
from regraft.methods.answers import answered_data
from regraft.methods.method import OLD_HEAD_ONLY, Objective
from regraft.tuning.distill import Distillation

if TYPE_CHECKING:
    from torch import nn

    from regraft.methods.job import Job
    from regraft.methods.method import Curve
    from regraft.task import Split, Task, TaskData


@dataclasses.dataclass(frozen=True)
class LabelFree:
    """Options of `label-free`: the loss against the teacher, and the texts.

    Args:
        beta: The weight of the mean squared error of hidden states, by default as in `distill`; 0 for none.
        temperature: The temperature that softens both models' outputs, above 0 and up to 10,000; by default as in
            `distill`.
        text: A text file (one text per line) or JSONL file (column `text`) to learn from in place of the task's
            training texts; the number of steps stays the same.

    Raises:
        RecipeError: `beta` is negative, or `temperature` is not above 0.
    """

    beta: float | None = None
    temperature: float | None = None
    text: str = ""

    def __post_init__(self) -> None:
        """Refuse a negative beta, and a temperature that is not above 0."""
        if (self.beta or 0) < 0 or (self.temperature is not None and self.temperature <= 0):
            raise RecipeError(f"beta must be at least 0 (found {self.beta}), temperature above 0 ({self.temperature}).")

    def for_task(self, task: Task) -> LabelFree:
        """Return the options with the defaults of a task's type in place of None.

        Args:
            task: The task.
        """
        defaults = Distillation(beta=self.beta, temperature=self.temperature).for_task(task)
        return dataclasses.replace(self, beta=defaults.beta, temperature=defaults.temperature)


def distil_on_texts(job: Job, model: nn.Module, options: LabelFree) -> Curve:
    """Train the new model to reproduce the old model's outputs, without any label.

    The best weights are those whose predicted distributions on dev, such as class probabilities, are closest to the old
    model's. A task type that standardises its targets does so by the old model's predictions. Errors that both models
    make, and improvements that the new base would allow, cannot be measured without labels.

    Args:
        job: The job, with the task's training texts.
        model: The model to tune, which the start returned.
        options: The terms of the loss, and the file of texts, if any.

    Returns:
        The learning curve; its `score` is the mean overlap of the predicted distributions with the old model's, 0–1.

    Raises:
        DataError: The file of texts is missing, has no text, or has a row that cannot be read, or the task's inputs are
            not texts.
        RecipeError: A number in the options is out of range, or a loss or a score became infinite or NaN.
    """
    if options.text:
        job = dataclasses.replace(job, data=dataclasses.replace(job.data, train=read_texts(options.text, job.data)))
    if job.data.task.head_in_base:
        job = dataclasses.replace(job, data=answered_data(job, "train", "dev"))
    elif job.data.task.target_scaling(job.data.train.targets) is not None:
        job = dataclasses.replace(job, data=_pseudo_labelled(job))
    job.notes["labels"] = len(job.labelled_rows)
    job.notes["score"] = "overlap of the predicted distributions with the old model's on dev"
    loss_options = Distillation(alpha=1.0, beta=options.beta, temperature=options.temperature, decay="none")
    return job.tune(model, loss_options, teacher_selects_best=True)


def _pseudo_labelled(job: Job) -> TaskData:
    """Return the data with the old model's predictions as the training targets, which determine the scaling."""
    predictions = job.old_deployment().predictions(job.data.train)
    train = dataclasses.replace(job.data.train, targets=job.data.task.as_targets(predictions))
    return dataclasses.replace(job.data, train=train)


def digest_text(options: LabelFree, seed: int) -> dict[str, Any]:
    """Compute the digest of the text file.

    Args:
        options: The options, with the file's path if there is one.
        seed: Unused, since all texts are read.

    Returns:
        The digest as `text`; an empty dictionary without a file.

    Raises:
        DataError: The file is missing or cannot be read.
    """
    from regraft.tuning import Corpus

    return {"text": Corpus((options.text,)).digest()} if options.text else {}


def read_texts(file: str, data: TaskData) -> Split:
    """Read texts without labels as examples of a task.

    Args:
        file: A text file, with one text per line, or a JSONL file with a column `text`.
        data: The task's data; the texts become inputs of its task type.

    Returns:
        The texts as a training split, with placeholders as targets.

    Raises:
        DataError: The file is missing, has no text, or has a row that cannot be read, or the task's inputs are not
            texts.
    """
    import numpy as np

    from regraft.task import Split
    from regraft.tuning import Corpus

    corpus = Corpus((file,))
    corpus.digest()  # raises if the file is missing
    inputs = [data.task.as_inputs(text) for text in corpus.documents()]
    if not inputs:
        raise DataError(f"{file}: has no text. Pass a file with one text per line.")
    task = data.task
    prediction = task.chance_prediction(data.train.targets, data.labels)
    placeholders = task.as_targets(task.constant_predictions(prediction, inputs))
    return Split("train", file, inputs, placeholders, np.arange(1, len(inputs) + 1))


LABEL_FREE = Objective(
    "label-free",
    distil_on_texts,
    LabelFree,
    summary="learn from the old model on raw text",
    needs=("text", "training"),
    heads=OLD_HEAD_ONLY,
    contents=digest_text,
    scores_agreement=True,
)
