"""Tagging schemes: the conversion of the tags of words to typed spans of words, and back."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OUTSIDE = "O"
"""The tag of a word outside of all spans."""


@dataclasses.dataclass(frozen=True)
class TaggedSpan:
    """A span of consecutive words of one type.

    Args:
        type: The type, such as `PER`; empty if tags have no type, as in `B`.
        start: The index of the first word.
        end: The index after the last word.
    """

    type: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A tagging scheme: the prefixes of tags by the position of the word in its span.

    Args:
        name: The name in task files.
        first: The prefix of the first of several words.
        inside: The prefix of a word between the first and the last.
        last: The prefix of the last of several words.
        single: The prefix of a word that is a span by itself.
        marks_all_starts: Whether every span starts with `first` or `single`; if not, only spans that directly follow a
            span of the same type do.
    """

    name: str
    first: str
    inside: str
    last: str
    single: str
    marks_all_starts: bool = True

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All prefixes, each once."""
        return tuple(dict.fromkeys((self.first, self.inside, self.last, self.single)))

    @property
    def marks_ends(self) -> bool:
        """Whether the last word of a span has a prefix of its own."""
        return self.last != self.inside

    def tags_of_type(self, span_type: str) -> list[str]:
        """Return all tags of a type, in the order of `prefixes`."""
        return [_join(prefix, span_type) for prefix in self.prefixes]

    def is_tag(self, tag: str) -> bool:
        """Return whether a tag is one of the scheme: `O`, or a prefix, alone or with a hyphen and a type."""
        return tag == OUTSIDE or (tag[:1] in self.prefixes and tag[1:2] in ("", "-") and tag[1:] != "-")

    def spans(self, tags: Sequence[str]) -> list[TaggedSpan]:
        """Return the spans of a sequence of tags, which may be an invalid sequence, such as a model's prediction.

        As in seqeval's strict mode, a span that does not start or end as the scheme demands is no span.

        Args:
            tags: The tag of each word, each of them a tag of the scheme.
        """
        parsed = [split_tag(tag) for tag in (*tags, OUTSIDE)]
        spans = []
        previous = (OUTSIDE, "")
        start = 0
        while start < len(tags):
            end = start + 1
            if self._starts(previous, parsed[start]):
                while self._continues(parsed[end - 1], parsed[end]):
                    end += 1
                if self._ends(parsed[end - 1], parsed[end]):
                    spans.append(TaggedSpan(parsed[start][1], start, end))
            previous = parsed[end - 1]
            start = end
        return spans

    def tags(self, spans: Iterable[TaggedSpan], num_words: int) -> list[str]:
        """Return the tags of words in spans, the reverse of `spans`.

        Args:
            spans: Spans that do not overlap, in their order.
            num_words: The number of words.
        """
        tags = [OUTSIDE] * num_words
        previous: TaggedSpan | None = None
        for span in spans:
            follows = previous is not None and (previous.type, previous.end) == (span.type, span.start)
            is_marked = self.marks_all_starts or follows
            prefixes = [self.inside] * (span.end - span.start)
            prefixes[-1] = self.last
            if is_marked:
                prefixes[0] = self.first if len(prefixes) > 1 else self.single
            tags[span.start : span.end] = [_join(prefix, span.type) for prefix in prefixes]
            previous = span
        return tags

    def invalid_word(self, tags: Sequence[str]) -> int | None:
        """Return the index of the first word whose tag is not possible in the scheme; None if all are.

        Args:
            tags: The tag of each word.
        """
        for index, tag in enumerate(tags):
            if not self.is_tag(tag):
                return index
        expected = self.tags(self.spans(tags), len(tags))
        return next((index for index, tag in enumerate(tags) if tag != expected[index]), None)

    def _starts(self, previous: tuple[str, str], current: tuple[str, str]) -> bool:
        """Return whether a word starts a span, unless it continues one."""
        (previous_prefix, previous_type), (prefix, span_type) = previous, current
        if self.marks_all_starts:
            return prefix in (self.first, self.single)
        if prefix == self.first:
            return previous_prefix != OUTSIDE and previous_type == span_type
        return prefix == self.inside and (previous_prefix != self.inside or previous_type != span_type)

    def _continues(self, previous: tuple[str, str], current: tuple[str, str]) -> bool:
        """Return whether a word continues the span of the previous word."""
        return (
            previous[0] in (self.first, self.inside)
            and current[0] in (self.inside, self.last)
            and previous[1] == current[1]
        )

    def _ends(self, last: tuple[str, str], following: tuple[str, str]) -> bool:
        """Return whether a span may end at a word that the following word does not continue."""
        if self.marks_ends:
            return last[0] in (self.last, self.single)
        # without marked starts, seqeval lets a span that is a marked word alone end at no marked word of another type
        is_undecided = not self.marks_all_starts and last[0] == following[0] == self.first
        return not is_undecided or last[1] == following[1]


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("IOB1", "B", "I", "I", "B", marks_all_starts=False),
        Scheme("IOB2", "B", "I", "I", "B"),
        Scheme("BILOU", "B", "I", "L", "U"),
        Scheme("IOBES", "B", "I", "E", "S"),
    )
}
"""The schemes by name. IOB1 is that of the original CoNLL-2003 (Ramshaw and Marcus, 1995); IOB2 is often called BIO;
BILOU and IOBES (BIOES) differ in the letters of two prefixes."""


def split_tag(tag: str) -> tuple[str, str]:
    """Return the prefix and the type of a tag, such as `B` and `PER`; the type of `O`, and of `B` alone, is empty."""
    prefix, _, span_type = tag.partition("-")
    return prefix, span_type


def types_of(tags: Iterable[str]) -> list[str]:
    """Return the types of tags, each once, in the order of their first use."""
    return list(dict.fromkeys(split_tag(tag)[1] for tag in tags if tag != OUTSIDE))


def detect_scheme(sequences: Iterable[Sequence[str]]) -> Scheme:
    """Return the scheme that sequences of tags suggest; the sequences may still be invalid in it.

    Args:
        sequences: The tags of each example.

    Returns:
        BILOU or IOBES if one of their own prefixes occurs, else IOB1 if a span starts with `I`, else IOB2.
    """
    prefixes: Counter[str] = Counter()
    has_unmarked_start = False
    for tags in sequences:
        previous = (OUTSIDE, "")
        for tag in tags:
            current = split_tag(tag)
            prefixes[current[0]] += 1
            has_unmarked_start |= current[0] == "I" and (previous[0] == OUTSIDE or previous[1] != current[1])
            previous = current
    for name in ("BILOU", "IOBES"):
        scheme = SCHEMES[name]
        if prefixes[scheme.last] or prefixes[scheme.single]:
            return scheme
    return SCHEMES["IOB1" if has_unmarked_start else "IOB2"]


def _join(prefix: str, span_type: str) -> str:
    return f"{prefix}-{span_type}" if span_type else prefix
