"""The old deployment's answers to a task's prompts, in place of references."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from regraft.checkpoint import is_sealed, seal, write_json
from regraft.errors import DataError
from regraft.model.answers import encode_prompts
from regraft.task.split import object_array

if TYPE_CHECKING:
    from regraft.methods.job import Job
    from regraft.model import Deployment
    from regraft.task import Split, TaskData


def answered_data(job: Job, *split_names: str) -> TaskData:
    """Let the old deployment answer the prompts of splits greedily; the answers are stored in the work folder.

    Args:
        job: The job, with the old model and the task's prompts.
        *split_names: The names of the splits, such as `train`.

    Returns:
        The data, with the answers as targets of these splits, and marked as labelled.

    Raises:
        DataError: The examples are texts without a prompt, or every answer is empty.
    """
    data = job.data
    file = job.work_folder / "answers.json"
    seal_file = job.work_folder / "answers.sealed.json"
    if not is_sealed(seal_file):
        old = job.old_deployment()
        answers = {name: _answer_texts(old, getattr(data, name)) for name in split_names}
        if not any(answer.strip() for answer in answers[split_names[0]]):
            raise DataError(
                f"{getattr(data, split_names[0]).source}: the old model's answers to all prompts are empty, so there "
                "is nothing to learn from them. Check the prompts and the chat template."
            )
        write_json(file, answers)
        seal(seal_file, [file])
    stored = json.loads(file.read_text(encoding="utf-8"))
    splits = {
        name: dataclasses.replace(getattr(data, name), targets=object_array(stored[name])) for name in split_names
    }
    return dataclasses.replace(data, labelled=True, **splits)


def _answer_texts(old: Deployment, split: Split) -> list[str]:
    """Let a model answer the prompts of a split; each answer is decoded after its prompt, with the space before it."""

    def decode(ids: list[int]) -> str:
        return str(old.base.tokenizer.decode(ids, skip_special_tokens=True))

    prompts = encode_prompts(old.base, old.data, split)
    texts = []
    for prompt, answer in zip(prompts, old.answer_ids(split), strict=True):
        start, whole = decode(prompt), decode([*prompt, *answer])
        texts.append(whole.removeprefix(start) if whole.startswith(start) else decode(answer))
    return texts
