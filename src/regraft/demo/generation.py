"""The demo's tasks of generation: conversations of an instruction, a text and the answer."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from regraft.demo import texts
from regraft.demo.catalogue import LICENCES, MEDLINE, MEDLINE_2021
from regraft.demo.split import Row
from regraft.demo.tasks import TASKS, TaskSource, find_task, write_task

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_NOTICE_WORDS = 60
"""The most words of a notice: longer ones are mostly whole licences, which take long to read and name themselves."""
MIN_NOTICES = 20
"""The least number of notices of a licence expression: a model cannot learn to spell the name of a rarer one."""
CATCH_ALL = re.compile(r"unknown|other-|free-unknown|commercial-license|proprietary-license|warranty-disclaimer")
"""The beginnings of expressions that do not name a licence."""
MIN_ABSTRACT_WORDS = 40
"""The least number of words of an abstract: shorter ones have little more than their title says."""
TITLE_WORDS = range(4, 26)
"""The numbers of words of a title: shorter ones are headings such as `Reply`, longer ones few."""
INSTRUCTIONS = {
    "role-answer": "Which section of an abstract is the sentence from? Answer with one word: "
    "background, objective, methods, results or conclusions.",
    "licence-expression": "Which software licence does the notice refer to? Answer with its key, such as gpl-2.0-plus.",
    "abstract-title": "Write the title of the paper with this abstract.",
}
"""The system message of each task's conversations; the user's message is the text alone."""


def _role_answer(wheel: Path) -> Iterator[Row]:
    for row in TASKS["section-role"].read_rows(wheel):
        yield row._replace(label=row.label.lower())


def _licence_expression(wheel: Path) -> Iterator[Row]:
    """Read notices; those that differ only in numbers, punctuation and letter case are a group."""
    rows: dict[bytes, Row] = {}
    for licence in texts.licences(wheel):
        text = texts.clean(re.sub(r"\{\{|\}\}", "", licence.text))
        is_named = licence.key and not CATCH_ALL.match(licence.key)
        if is_named and 4 <= len(text.split(maxsplit=MAX_NOTICE_WORDS + 1)) <= MAX_NOTICE_WORDS:
            group = " ".join(re.findall("[a-z]+", text.lower()))
            rows.setdefault(texts.text_key(text), Row(text, licence.key, group, stratum=licence.key))
    counts = Counter(row.label for row in rows.values())
    return (row for row in rows.values() if counts[row.label] >= MIN_NOTICES)


def _abstract_title(wheel: Path) -> Iterator[Row]:
    """Read abstracts with their titles; those with the same title are a group. Brackets mark a translated title."""
    for abstract in texts.abstracts(wheel, MEDLINE_2021):
        title = abstract.title.rstrip(".")
        is_usable = len(title.split()) in TITLE_WORDS and not title.startswith("[")
        if is_usable and len(abstract.text.split(maxsplit=MIN_ABSTRACT_WORDS)) > MIN_ABSTRACT_WORDS:
            text = abstract.text[: texts.MAX_CHARACTERS].rstrip()
            yield Row(text, title, title.casefold(), stratum="title")


def _conversation(instruction: str, row: Row) -> dict[str, Any]:
    turns = (("system", instruction), ("user", row.text), ("assistant", row.label))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _answers(metric: str, max_new_tokens: int) -> dict[str, Any]:
    return {"type": "text-generation", "metric": metric, "max_new_tokens": max_new_tokens}


GENERATION_TASKS: dict[str, TaskSource] = {
    "role-answer": TaskSource(
        "bio",
        MEDLINE,
        _answers("exact_match", 6),
        _role_answer,
        test_share=0.2,
        max_length=192,
        is_shuffled=True,
        columns=partial(_conversation, INSTRUCTIONS["role-answer"]),
        suffix=".jsonl",
    ),
    "licence-expression": TaskSource(
        "legal",
        LICENCES,
        _answers("exact_match", 20),
        _licence_expression,
        test_share=0.2,
        max_length=256,
        columns=partial(_conversation, INSTRUCTIONS["licence-expression"]),
        suffix=".jsonl",
    ),
    "abstract-title": TaskSource(
        "bio",
        MEDLINE,
        _answers("rouge_l", 48),
        _abstract_title,
        test_share=0.2,
        max_length=704,
        is_shuffled=True,
        columns=partial(_conversation, INSTRUCTIONS["abstract-title"]),
        suffix=".jsonl",
    ),
}
"""The tasks by name."""


def write_generation_task(
    name: str,
    folder: Path,
    *,
    train: int | None = None,
    dev: int | None = None,
    test: int | None = None,
    seed: int = 0,
    allow_fewer: bool = False,
) -> Path:
    """Write a task's `task.yaml`, and its `train`, `dev` and `test` conversations, as `write_task` does.

    A sentence's abstract, a notice but for its numbers and punctuation, and a title are in one split only.

    Args:
        name: A key of `GENERATION_TASKS`.
        folder: The folder to write.
        train: The number of training conversations; all by default.
        dev: The number of dev conversations; a tenth of `train` by default.
        test: The number of test conversations; all by default.
        seed: The seed of the order and, with sizes, of the choice of conversations.
        allow_fewer: Write all conversations of a split that has fewer than asked for, instead of refusing it.

    Returns:
        The path of `task.yaml`.

    Raises:
        RecipeError: No task has that name, or a size is not positive.
        DataError: As for `write_task`.
    """
    source = find_task(name, GENERATION_TASKS)
    return write_task(name, folder, source=source, train=train, dev=dev, test=test, seed=seed, allow_fewer=allow_fewer)
