"""Tables and marked texts of taggers: spans by type, and sentences with their spans."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from regraft.task.types.class_views import class_views, measure_calibrations
from regraft.task.types.span_metrics import tag_names
from regraft.task.types.tagging import OUTSIDE, types_of
from regraft.task.types.view import Column, MarkedText, Span, Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from regraft.task.split import Split, Targets
    from regraft.task.types.tagging import Scheme, TaggedSpan
    from regraft.task.types.view import ModelPredictions, View

MAX_SENTENCES = 5
"""The most sentences of a view of marked text: enough to see what the tags mean."""
MAX_WORDS = 60
"""The most words that are shown of an example of the data: more than most sentences have, less than a document."""


def compare_taggers(
    targets: Targets, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str], scheme: Scheme
) -> tuple[View, ...]:
    """Build a table of F1 by type, and a chart of the calibration of whole sentences.

    Args:
        targets: The tags of each sentence, as indices.
        old: The old model's predictions.
        new: The new model's predictions.
        labels: The tags, by their indices.
        scheme: The tagging scheme.
    """
    true_spans = _spans(targets, labels, scheme)
    before, after = (_f1_by_type(true_spans, _spans(model.predictions, labels, scheme)) for model in (old, new))
    num_spans = Counter(span_type for _, span_type, _, _ in true_spans)
    columns = (
        Column("type", "text"),
        Column("spans", "count"),
        Column("F1 before", "number"),
        Column("F1 after", "number"),
        Column("change", "change"),
    )
    rows = tuple(
        (
            name or "span",
            num_spans[name],
            before.get(name, 0.0),
            after.get(name, 0.0),
            after.get(name, 0.0) - before.get(name, 0.0),
        )
        for name in types_of(labels)
    )
    return (Table("F1 of spans by type", columns, rows), *class_views((), measure_calibrations(old, new)))


def show_examples(split: Split, labels: Sequence[str], scheme: Scheme) -> tuple[View, ...]:
    """Build a table of the numbers of spans by type, and marked text of sentences that together have many types.

    Args:
        split: The sentences.
        labels: The tags, by their indices.
        scheme: The tagging scheme.
    """
    spans_by_sentence = [scheme.spans(tag_names(target, labels)) for target in split.targets]
    num_spans = Counter(span.type for spans in spans_by_sentence for span in spans)
    num_words = Counter(span.type for spans in spans_by_sentence for span in spans for _ in range(span.start, span.end))
    num_sentences = Counter(span_type for spans in spans_by_sentence for span_type in {span.type for span in spans})
    columns = (
        Column("type", "text"),
        Column("spans", "count"),
        Column("words", "count"),
        Column(f"sentences of {len(split):,}", "count"),
    )
    rows = tuple((name or "span", num_spans[name], num_words[name], num_sentences[name]) for name in types_of(labels))
    unseen = set(num_spans)
    order: list[tuple[bool, int]] = []
    for index, spans in enumerate(spans_by_sentence):
        types = {span.type for span in spans}
        if types:
            order.append((not types & unseen, index))  # sentences with a new type come first
        unseen -= types
    shown = sorted(index for _, index in sorted(order)[:MAX_SENTENCES])
    texts = []
    for index in shown:
        words = split.inputs[index]
        spans = [span for span in spans_by_sentence[index] if span.end <= MAX_WORDS]
        texts.append((*mark_spans(words[:MAX_WORDS], spans), *([Span(" …")] if len(words) > MAX_WORDS else [])))
    return (
        Table(f"Spans in {split.name}", columns, rows),
        MarkedText(f"Sentences of {split.name} with their spans", tuple(texts)),
    )


def show_flips(split: Split, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]) -> tuple[View, ...]:
    """Build a marked text of sentences that flipped, the negative flips first, each with three lines of tags.

    Args:
        split: The sentences.
        old: The old model's predictions.
        new: The new model's predictions.
        labels: The tags, by their indices.
    """
    flipped = [index for index in range(len(split)) if old.right[index] != new.right[index]]
    flipped.sort(key=lambda index: not old.right[index])
    texts = [
        (Span(f"row {split.row_numbers[index]}, {name}: "), *_mark_tags(split.inputs[index], tags[index], labels))
        for index in flipped[:MAX_SENTENCES]
        for name, tags in (("true", split.targets), ("before", old.predictions), ("after", new.predictions))
    ]
    return (MarkedText("Sentences that flipped, with their tags", tuple(texts)),) if texts else ()


def _mark_tags(words: Sequence[str], tags: Sequence[int], labels: Sequence[str]) -> list[Span]:
    """Return a sentence as consecutive pieces of text, of which the words with a tag other than `O` are marked."""
    pieces: list[Span] = []
    for word, tag in zip(words, tags, strict=True):
        pieces += [Span(word, "" if labels[tag] == OUTSIDE else labels[tag]), Span(" ")]
    return pieces[:-1]


def mark_spans(words: Sequence[str], spans: Sequence[TaggedSpan]) -> tuple[Span, ...]:
    """Return a sentence as consecutive pieces of text, marked by the types of spans.

    Args:
        words: The words of the sentence.
        spans: The spans of words, which do not overlap, in their order.
    """
    pieces: list[Span] = []
    end = 0
    for span in spans:
        pieces += [Span(f"{word} ") for word in words[end : span.start]]
        pieces += [Span(" ".join(words[span.start : span.end]), span.type or "span"), Span(" ")]
        end = span.end
    pieces.append(Span(" ".join(words[end:])))
    return tuple(piece for piece in pieces if piece.text)


def _spans(tags: Iterable[Any], labels: Sequence[str], scheme: Scheme) -> set[tuple[int, str, int, int]]:
    """Return the spans of all sentences, as tuples of the sentence's index, the type, the start and the end."""
    return {
        (index, span.type, span.start, span.end)
        for index, sentence in enumerate(tags)
        for span in scheme.spans(tag_names(sentence, labels))
    }


def _f1_by_type(
    true_spans: set[tuple[int, str, int, int]], predicted_spans: set[tuple[int, str, int, int]]
) -> dict[str, float]:
    """Return the F1 of each type that occurs."""
    hits = Counter(span_type for _, span_type, _, _ in true_spans & predicted_spans)
    totals = Counter(span_type for spans in (true_spans, predicted_spans) for _, span_type, _, _ in spans)
    return {name: 2 * hits[name] / total for name, total in totals.items()}
