"""Files and data sets as sources of tasks: read unchanged, or refused with a remedy."""

from __future__ import annotations

import gzip
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from helpers import TASK_KEYS, assert_mentions, make_rows, make_task, read_texts, write_table

from regraft.errors import DataError
from regraft.model.corpus import Corpus
from regraft.task import HubSplit, Task, TaskData, TextClassification, read_task, summarise

if TYPE_CHECKING:
    from pathlib import Path

UNUSUAL_TEXTS = [
    "NA",
    "null",
    "1.0",
    " blanks ",
    'a "quoted" word',
    "comma, and\nnew line",
    "\u2028 sep\u00e9",
    "x" * 200_000,
]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` cache in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_yields_the_same_unchanged_texts(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text, "label": i % 2, "unused": None} for i, text in enumerate(UNUSUAL_TEXTS)]

    def read_as(suffix: str) -> TaskData:
        dev = write_table(tmp_path / f"dev.{suffix}", make_rows(4, (0, 1)))
        return read_task(make_task(write_table(tmp_path / f"train.{suffix}", rows), dev=dev))

    data = read_as(suffix)
    assert [texts[0] for texts in data.train.texts] == UNUSUAL_TEXTS
    assert data.train.row_numbers.tolist() == list(range(1, len(UNUSUAL_TEXTS) + 1))
    assert data.labels == ("0", "1")
    assert data.digest() == read_as("jsonl").digest()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("raw_labels", "labels"),
    [
        ((10, 9, -1), ("-1", "9", "10")),
        ((2.0, 1.0), ("1", "2")),
        ((True, False), ("false", "true")),
        (("b", "a"), ("a", "b")),
    ],
)
def test_labels_have_the_same_names_and_order_in_every_format(
    tmp_path: Path, suffix: str, raw_labels: tuple[Any, ...], labels: tuple[str, ...]
) -> None:
    data = read_task(make_task(write_table(tmp_path / f"a.{suffix}", make_rows(12, raw_labels))))
    assert data.labels == labels


def test_two_columns_of_text_make_pairs(tmp_path: Path) -> None:
    rows = [{"label": i % 2, "p": f"premise {i}", "h": f"hypothesis {i}"} for i in range(20)]
    data = read_task(make_task(write_table(tmp_path / "a.csv", rows), text=("h", "p")))
    row_index = data.train.row_numbers[0] - 1
    assert data.train.texts[0] == (f"hypothesis {row_index}", f"premise {row_index}")


def test_listed_labels_fix_the_order_and_the_source_can_be_a_path(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", make_rows(10))
    keys = TASK_KEYS | {"name": "t", "train": tmp_path / "a.csv", "labels": ["pos", "neg"]}
    data = read_task(TextClassification.model_validate(keys))
    assert data.labels == ("pos", "neg")
    row = make_rows(10)[int(data.train.row_numbers[0]) - 1]
    assert data.train.labels[0] == data.labels.index(row["label"])


def test_a_folder_of_files_is_read_through_datasets(tmp_path: Path, hub_cache: None) -> None:
    (tmp_path / "set").mkdir()
    write_table(tmp_path / "set" / "train.parquet", make_rows(20))
    write_table(tmp_path / "set" / "test.parquet", make_rows(6, stem="unseen"))
    train, test = (HubSplit(dataset=str(tmp_path / "set"), split=split) for split in ("train", "test"))
    data = read_task(make_task(train, test=test))
    assert data.test is not None
    assert (len(data.train) + len(data.dev), len(data.test), data.labels) == (20, 6, ("neg", "pos"))
    train_file = write_table(tmp_path / "a.csv", make_rows(20))
    test_file = write_table(tmp_path / "b.csv", make_rows(6, stem="unseen"))
    assert data.digest() == read_task(make_task(train_file, test=test_file)).digest()


@pytest.mark.parametrize("source_kind", ["data set", "file"])
def test_class_names_of_datasets_are_used_in_their_order(tmp_path: Path, hub_cache: None, source_kind: str) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    (tmp_path / "set").mkdir()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["world", "arts", "unused"])})
    file = tmp_path / "set" / "train.parquet"
    Dataset.from_list(make_rows(20, (0, 1)), features=features).to_parquet(file)
    hub_split = HubSplit(dataset=str(tmp_path / "set"), split="train")
    data = read_task(make_task(hub_split if source_kind == "data set" else str(file)))
    assert data.labels == ("world", "arts", "unused")
    assert data.train.labels.tolist() == [(row - 1) % 2 for row in data.train.row_numbers]
    assert summarise(data)[0].absent == ("unused",)


def test_a_data_set_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as error:
        read_task(make_task(HubSplit(dataset="glue", config="mnli", split="train")))
    assert_mentions(error, "glue, config mnli, split train", "Couldn't reach the Hub", "Check its name")
    assert "long story" not in str(error.value)


def test_hidden_labels_of_a_hub_test_split_are_an_error(tmp_path: Path, hub_cache: None) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_list(make_rows(4, (0, 1)), features=features).to_parquet(tmp_path / "train.parquet")
    Dataset.from_list(make_rows(4, (-1,)), features=features).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError) as error:
        read_task(make_task(str(tmp_path / "train.parquet"), test=str(tmp_path / "test.parquet")))
    assert_mentions(error, tmp_path / "test.parquet", "row 1", "no label", "-1", "use another split")


# ---- unreadable sources


@pytest.mark.parametrize(
    ("name", "content", "phrases"),
    [
        ("a.xlsx", "x", ["files ending in '.xlsx'", ".parquet"]),
        ("imdb", "x", ["files without a suffix", "{dataset: imdb, split: train}"]),
        ("a.csv", "", ["there are no rows"]),
        ("a.csv", "text,label\n", ["there are no rows", "Use a source"]),
        ("a.jsonl", "\n\n", ["there are no rows"]),
        ("a.csv", "txt,label\na,b\n", ["no column 'text'", "Did you mean 'txt'?", "'txt', 'label'"]),
        ("a.csv", "text,label,text\na,b,c\n", ["several columns 'text'", "Rename"]),
        ("a.jsonl", '{"text": "a"}\n{"tag": 1}\n', ["no column 'label'", "'text', 'tag'"]),
        ("a.csv", "text,label\na,b\nc,d,e\n", ["row 2", "names 2 columns, the row has 3", "double quotes"]),
        ("a.csv", "text,label\na,b\nc\n", ["row 2", "names 2 columns, the row has 1"]),
        ("a.csv", 'text,label\na,b\n"c,d\n', ["row 2", "not valid CSV", "Close every double quote"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"text": \n', ["row 3", "not JSON", "one JSON object per line"]),
        ("a.json", "[1, 2]\n", ["row 1", "a JSON int", "one list of objects", "one object per line"]),
        ("a.csv", "text,label\na,x\n  ,y\n", ["row 2", "column 'text' is empty", "remove the row"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"label": 2}\n', ["row 2", "'text' is missing"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": 5, "label": 2}\n', ["row 2", "is of type int (5), not text"]),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n{"text": "", "label": 2}\n', ["row 1", "Unicode", "in 2 rows"]),
        ("a.csv", "text,label\na,x\nb,\n", ["row 2", "no label in column 'label'", "Label the row"]),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', ["row 1", "no label", "nan"]),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', ["row 1", "not a list", "text or as a number"]),
        ("a.csv", "text,label\na,x\nb,x\n", ["every row has the label 'x'", "two labels", "'label'"]),
        ("a.csv", "text,label\na,x\nb,y\n", ["single example of each stratum", "`dev`"]),
        ("a.parquet", "PAR0", ["not a readable Parquet file"]),
    ],
)
def test_an_invalid_source_is_refused_with_file_row_and_remedy(
    tmp_path: Path, name: str, content: str, phrases: list[str]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_task(make_task(str(path)))
    assert_mentions(error, path, *phrases)


def test_missing_files_and_invalid_utf8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_task(make_task(str(tmp_path / "none.csv")))
    assert_mentions(error, tmp_path / "none.csv", "no such file", "Correct the path")
    (tmp_path / "latin.csv").write_bytes("text,label\na,b\ncaf\u00e9,c\n".encode("latin-1"))
    with pytest.raises(DataError) as error:
        read_task(make_task(str(tmp_path / "latin.csv")))
    assert_mentions(error, tmp_path / "latin.csv", "line 3", "not UTF-8", "Save the file as UTF-8")


@pytest.mark.parametrize("labels", [None, ["neg", "pos"]])
def test_an_unseen_label_is_an_error_with_its_row(tmp_path: Path, labels: list[str] | None) -> None:
    train = write_table(tmp_path / "a.csv", make_rows(10))
    test = write_table(tmp_path / "b.csv", make_rows(5, ("pos", "mixed")))
    with pytest.raises(DataError) as error:
        read_task(make_task(train, test=test, labels=labels))
    remedy = "Add it to `labels`" if labels else "List all labels"
    assert_mentions(error, f"{test}, row 2", "'mixed'", "'neg', 'pos'", remedy)


# ---- files of other tools


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.task.file.MIN_CHECKED_BYTES", 1000)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(DataError, match="expands to more than 100 times"):
        read_task(make_task(str(tmp_path / "a.csv.gz")))


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_folders_of_save_to_disk_are_read_with_their_class_names(tmp_path: Path, kind: str) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = [{"text": f"n {i}", "label": i % 2} for i in range(40)]
    dataset = Dataset.from_list(rows, features=features)
    folder = tmp_path / "saved"
    if kind == "Dataset":
        dataset.save_to_disk(folder, num_shards=3)
    else:
        DatasetDict({"train": dataset, "test": dataset.select(range(8))}).save_to_disk(folder)
    data = read_task(make_task({"dataset": str(folder), "split": "train[:50%]"}))
    assert (read_texts(data), data.labels) == ([f"n {i}" for i in range(20)], ("neg", "pos"))
    assert len(list(Corpus((str(folder),)).documents())) == 40
    if kind == "DatasetDict":
        with pytest.raises(DataError, match=r'Unknown split "dev"'):
            read_task(make_task({"dataset": str(folder), "split": "dev"}))
    state = next(folder.rglob("state.json"))
    state.write_text(state.read_text().replace('"data-', '"../data-'))
    with pytest.raises(DataError, match="outside of its folder"):
        read_task(make_task({"dataset": str(folder), "split": "train"}))


@pytest.mark.parametrize(
    ("class_names", "message"),
    [(["1", "1.0"], "are called '1'"), ([1, None], "not text"), (["a", "a"], "duplicated"), ({}, "is invalid")],
)
def test_invalid_class_names_are_refused(tmp_path: Path, class_names: Any, message: str) -> None:
    import pyarrow.parquet

    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": class_names, "_type": "ClassLabel"}}
    table = pyarrow.table({"text": ["one", "two"], "label": [0, 1]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read_task(make_task(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    "content", ['{"text": "a", "label": ' + "[" * 100_000, "[" * 100_000, '[{"text": "a"}', "{}\n[1]"]
)
def test_json_that_is_deep_or_cut_off_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl, row \d: "):
        read_task(make_task(str(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match=r"a\.jsonl, row \d: "):
        list(Corpus((str(tmp_path / "a.jsonl"),)).documents())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text;label\na;1\n", r"separated by ';'.*Write it with ','"),
        ("a.csv", "text\tlabel\na\t1\n", r"Name it \.tsv"),
        ("a.tsv", "text,label\na,1\n", r"Name it \.csv"),
        ("a.json", '{"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 2}}', "orient='records'"),
        ("a.json", '{"version": 1, "data": [{"text": "a", "label": 1}]}', "orient='records'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n'.encode("utf-16"), "Save the file as UTF-8"),
        ("data.arrow", "ARROW1", r"Write \{dataset: .*, split: train\}"),
        ("a.xlsx", "PK", r"Use a \.csv"),
    ],
)
def test_unreadable_files_of_other_tools_are_refused_with_a_remedy(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        read_task(make_task(str(tmp_path / name)))


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "\\ud800"}\n{"text": "b", "label": "x"}\n' * 4)
    with pytest.raises(DataError, match=r"the label '\\ud800' is not valid Unicode"):
        read_task(make_task(str(tmp_path / "a.jsonl")))
    (tmp_path / "c.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match="row 1: the text in column 'text' is not valid Unicode"):
        list(Corpus((str(tmp_path / "c.jsonl"),)).documents())


@pytest.mark.parametrize("suffix", ["csv", "parquet", "yaml", "txt"])
def test_pipes_folders_and_names_too_long_are_refused_at_once(tmp_path: Path, suffix: str) -> None:
    def read_file(name: str) -> None:
        if suffix == "yaml":
            Task.load(tmp_path / name)
        elif suffix == "txt":
            list(Corpus((str(tmp_path / name),)).documents())
        else:
            read_task(make_task(str(tmp_path / name)))

    os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(DataError, match=rf"{name}\.{suffix}: is a folder, pipe or device"):
            read_file(f"{name}.{suffix}")
    with pytest.raises(DataError, match="name too long"):
        read_file("x" * 300 + f".{suffix}")
    with pytest.raises(DataError, match="embedded null byte"):
        read_file(f"a\0.{suffix}")


def test_a_pipe_in_a_folder_of_data_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"train\.csv: is a pipe"):
        read_task(make_task({"dataset": str(tmp_path), "split": "train"}))
