"""The answers of several models to the same prompts, side by side."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.adaptation import load_outcome
from regraft.demo.files import read_texts
from regraft.task import load_data

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_EXAMPLES = 8
"""The number of examples that are shown: as many as fit a terminal together with the tables before them."""


@dataclasses.dataclass(frozen=True)
class AnswersOfModels:
    """The answers of several models to the same prompts.

    Args:
        models: The names of the models.
        rows: For some test examples the text, the reference answer and the answer of each model; first those on which
            the models differ.
        examples: The number of test examples.
    """

    models: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    examples: int


def collect_answers(task_file: Path, outcomes: Mapping[str, Path]) -> AnswersOfModels | None:
    """Collect the answers to a task's test prompts from the outcomes of several models.

    Args:
        task_file: A `task.yaml` that `write_task` wrote.
        outcomes: The outcome folders of the models, by the models' names.

    Returns:
        The answers; None for a task whose models write none.
    """
    data = load_data(task_file, seed=0)  # the task names a test split, so that nothing is drawn
    if data.test is None or not data.task.answers_needed:
        return None
    predictions = [load_outcome(folder).predictions("test") for folder in outcomes.values()]
    answers = list(zip(*([prediction["answer"] for prediction in model] for model in predictions), strict=True))
    texts = read_texts(task_file.parent / "test.jsonl")
    rows = [(text, str(target), *row) for text, target, row in zip(texts, data.test.targets, answers, strict=True)]
    rows.sort(key=lambda row: len(set(row[2:])) == 1)
    return AnswersOfModels(tuple(outcomes), tuple(rows[:MAX_EXAMPLES]), len(answers))
