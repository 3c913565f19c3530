"""Quotes in CSV and TSV, JSON lists, and compressed files: read unchanged, or refused as ambiguous or damaged."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pandas
import pyarrow
import pytest
from helpers import assert_mentions, make_task, read_texts
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import DataError
from regraft.model.corpus import Corpus
from regraft.task import Task, read_task
from regraft.task.delimited import read_delimited

UNUSUAL_TEXTS = [
    "NA",
    'a "quoted" word',
    '"whole"',
    "tab\there, comma",
    "two\nlines",
    '"open',
    "1.0",
    " blanks ",
    "sep\u2028é",
    'both "\t\n"',
]
TEXTS = [*UNUSUAL_TEXTS, *(f"n {i}" for i in range(30))]
ROWS = [(text, ("True", "False")[i % 2]) for i, text in enumerate(TEXTS)]
DIGEST = "03455e7b418ab51c134dbeb16ce68792d2e72c51cf8655c9a2fc3bb44bd81b0f"
"""The digest of `ROWS` as recorded by regraft 0.1."""


def make_frame() -> pandas.DataFrame:
    """Return `ROWS` as a table of pandas."""
    return pandas.DataFrame(ROWS, columns=["text", "label"])


def write_tsv(file: Path, texts: list[str]) -> str:
    """Write texts with alternating labels and no quoting, and return the path."""
    lines = [f"{text}\t{('neg', 'pos')[i % 2]}" for i, text in enumerate(texts)]
    file.write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    return str(file)


def make_texts(replacements: dict[int, str]) -> list[str]:
    """Build 40 texts, with replacements by index."""
    return [replacements.get(i, f"the film was number {i}") for i in range(40)]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_files_that_pandas_writes_keep_their_digest(tmp_path: Path, quoting: int) -> None:
    make_frame().to_csv(tmp_path / "a.tsv", sep="\t", index=False, quoting=quoting)
    make_frame().to_csv(tmp_path / "a.csv", index=False, quoting=quoting)
    for name in ("a.tsv", "a.csv"):
        assert read_task(make_task(str(tmp_path / name))).digest() == DIGEST


@pytest.mark.parametrize(
    ("replacements", "unquoted"),
    [
        ({4: 'he said "no"', 7: 'a 12" pipe'}, {}),  # both readings agree
        ({4: '" spider-man " is better than most'}, {}),
        ({4: '"a gripping film'}, {}),
        ({4: '"a gripping film', 6: 'happy ever after" they said'}, {}),
        ({4: '"a gripping film"'}, {4: "a gripping film"}),
    ],
)
def test_quotes_that_no_csv_writer_leaves_are_characters(
    tmp_path: Path, replacements: dict[int, str], unquoted: dict[int, str]
) -> None:
    data = read_task(make_task(write_tsv(tmp_path / "a.tsv", make_texts(replacements))))
    assert read_texts(data) == make_texts(replacements | unquoted)
    assert data.train.labels.tolist() == [(row - 1) % 2 for row in data.train.row_numbers]


@pytest.mark.parametrize(
    ("replacements", "phrases"),
    [
        ({4: '"a gripping film', 7: 'they lived happily ever after"'}, ["row 5", "goes on for 4 lines"]),
        ({4: '"a gripping film', 5: 'they lived happily ever after"'}, ["row 5", "goes on for 2 lines"]),
        ({4: '"a gripping film', 5: "no label\tx\ty", 7: 'ever after"'}, ["row 5", "goes on for 4 lines"]),
        ({4: '"a gripping film', 9: 'a "doubled"" quote'}, ["Doubled quotes"]),
        ({4: '"a gripping film', 9: "too\tmany"}, ["row 5", "With quotes as characters", "row 10"]),
    ],
)
def test_ambiguous_quotes_are_refused_unless_declared(
    tmp_path: Path, replacements: dict[int, str], phrases: list[str]
) -> None:
    file = write_tsv(tmp_path / "a.tsv", make_texts(replacements))
    with pytest.raises(DataError) as error:
        read_task(make_task(file))
    assert_mentions(error, file, "`quoting: plain`", "`quoting: quoted`", *phrases)
    if not any("\t" in text for text in replacements.values()):
        (tmp_path / "t.yaml").write_text("train: a.tsv\ntext: text\nlabel: label\nquoting: plain\n")
        assert read_texts(read_task(Task.load(tmp_path / "t.yaml"))) == make_texts(replacements)


def test_declared_quoting_applies_to_csv_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f'"open {i},{i % 2}\n' for i in range(6)))
    with pytest.raises(DataError, match="declare `quoting: plain`"):
        read_task(make_task(str(tmp_path / "a.csv")))
    assert read_texts(read_task(make_task(str(tmp_path / "a.csv"), quoting="plain")))[0] == '"open 0'
    (tmp_path / "t.yaml").write_text("train: a.csv\ntext: text\nlabel: label\nquoting: none\n")
    with pytest.raises(DataError, match=r"'quoting' is 'none'\. Set it to quoted or plain"):
        Task.load(tmp_path / "t.yaml")


FIELDS = st.text(st.sampled_from('""\t\na \'é'), min_size=1, max_size=12)


@given(
    st.lists(st.tuples(FIELDS, FIELDS, st.sampled_from("01")), min_size=1, max_size=6),
    st.permutations(["one", "two", "label"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_tables_of_pandas_are_read_unchanged_or_refused(
    rows: list[tuple[str, str, str]], order: list[str], quoting: int
) -> None:
    table = pandas.DataFrame(rows, columns=["one", "two", "label"])[order]
    content = table.to_csv(sep="\t", index=False, quoting=quoting)  # type: ignore[call-overload]
    try:
        columns, _ = read_delimited(Path("a.tsv"), content, "\t", order, "label", None)
    except DataError:  # a text has lines that look like rows
        assert quoting == csv.QUOTE_MINIMAL
        return
    assert columns == {column: table[column].tolist() for column in order}


@given(st.lists(st.tuples(st.text(st.sampled_from('""a b\''), min_size=1), st.sampled_from("01")), min_size=1))
def test_no_row_of_plain_tsv_is_lost(rows: list[tuple[str, str]]) -> None:
    content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    try:
        columns, _ = read_delimited(Path("a.tsv"), content, "\t", ["text", "label"], "label", None)
    except DataError:
        return
    assert columns["label"] == [label for _, label in rows]


def test_a_json_list_is_read_like_json_lines(tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in ROWS]
    (tmp_path / "list.json").write_bytes(b"\xef\xbb\xbf\n " + json.dumps(rows, indent=1).encode())
    assert read_task(make_task(str(tmp_path / "list.json"))).digest() == DIGEST
    assert list(Corpus((str(tmp_path / "list.json"),)).documents()) == TEXTS


@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2", "zst"])
def test_compressed_files_are_read_and_damaged_ones_refused(tmp_path: Path, suffix: str) -> None:
    def compress(content: bytes) -> bytes:
        if suffix == "zst":
            return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
        return {"gz": gzip, "xz": lzma, "bz2": bz2}[suffix].compress(content)

    content = make_frame().to_csv(index=False).encode()
    file = tmp_path / f"a.csv.{suffix}"
    file.write_bytes(compress(content))
    assert read_task(make_task(str(file))).digest() == DIGEST
    for damaged in (file.read_bytes()[:-12], b"not compressed"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be decompressed"):
            read_task(make_task(str(file)))
    (tmp_path / f"c.txt.{suffix}").write_bytes(compress(b"one\r\ntwo\rthree\n\n"))
    assert list(Corpus((str(tmp_path / f"c.txt.{suffix}"),)).documents()) == ["one", "two", "three"]
