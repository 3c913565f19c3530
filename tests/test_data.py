"""Data as other tools write it: read as its writer meant it, or refused with what to do."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from conftest import data_of as data_in_memory
from hypothesis import given
from hypothesis import strategies as st

from regraft.diagnosis.verdict import verdict
from regraft.errors import DataError, MismatchError
from regraft.methods.target import Target
from regraft.task import Split, Task, TaskData, TextClassification, data_warnings, load_data, read_task, weakness
from regraft.task.data import Split as SplitOfBefore
from regraft.task.delimited import read_delimited
from regraft.task.types.class_metrics import ACCURACY
from regraft.tuning.corpus import Corpus

ODD = [
    "NA", 'a "quoted" word', '"whole"', "tab\there, comma", "two\nlines", '"open', "1.0", " blanks ", "sep\u2028é",
    'both "\t\n"',
]  # fmt: skip
ROWS = [(text, ("True", "False")[i % 2]) for i, text in enumerate([*ODD, *(f"n {i}" for i in range(30))])]
DIGEST = "03455e7b418ab51c134dbeb16ce68792d2e72c51cf8655c9a2fc3bb44bd81b0f"  # what 0.1 recorded for ROWS


def task(train: Any, **changes: Any) -> Task:
    return TextClassification.model_validate({"name": "t", "train": train, "text": "text", "label": "label", **changes})


def frame() -> pandas.DataFrame:
    return pandas.DataFrame(ROWS, columns=["text", "label"])


def write_tsv(file: Path, texts: list[str]) -> str:
    lines = [f"{text}\t{('neg', 'pos')[i % 2]}" for i, text in enumerate(texts)]
    file.write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    return str(file)


def plain_texts(changed: dict[int, str]) -> list[str]:
    return [changed.get(i, f"the film was number {i}") for i in range(40)]


def read_texts(data: TaskData) -> list[str]:
    rows = [*zip(data.train.rows, data.train.texts, strict=True), *zip(data.dev.rows, data.dev.texts, strict=True)]
    return [texts[0] for _, texts in sorted(rows)]


def data_of(labels: tuple[str, ...], train: list[int], dev: list[int]) -> TaskData:
    splits = [
        Split(name, f"{name}.csv", [(f"{name} {i}",) for i in range(len(y))], np.array(y), np.arange(1, len(y) + 1))
        for name, y in (("train", train), ("dev", dev))
    ]
    return data_in_memory(*splits, labels=labels)


# ---- quotes of TSV


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_what_pandas_writes_has_the_digest_of_before(tmp_path: Path, quoting: int) -> None:
    frame().to_csv(tmp_path / "a.tsv", sep="\t", index=False, quoting=quoting)
    frame().to_csv(tmp_path / "a.csv", index=False, quoting=quoting)
    for name in ("a.tsv", "a.csv"):
        assert read_task(task(str(tmp_path / name))).digest() == DIGEST


@pytest.mark.parametrize(
    ("changed", "as_read"),
    [
        ({4: 'he said "no"', 7: 'a 12" pipe'}, {}),  # both readings agree
        ({4: '" spider-man " is better than most'}, {}),
        ({4: '"a gripping film'}, {}),
        ({4: '"a gripping film', 6: 'happy ever after" they said'}, {}),
        ({4: '"a gripping film"'}, {4: "a gripping film"}),
    ],
)
def test_quotes_that_no_writer_of_csv_leaves_are_characters(
    tmp_path: Path, changed: dict[int, str], as_read: dict[int, str]
) -> None:
    data = read_task(task(write_tsv(tmp_path / "a.tsv", plain_texts(changed))))
    assert read_texts(data) == plain_texts(changed | as_read)
    assert data.train.labels.tolist() == [(row - 1) % 2 for row in data.train.rows]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({4: '"a gripping film', 7: 'they lived happily ever after"'}, ["row 5", "goes on for 4 lines"]),
        ({4: '"a gripping film', 5: 'they lived happily ever after"'}, ["row 5", "goes on for 2 lines"]),
        ({4: '"a gripping film', 5: "no label\tx\ty", 7: 'ever after"'}, ["row 5", "goes on for 4 lines"]),
        ({4: '"a gripping film', 9: 'a "doubled"" quote'}, ["Doubled quotes"]),
        ({4: '"a gripping film', 9: "too\tmany"}, ["row 5", "With quotes as characters", "row 10"]),
    ],
)
def test_tsv_whose_quotes_are_not_clear_is_refused_and_can_be_declared(
    tmp_path: Path, changed: dict[int, str], said: list[str]
) -> None:
    file = write_tsv(tmp_path / "a.tsv", plain_texts(changed))
    with pytest.raises(DataError) as error:
        read_task(task(file))
    for part in [file, "`quoting: plain`", "`quoting: quoted`", *said]:
        assert part in str(error.value)
    if not any("\t" in text for text in changed.values()):
        (tmp_path / "t.yaml").write_text("train: a.tsv\ntext: text\nlabel: label\nquoting: plain\n")
        assert read_texts(read_task(Task.load(tmp_path / "t.yaml"))) == plain_texts(changed)


def test_quoting_is_one_of_two_and_holds_for_csv_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f'"open {i},{i % 2}\n' for i in range(6)))
    with pytest.raises(DataError, match="declare `quoting: plain`"):
        read_task(task(str(tmp_path / "a.csv")))
    assert read_texts(read_task(task(str(tmp_path / "a.csv"), quoting="plain")))[0] == '"open 0'
    (tmp_path / "t.yaml").write_text("train: a.csv\ntext: text\nlabel: label\nquoting: none\n")
    with pytest.raises(DataError, match=r"'quoting' is 'none'\. Give quoted or plain"):
        Task.load(tmp_path / "t.yaml")


texts = st.text(st.sampled_from('""\t\na \'é'), min_size=1, max_size=12)


@given(
    st.lists(st.tuples(texts, texts, st.sampled_from("01")), min_size=1, max_size=6),
    st.permutations(["one", "two", "label"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_tables_of_pandas_are_read_as_they_were_or_refused(
    rows: list[tuple[str, str, str]], order: list[str], quoting: int
) -> None:
    table = pandas.DataFrame(rows, columns=["one", "two", "label"])[order]
    written = table.to_csv(sep="\t", index=False, quoting=quoting)  # type: ignore[call-overload]
    try:
        columns, _ = read_delimited(Path("a.tsv"), written, "\t", order, "label", None)
    except DataError:  # a text whose lines read as rows
        assert quoting == csv.QUOTE_MINIMAL
        return
    assert columns == {column: table[column].tolist() for column in order}


@given(st.lists(st.tuples(st.text(st.sampled_from('""a b\''), min_size=1), st.sampled_from("01")), min_size=1))
def test_no_row_of_plain_tsv_is_ever_swallowed(rows: list[tuple[str, str]]) -> None:
    written = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    try:
        columns, _ = read_delimited(Path("a.tsv"), written, "\t", ["text", "label"], "label", None)
    except DataError:
        return
    assert columns["label"] == [label for _, label in rows]


# ---- other files


def test_a_json_list_is_read_as_lines_are(tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in ROWS]
    (tmp_path / "list.json").write_bytes(b"\xef\xbb\xbf\n " + json.dumps(rows, indent=1).encode())
    assert read_task(task(str(tmp_path / "list.json"))).digest() == DIGEST
    assert list(Corpus((str(tmp_path / "list.json"),)).documents()) == [text for text, _ in ROWS]


@pytest.mark.parametrize("ending", ["gz", "xz", "bz2", "zst"])
def test_compressed_files_are_read_and_damaged_ones_refused(tmp_path: Path, ending: str) -> None:
    def compress(content: bytes) -> bytes:
        if ending == "zst":
            return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
        return {"gz": gzip, "xz": lzma, "bz2": bz2}[ending].compress(content)

    content = frame().to_csv(index=False).encode()
    file = tmp_path / f"a.csv.{ending}"
    file.write_bytes(compress(content))
    assert read_task(task(str(file))).digest() == DIGEST
    for damaged in (file.read_bytes()[:-12], b"nothing of the kind"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be decompressed"):
            read_task(task(str(file)))
    (tmp_path / f"c.txt.{ending}").write_bytes(compress(b"one\r\ntwo\rthree\n\n"))
    assert list(Corpus((str(tmp_path / f"c.txt.{ending}"),)).documents()) == ["one", "two", "three"]


def test_what_expands_as_no_text_does_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.task.file.MIN_CHECKED_BYTES", 1000)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(DataError, match="expands to more than 100 times"):
        read_task(task(str(tmp_path / "a.csv.gz")))


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_folders_of_save_to_disk_are_read_with_their_class_names(tmp_path: Path, kind: str) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = [{"text": f"n {i}", "label": i % 2} for i in range(40)]
    whole = Dataset.from_list(rows, features=features)
    folder = tmp_path / "saved"
    if kind == "Dataset":
        whole.save_to_disk(folder, num_shards=3)
    else:
        DatasetDict({"train": whole, "test": whole.select(range(8))}).save_to_disk(folder)
    data = read_task(task({"dataset": str(folder), "split": "train[:50%]"}))
    assert (read_texts(data), data.labels) == ([f"n {i}" for i in range(20)], ("neg", "pos"))
    assert len(list(Corpus((str(folder),)).documents())) == 40
    if kind == "DatasetDict":
        with pytest.raises(DataError, match=r'Unknown split "dev"'):
            read_task(task({"dataset": str(folder), "split": "dev"}))
    state = next(folder.rglob("state.json"))
    state.write_text(state.read_text().replace('"data-', '"../data-'))
    with pytest.raises(DataError, match="outside of its folder"):
        read_task(task({"dataset": str(folder), "split": "train"}))


@pytest.mark.parametrize(
    ("names", "said"),
    [(["1", "1.0"], "are called '1'"), ([1, None], "not text"), (["a", "a"], "duplicated"), ({}, "is invalid")],
)
def test_class_names_that_are_none_are_refused(tmp_path: Path, names: Any, said: str) -> None:
    import pyarrow.parquet

    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pyarrow.table({"text": ["one", "two"], "label": [0, 1]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=said):
        read_task(task(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    "content", ['{"text": "a", "label": ' + "[" * 100_000, "[" * 100_000, '[{"text": "a"}', "{}\n[1]"]
)
def test_json_that_is_deep_or_cut_off_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl, row \d: "):
        read_task(task(str(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match=r"a\.jsonl, row \d: "):
        list(Corpus((str(tmp_path / "a.jsonl"),)).documents())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text;label\na;1\n", r"separated by ';'.*Write it with ','"),
        ("a.csv", "text\tlabel\na\t1\n", r"Name it \.tsv"),
        ("a.tsv", "text,label\na,1\n", r"Name it \.csv"),
        ("a.json", '{"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 2}}', "orient='records'"),
        ("a.json", '{"version": 1, "data": [{"text": "a", "label": 1}]}', "orient='records'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n'.encode("utf-16"), "Save the file as UTF-8"),
        ("data.arrow", "ARROW1", r"Write \{dataset: .*, split: train\}"),
        ("a.xlsx", "PK", r"Give a \.csv"),
    ],
)  # fmt: skip
def test_what_other_tools_write_is_refused_with_its_remedy(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=said):
        read_task(task(str(tmp_path / name)))


def test_half_a_character_is_refused_before_anything_is_tuned(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "\\ud800"}\n{"text": "b", "label": "x"}\n' * 4)
    with pytest.raises(DataError, match=r"the label '\\ud800' is not valid Unicode"):
        read_task(task(str(tmp_path / "a.jsonl")))
    (tmp_path / "c.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match="row 1: the text in column 'text' is not valid Unicode"):
        list(Corpus((str(tmp_path / "c.jsonl"),)).documents())


@pytest.mark.parametrize("ending", ["csv", "parquet", "yaml", "txt"])
def test_pipes_folders_and_names_too_long_are_refused_at_once(tmp_path: Path, ending: str) -> None:
    def read(name: str) -> None:
        if ending == "yaml":
            Task.load(tmp_path / name)
        elif ending == "txt":
            list(Corpus((str(tmp_path / name),)).documents())
        else:
            read_task(task(str(tmp_path / name)))

    os.mkfifo(tmp_path / f"pipe.{ending}")
    (tmp_path / f"folder.{ending}").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(DataError, match=rf"{name}\.{ending}: is a folder, pipe or device"):
            read(f"{name}.{ending}")
    with pytest.raises(DataError, match="name too long"):
        read("x" * 300 + f".{ending}")
    with pytest.raises(DataError, match="embedded null byte"):
        read(f"a\0.{ending}")


def test_a_pipe_in_a_folder_of_data_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"train\.csv: is a pipe"):
        read_task(task({"dataset": str(tmp_path), "split": "train"}))


# ---- hostile YAML

KEYS = "train: a.csv\ntext: text\nlabel: label\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a0: &a0 [x, y]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
         + "labels: *a9\n", "after aliases are expanded"),
        ("m0: &m0 {k: v}\n" + "".join(f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 10)}]\n" for i in range(1, 9)),
         "after aliases are expanded"),
        ("labels: &a [*a, b]\n", "refers to a value that contains it"),
        ("labels: " + "[" * 50_000, "nested too deeply"),
        ("labels: " + "[" * 150 + "]" * 150, "'labels.0' is [[[...]]]"),
        ("max_length: !!int x\n", "line 4: is not valid YAML (the tag '!!int'"),
        ("name: !!timestamp x\n", "the tag '!!timestamp'"),
        ("name: !!python/object:os.system x\n", "the tag '!!python/object:os.system'"),
        ('labels: ["\\ud800", b]\n', "not valid Unicode"),
        ("labels: [" + "[a], " * 5000 + "]", "4,980 more problems"),
        ("#" * 600_000, "larger than the 500,000 bytes"),
        ("max_length: " + "9" * 30, "a whole number of tokens"),
    ],
)  # fmt: skip
def test_yaml_made_to_exhaust_its_reader_is_refused_soon(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.yaml").write_text(KEYS + text)
    started = time.monotonic()
    with pytest.raises(DataError) as error:
        Task.load(tmp_path / "t.yaml")
    assert said in str(error.value)
    assert len(str(error.value)) < 10_000
    assert time.monotonic() - started < 10


def test_aliases_and_merges_of_honest_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("text: text\nlabel: &l label\n<<: {train: a.csv}\nlabels: [*l, other]\n")
    assert Task.load(tmp_path / "t.yaml").labels == ("label", "other")


# ---- labels


@pytest.mark.parametrize(
    ("labels", "head"),
    [
        (("false", "true"), ("True", "False")),
        (("false", "true"), ("TRUE", "FALSE")),
        (("1", "2"), ("2.0", "1.0")),
        (("Negative", "positive"), ("POSITIVE", "NEGATIVE")),
        (("a", "A", "true"), ("A", "True", "a")),
        (("caf\u00e9", "x"), ("x ", "cafe\u0301")),
    ],
)
def test_a_head_may_write_its_labels_otherwise(labels: tuple[str, ...], head: tuple[str, ...]) -> None:
    data = data_of(labels, [0, 1, 1, *range(len(labels))], [0, 1])
    renamed = data.relabel(head)
    assert renamed.labels == head
    for before, after in zip(data.train.labels, renamed.train.labels, strict=True):
        assert head[after].casefold()[0] == labels[before].casefold()[0]
    assert renamed.relabel(labels).digest() == data.digest()


@pytest.mark.parametrize("head", [("a", "A"), ("a", "b", "B"), ("yes", "no")])
def test_labels_that_could_be_several_of_the_head_are_refused(head: tuple[str, ...]) -> None:
    with pytest.raises(MismatchError, match="in `labels`"):
        data_of(("a", "b"), [0, 1], [0]).relabel(head)


def test_labels_that_look_alike_or_missing_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["positive", "Positive", "positive ", "posi\u200btive", "caf\u00e9", "cafe\u0301", "N/A", "fine"]
    rows = [{"text": f"n {i}", "label": names[i % len(names)]} for i in range(160)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING):
        data = load_data(task(str(tmp_path / "a.json")), seed=0)
    alike, accents, missing = data_warnings(data)
    assert "'posi\\u200btive'" in alike and "'Positive'" in alike and "'positive '" in alike
    assert "'caf\\xe9'" in accents and "'cafe\\u0301'" in accents
    assert "'N/A' looks like a missing value" in missing
    assert [record.getMessage() for record in caplog.records] == data_warnings(data)
    listed = task(str(tmp_path / "a.json"), labels=["positive", "caf\u00e9", "N/A", "fine"])
    with pytest.raises(DataError, match=r"'Positive' is not among .* differs from 'positive' only in case"):
        read_task(listed)


def test_control_characters_of_labels_do_not_reach_the_terminal(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from regraft.cli import app

    rows = [{"text": f"n {i}", "label": ["\x1b[31mred\nrow", "\u202eok"][i % 2]} for i in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "t.yaml").write_text('name: "a\\eb"\n' + KEYS.replace("a.csv", "a.json"))
    output = CliRunner().invoke(app, ["task", "check", str(tmp_path / "t.yaml")]).stdout
    assert "\\x1b[31mred\\nrow" in output and "\\u202eok" in output and "a\\x1bb" in output
    assert "\x1b[31m" not in output and "\u202e" not in output


# ---- splits that settle nothing


def test_tiny_and_single_class_splits_are_doubted() -> None:
    tiny, single, large = (data_of(("a", "b"), [0, 1] * 9, dev) for dev in ([1], [1] * 20, [0, 1] * 10))
    assert "dev has 1 example, too few" in data_warnings(tiny)[0]
    assert "examples of a single class" in data_warnings(single)[0]
    assert data_warnings(large) == []
    assert SplitOfBefore is Split


@pytest.mark.parametrize("labels", [[1], [1] * 30])
def test_nothing_is_sure_on_a_split_that_settles_nothing(labels: list[int]) -> None:
    data = data_of(("a", "b"), [0, 1] * 9, labels)
    doubt = weakness(data, data.dev)
    decided = verdict(ACCURACY, labels, labels, labels, 0.0, weakness=doubt)
    assert (decided.choice, decided.sure, decided.reasons[-1].name) == ("use as is", 0.0, "examples")
    bar = Target(ACCURACY, labels, labels, 1.0, 0.5, 1.0, None, tolerance=0.02, confidence=0.9, weakness=doubt)
    assert bar.measure(labels)["verdict"] == "undecided"
    many = [0, 1] * 15
    assert verdict(ACCURACY, many, many, many, 0.5).sure == 1.0
