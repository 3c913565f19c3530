"""Similarities of a generated answer to its reference answer, as text."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

NGRAM_ORDER = 6
"""The longest character n-grams of chrF; the value of its author and of sacrebleu."""
RECALL_WEIGHT = 2
"""β of chrF2, the customary variant: recall counts twice as much as precision."""
LOOP_WORDS = 4
"""The fewest words that count as a loop if they recur at once: shorter runs recur in ordinary text (`that that`)."""

_ASCII_WORD = re.compile(r"[a-z0-9]+")
# Scripts without spaces between words are customarily divided into characters: kana and Chinese characters.
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def as_text(answer: Any) -> str:
    """Return an answer as text: an assistant turn with tool calls as JSON, with its keys in order.

    Args:
        answer: A text, or an assistant turn as a mapping.
    """
    return answer if isinstance(answer, str) else json.dumps(answer, sort_keys=True, ensure_ascii=False)


def normalise(text: str) -> str:
    """Remove differences that do not change an answer: of Unicode form (NFKC), of case and of white space.

    Args:
        text: An answer.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())  # folding can undo the form


def extract(text: str, pattern: re.Pattern[str]) -> str | None:
    """Return the part of a text that a pattern captures first, such as the number after `####`.

    Args:
        text: An answer.
        pattern: A regular expression; of its groups, the first that takes part in the match counts.

    Returns:
        The group, or the whole match if the pattern has no group; None without a match.
    """
    match = pattern.search(text)
    if match is None:
        return None
    return next((group for group in match.groups() if group is not None), match.group())


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile the regular expression that extracts answers.

    Args:
        pattern: A regular expression of Python.

    Raises:
        DataError: It is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(
            f"'pattern' is {pattern!r:.200}, which is not a regular expression: {error}. Correct it as Python's "
            "module re reads it; in YAML, write it in single quotes."
        ) from error


def words(text: str) -> list[str]:
    """Split a text into runs of letters and digits, in lower case; Chinese characters and kana are words of their own.

    For text in ASCII, these are the tokens of the package rouge-score without stemming, which reads no other letters.

    Args:
        text: An answer.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    characters = unicodedata.normalize("NFKC", text).lower()
    spaced = "".join(  # combining marks, such as the vowels of Hindi, belong to the letter before them
        character if character.isalnum() or unicodedata.category(character).startswith("M") else " "
        for character in characters
    )
    return [word for word in _UNSPACED.sub(r" \1 ", spaced).split() if any(map(str.isalnum, word))]


def rouge_l(reference: str, answer: str) -> float:
    """Compute ROUGE-L: F1 of the longest common subsequence of words.

    Source: Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".

    Args:
        reference: The reference answer.
        answer: The generated answer.

    Returns:
        The F1, 0–1; 1 if neither has words.
    """
    reference_words, answer_words = words(reference), words(answer)
    total = len(reference_words) + len(answer_words)
    return 2 * _common_subsequence(reference_words, answer_words) / total if total else 1.0


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by the bit-parallel algorithm of Hyyrö (2004)."""
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    unmatched = every = (1 << len(first)) - 1
    for word in second:
        matches = unmatched & positions.get(word, 0)
        unmatched = ((unmatched + matches) | (unmatched - matches)) & every
    return len(first) - unmatched.bit_count()


def token_f1(reference: str, answer: str) -> float:
    """Compute the F1 of SQuAD 2.0: of the words in common, without articles and punctuation, in any order.

    Source: Rajpurkar et al., 2018 (arXiv:1806.03822), the official script.

    Args:
        reference: The reference answer.
        answer: The generated answer.

    Returns:
        The F1, 0–1; 1 if neither has words.
    """
    bags = [Counter(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()) for text in (reference, answer)]
    total = sum(bag.total() for bag in bags)
    return 2 * (bags[0] & bags[1]).total() / total if total else 1.0


def count_ngrams(reference: str, answer: str) -> list[int]:
    """Count the character n-grams of which chrF is computed, without white space.

    Args:
        reference: The reference answer.
        answer: The generated answer.

    Returns:
        For each order from 1 to `NGRAM_ORDER`: the number of the answer's n-grams (0 if the reference has none), of the
        reference's, and of those in common; then the number of the answer's characters.
    """
    counts: list[int] = []
    reference_characters, answer_characters = ("".join(text.split()) for text in (reference, answer))
    for order in range(1, NGRAM_ORDER + 1):
        expected, generated = (
            Counter(characters[start : start + order] for start in range(len(characters) - order + 1))
            for characters in (reference_characters, answer_characters)
        )
        counts += [generated.total() if expected else 0, expected.total(), (expected & generated).total()]
    return [*counts, len(answer_characters)]


def parse_json(answer: Any) -> Any:
    """Parse an answer as JSON, without the code fence around it if it has one.

    Args:
        answer: A text, or an assistant turn as a mapping, which is returned as it is.

    Raises:
        ValueError: It is not JSON; NaN and infinity are not.
        RecursionError: It is nested too deeply.
    """
    if not isinstance(answer, str):
        return answer
    fenced = _FENCE.fullmatch(answer.strip())
    return json.loads(fenced[1] if fenced else answer, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def json_match(reference: Any, answer: Any) -> bool:
    """Return whether two answers are JSON of equal values; the order of keys does not count, and 1 equals 1.0.

    Args:
        reference: The reference answer.
        answer: The generated answer.
    """
    try:
        return bool(parse_json(reference) == parse_json(answer))
    except (ValueError, RecursionError):
        return False


def has_loop(text: str) -> bool:
    """Return whether a run of words recurs at once, as where a model is caught in a loop.

    A run of at least `LOOP_WORDS` words must be followed by itself; shorter loops count as soon as two or more rounds
    of them make up such a run. A phrase that recurs later, as in a list of similar items, is none.

    Args:
        text: A generated answer.
    """
    sequence = words(text)
    starts: dict[tuple[str, ...], list[int]] = {}
    for second in range(len(sequence) - LOOP_WORDS + 1):
        earlier = starts.setdefault(tuple(sequence[second : second + LOOP_WORDS]), [])
        for first in earlier:
            length = second - first
            if length >= LOOP_WORDS and sequence[first:second] == sequence[second : second + length]:
                return True
        earlier.append(second)
    return False
