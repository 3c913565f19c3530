"""Views of generated answers: their health, and the answers of two models side by side."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regraft.task.split import Split, object_array
from regraft.task.types.answer_texts import as_text, has_loop, words
from regraft.task.types.view import AnswerPair, Answers, Column, ModelPredictions, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from regraft.task.types.view import Change, View

MAX_PAIRS = 100
"""The number of examples that are shown: as many as somebody may read, and at most 0.4 MB in a record."""
MAX_CHARACTERS = 1000
"""The number of characters of a text that are shown: some 150 words, in which most answers differ."""
CHANGES: tuple[Change, ...] = ("negative", "positive", "changed", "same")
"""What an upgrade did to an answer, in the order in which examples are shown."""


@dataclasses.dataclass(frozen=True)
class AnswerHealth:
    """Figures of generated answers that show a broken model, template or stopping rule, whatever the score.

    Args:
        ended: The share of answers that end by a token that ends a text, rather than at the length limit; None if it is
            unknown.
        length_ratio: The mean number of words of the answers ÷ that of their references; None without references.
        repetition: The share of answers in which a run of words recurs at once; see `answer_texts.has_loop`.
        empty: The share of answers without any character but white space.
    """

    ended: float | None
    length_ratio: float | None
    repetition: float | None
    empty: float | None


def health(predictions: Sequence[Any], targets: Sequence[Any]) -> AnswerHealth:
    """Measure the health of generated answers.

    Args:
        predictions: One prediction per example, a mapping with `answer` and `ended` or a text. Those without an answer
            do not count.
        targets: One reference answer per example, None for examples without one.

    Returns:
        The figures; all are None if no answers were generated.
    """
    answers, references, ends = [], [], []
    for prediction, target in zip(predictions, targets, strict=True):
        is_mapping = isinstance(prediction, Mapping)
        answer = prediction.get("answer") if is_mapping else prediction
        if answer is not None:
            answers.append(as_text(answer))
            references.append(None if target is None else as_text(target))
            ends.append(prediction.get("ended") if is_mapping else None)
    answer_lengths, reference_lengths = [], []
    for answer, reference in zip(answers, references, strict=True):
        if reference is not None:
            answer_lengths.append(len(words(answer)))
            reference_lengths.append(len(words(reference)))
    return AnswerHealth(
        ended=_share([bool(end) for end in ends if end is not None]),
        length_ratio=sum(answer_lengths) / sum(reference_lengths) if sum(reference_lengths) else None,
        repetition=_share([has_loop(answer) for answer in answers]),
        empty=_share([not answer.strip() for answer in answers]),
    )


def _share(truths: Sequence[bool]) -> float | None:
    """Return the share that is true; None of nothing."""
    return statistics.fmean(truths) if truths else None


def health_views(targets: Sequence[Any], old: Sequence[Any], new: Sequence[Any]) -> tuple[View, ...]:
    """Build a table of the health of two models' answers; none if neither generated any.

    Args:
        targets: One reference answer per example, None for examples without one.
        old: The old model's predictions.
        new: The new model's predictions.
    """
    table = health_table({"old": (old, targets), "new": (new, targets)})
    return () if table is None else (table,)


def health_table(answers: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]) -> Table | None:
    """Build a table of the health of models' answers; None if no model generated any.

    Args:
        answers: The predictions of each model and the reference answers, by the model's name.
    """
    columns = (
        Column("model", "text"),
        Column("ended by itself", "share"),
        Column("length ÷ reference", "number"),
        Column("in a loop", "share"),
        Column("empty", "share"),
    )
    figures = {name: health(predictions, targets) for name, (predictions, targets) in answers.items()}
    if all(model.empty is None for model in figures.values()):
        return None
    rows = tuple((name, *dataclasses.astuple(model)) for name, model in figures.items())
    return Table("Health of the answers", columns, rows)


def recorded_pairs(old_rows: Sequence[Mapping[str, Any]], new_rows: Sequence[Mapping[str, Any]]) -> Answers | None:
    """Build a view of the answers of two models from their records; see `GenerativeTask.answer_pairs`.

    Args:
        old_rows: The old model's lines of `predictions.jsonl`, with the `prompt` of each example.
        new_rows: The new model's lines.
    """
    import numpy as np

    old_by_row = {row["row"]: row for row in old_rows}
    pairs = [(old_by_row[row["row"]], row) for row in new_rows if row["row"] in old_by_row and "prompt" in row]
    new = [row for _, row in pairs]
    split = Split(
        name="",
        source="",
        inputs=[row["prompt"] for row in new],
        targets=object_array([row["label"] for row in new]),
        row_numbers=np.array([row["row"] for row in new], dtype=np.int64),
    )
    before, after = (
        ModelPredictions([row["prediction"] for row in rows], None, [row["right"] for row in rows])
        for rows in ([row for row, _ in pairs], new)
    )
    views = side_by_side(split, str, before, after)
    return views[0] if views else None


def side_by_side(
    split: Split,
    as_prompt: Callable[[Any], str],
    old: ModelPredictions,
    new: ModelPredictions,
    limit: int = MAX_PAIRS,
) -> tuple[Answers, ...]:
    """Build a view of the answers of two models: negative flips first, then positive flips, then other changes.

    Args:
        split: The examples, whose targets are the reference answers.
        as_prompt: A function that formats the inputs of an example, such as `Task.as_text`.
        old: The old model's predictions.
        new: The new model's predictions.
        limit: The number of examples to show.

    Returns:
        The view; none if neither model generated answers.
    """
    pairs = []
    for index, (before, after) in enumerate(zip(old.predictions, new.predictions, strict=True)):
        texts = [_answer_text(before), _answer_text(after)]
        if texts != [None, None]:
            pairs.append((CHANGES.index(_change(old.right[index], new.right[index], *texts)), index, texts))
    shown = []
    for change, index, (before, after) in sorted(pairs, key=lambda pair: pair[:2])[:limit]:
        target = split.targets[index]
        shown.append(
            AnswerPair(
                row=int(split.row_numbers[index]),
                change=CHANGES[change],
                prompt=_cut(as_prompt(split.inputs[index]), from_end=True),
                reference=None if target is None else _cut(as_text(target)),
                before=None if before is None else _cut(before),
                after=None if after is None else _cut(after),
            )
        )
    title = "Answers side by side"
    if len(shown) < len(pairs):
        title += f": {len(shown):,} of {len(pairs):,} examples"
    return (Answers(title, tuple(shown)),) if shown else ()


def _answer_text(prediction: Any) -> str | None:
    """Return the generated answer of a prediction as text; None if none was generated."""
    answer = prediction.get("answer") if isinstance(prediction, Mapping) else prediction
    return None if answer is None else as_text(answer)


def _change(old_right: bool | None, new_right: bool | None, before: str | None, after: str | None) -> Change:
    """Name what the upgrade did to an answer."""
    if old_right is not None and new_right is not None and old_right != new_right:
        return "negative" if old_right else "positive"
    return "same" if before == after else "changed"


def _cut(text: str, *, from_end: bool = False) -> str:
    """Cut a text to `MAX_CHARACTERS`, or to its last ones, such as the last turn of a prompt."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"…{text[1 - MAX_CHARACTERS :]}" if from_end else f"{text[: MAX_CHARACTERS - 1]}…"
