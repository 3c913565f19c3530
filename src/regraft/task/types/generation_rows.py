"""Rows of data for text generation: their conversion, and warnings of those from which little is learnt."""

from __future__ import annotations

import functools
import json
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from regraft.errors import DataError
from regraft.task.types.conversation import end_with_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from regraft.task.source import SourceTable
    from regraft.task.types.conversation import Answer, Inputs

logger = logging.getLogger(__name__)

Converted = TypeVar("Converted")

MAX_CLASS_WORDS = 5
"""The most words of an answer that names a class, as in `Software Development & Tools`."""
CLASS_TOKENS = 32
"""The most tokens to write as such an answer: several for each word, yet few if a model does not end its answers."""
MIN_CLASS_REPETITIONS = 5
"""The least mean number of examples per answer at which answers are taken for classes, and are strata: with fewer, few
of an answer can be held out as dev."""


def convert_rows(
    source: str, row_numbers: Sequence[int], convert: Callable[[Any], Converted], rows: Sequence[Any]
) -> list[Converted]:
    """Apply a function to each row; name the source and the row in the DataError that it may raise."""
    converted = []
    for row_number, row in zip(row_numbers, rows, strict=True):
        try:
            converted.append(convert(row))
        except DataError as error:
            raise DataError(f"{source}, row {row_number}: {error}") from error
    return converted


def end_with_answers(table: SourceTable, examples: list[tuple[Inputs, Answer]]) -> list[tuple[Inputs, Answer]]:
    """Leave out the turns after the assistant's last turn; refuse rows without an answer."""
    num_cut = sum(answer is None for _, answer in examples)
    ended = convert_rows(
        table.source,
        table.row_numbers,
        lambda example: end_with_answer(example[0]) if example[1] is None else example,
        examples,
    )
    if num_cut:
        logger.warning(
            "%s: %s of %s conversations do not end with a turn of the assistant; what follows its last turn is left "
            "out.",
            table.source,
            f"{num_cut:,}",
            f"{len(examples):,}",
        )
    return ended


@functools.cache
def warn_of_unlearnt(
    source: str, split: str, num_answered: int, num_without_labels: int, num_last_turns: int, max_length: int
) -> None:
    """Log the number of examples without labels, and of those with labels in the last turn alone, once for each."""
    if num_without_labels:
        logger.warning(
            "%s: %s of %s examples of %s have no answer within %s tokens, so nothing is learnt from them. Raise "
            "max_length, or shorten prompts.",
            source,
            f"{num_without_labels:,}",
            f"{num_answered:,}",
            split,
            f"{max_length:,}",
        )
    if num_last_turns:
        logger.warning(
            "%s: of %s of %s conversations of %s, the last turn alone is learnt, because the chat template changes "
            "earlier turns. Use a template with generation marks to learn all turns of the assistant.",
            source,
            f"{num_last_turns:,}",
            f"{num_answered:,}",
            split,
        )


def choose_metric(answers: Sequence[Any]) -> dict[str, Any]:
    """Choose the metric that suits reference answers, and for short ones the most tokens of an answer.

    Args:
        answers: The answers; None for examples without one.

    Returns:
        The keys of a task file: `json_match` if all are JSON objects or lists, `exact_match` if they are few different
        short ones; none if the default metric suits them.
    """
    texts = [answer for answer in answers if isinstance(answer, str)]
    if not texts or len(texts) < len(answers):
        return {}
    if all(isinstance(_parse_json(text), dict | list) for text in texts):
        return {"metric": "json_match"}
    are_short = all(len(text.split()) <= MAX_CLASS_WORDS for text in texts)
    are_few = len({*texts}) * MIN_CLASS_REPETITIONS <= len(texts)
    return {"metric": "exact_match", "max_new_tokens": CLASS_TOKENS} if are_short and are_few else {}


def _parse_json(text: str) -> Any:
    """Parse JSON; return None if it is none."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
