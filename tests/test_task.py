"""What a user notices of tasks: what is read, what is drawn, what is scored, and what each error says."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import data_of as data_in_memory
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import DataError, MismatchError, RecipeError
from regraft.task import (
    Flips,
    HubSplit,
    Split,
    Task,
    TaskData,
    TextClassification,
    chance_score,
    flips,
    load_data,
    read_task,
    score,
    summarise,
)

if TYPE_CHECKING:
    from pathlib import Path

Rows = list[dict[str, Any]]

ODD_TEXTS = [
    "NA",
    "null",
    "1.0",
    " blanks ",
    'a "quoted" word',
    "comma, and\nnew line",
    "\u2028 sep\u00e9",
    "x" * 200_000,
]


def rows_of(count: int, labels: tuple[Any, ...] = ("neg", "pos"), stem: str = "text") -> Rows:
    return [{"text": f"{stem} number {i}", "label": labels[i % len(labels)]} for i in range(count)]


def write(path: Path, rows: Rows) -> str:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def task(train: str | HubSplit, **changes: Any) -> Task:
    return TextClassification.model_validate({"name": "t", "train": train, "text": "text", "label": "label", **changes})


def split_of(labels: list[int], name: str = "train") -> Split:
    texts: list[tuple[str, ...]] = [(f"{name} {i}",) for i in range(len(labels))]
    return Split(name, f"{name}.csv", texts, np.array(labels, dtype=np.int64), np.arange(1, len(labels) + 1))


def data_of(labels: list[int], classes: int = 3, dev: list[int] | None = None) -> TaskData:
    names = tuple("abcdef"[:classes])
    return data_in_memory(split_of(labels), split_of(dev or [0, 1, 2], "dev"), labels=names)


def says(error: pytest.ExceptionInfo[Exception], *parts: object) -> None:
    message = str(error.value)
    for part in parts:
        assert str(part) in message, message


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---- task files


def test_a_task_file_is_read_with_its_paths_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    file = tmp_path / "sentiment.yaml"
    file.write_text(
        "train: data/../train.csv\ndev: {dataset: imdb, split: 'train[:10%]', revision: 1.0}\n"
        "test: {dataset: reviews, split: test}\ntext: [premise, hypothesis]\nlabel: label\n"
        "labels: [no, 01, 1.5, ~yes]\nmetric: mcc\nshots: 8\nmax_length: 64\n"
    )
    loaded = Task.load(file)
    assert (loaded.name, loaded.train, loaded.metric) == ("sentiment", str(tmp_path / "train.csv"), "mcc")
    assert loaded.dev == HubSplit(dataset="imdb", split="train[:10%]", revision="1.0")
    assert loaded.test == HubSplit(dataset=str(tmp_path / "reviews"), split="test")
    assert (loaded.input_columns, loaded.shots, loaded.max_length) == (("premise", "hypothesis"), 8, 64)
    assert loaded.labels == ("no", "01", "1.5", "~yes")  # as written: neither False nor an octal number


GOOD = {"train": "a.csv", "text": "text", "label": "label"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metirc": "mcc"}, ["unknown key 'metirc'", "Did you mean 'metric'?", "shots"]),
        ({"train": None}, ["'train' is nothing", "{dataset: NAME, split: SPLIT}"]),
        (
            {"train": {"dataset": "imdb", "spilt": "x"}},
            ["'train.spilt'", "Did you mean 'split'?", "'train.split' is mis"],
        ),
        ({"text": ["a", "b", "c"]}, ["'text'", "a list of two columns"]),
        ({"text": ["a", "a"]}, ["'text' names 'a' twice"]),
        ({"label": "text"}, ["'label' names 'text'", "the column of labels"]),
        ({"metric": "f1"}, ["'metric' is 'f1'", "accuracy, macro_f1, mcc"]),
        ({"shots": "few"}, ["'shots' is 'few'", "a whole number of examples a class, 1 or more"]),
        ({"shots": 0}, ["'shots' is '0'", "1 or more"]),
        ({"max_length": 7}, ["'max_length' is '7'", "8 or more"]),
        ({"labels": ["a", "b", "a"]}, ["'labels' lists 'a' more than once", "once"]),
        ({"labels": ["1", "1.0"]}, ["'labels' lists '1' more than once"]),
        ({"labels": ["a"]}, ["'labels' lists 1 label", "two or more"]),
        ({"labels": "a, b"}, ["'labels' is 'a, b'", "a list of label names"]),
    ],
)
def test_a_wrong_key_is_named_with_its_file_and_remedy(
    tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(json.dumps(GOOD | changes))
    with pytest.raises(DataError) as error:
        Task.load(file)
    says(error, f"{file}: ", *said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: [a\nlabel: b\n", ["line 2", "is not valid YAML", "Correct that line"]),
        ("label: a\ntext: b\nlabel: c\n", ["line 3", "'label' is repeated"]),
        ("[a]: b\n", ["line 1", "is not valid YAML"]),
        ("", ["expected keys and values", "an empty file"]),
        ("- a\n", ["expected keys and values", "a list"]),
        ("text: text\nlabel: label\n", ["the key 'train' is missing", "Give a file (.csv"]),
        ("label: a\nname:\ntext: b\nmetirc: mcc\n", ["'train'", "'name'", "'metirc'"]),  # all at once
    ],
)
def test_a_file_that_is_no_task_says_why(tmp_path: Path, text: str, said: list[str]) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        Task.load(file)
    says(error, file, *said)


def test_a_missing_or_binary_task_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: no such file"):
        Task.load(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"b\.yaml: is not UTF-8"):
        Task.load(tmp_path / "b.yaml")


def test_importing_tasks_loads_nothing_heavy() -> None:
    heavy = "{'numpy', 'pandas', 'pyarrow', 'datasets', 'sklearn', 'torch', 'transformers'}"
    code = f"import sys, regraft.task; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# ---- reading


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_keeps_texts_untouched_and_gives_the_same_data(tmp_path: Path, ending: str) -> None:
    rows = [{"text": text, "label": i % 2, "other": None} for i, text in enumerate(ODD_TEXTS)]
    reference = read_task(
        task(write(tmp_path / "a.jsonl", rows), dev=write(tmp_path / "dev.jsonl", rows_of(4, (0, 1))))
    )
    data = read_task(
        task(write(tmp_path / f"b.{ending}", rows), dev=write(tmp_path / f"dev.{ending}", rows_of(4, (0, 1))))
    )
    assert [texts[0] for texts in data.train.texts] == ODD_TEXTS
    assert data.train.rows.tolist() == list(range(1, len(ODD_TEXTS) + 1))
    assert data.labels == ("0", "1")
    assert data.digest() == reference.digest()


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((10, 9, -1), ("-1", "9", "10")),
        ((2.0, 1.0), ("1", "2")),
        ((True, False), ("false", "true")),
        (("b", "a"), ("a", "b")),
    ],
)
def test_labels_have_the_same_names_and_order_in_every_format(
    tmp_path: Path, ending: str, values: tuple[Any, ...], labels: tuple[str, ...]
) -> None:
    data = read_task(task(write(tmp_path / f"a.{ending}", rows_of(12, values))))
    assert data.labels == labels


def test_a_pair_of_columns_makes_pairs(tmp_path: Path) -> None:
    rows = [{"label": i % 2, "p": f"premise {i}", "h": f"hypothesis {i}"} for i in range(20)]
    data = read_task(task(write(tmp_path / "a.csv", rows), text=("h", "p")))
    first = data.train.rows[0] - 1
    assert data.train.texts[0] == (f"hypothesis {first}", f"premise {first}")


def test_listed_labels_fix_the_order_and_the_source_can_be_a_path(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", rows_of(10))
    data = read_task(
        TextClassification.model_validate(GOOD | {"name": "t", "train": tmp_path / "a.csv", "labels": ["pos", "neg"]})
    )
    assert data.labels == ("pos", "neg")
    assert data.train.labels[0] == {"pos": 0, "neg": 1}[rows_of(10)[int(data.train.rows[0]) - 1]["label"]]


def test_a_folder_of_files_is_read_through_datasets(tmp_path: Path, hub: None) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.parquet", rows_of(20))
    write(tmp_path / "set" / "test.parquet", rows_of(6, stem="other"))
    data = read_task(
        task(
            HubSplit(dataset=str(tmp_path / "set"), split="train"),
            test=HubSplit(dataset=str(tmp_path / "set"), split="test"),
        )
    )
    assert data.test is not None
    assert (len(data.train) + len(data.dev), len(data.test), data.labels) == (20, 6, ("neg", "pos"))
    local = read_task(
        task(write(tmp_path / "a.csv", rows_of(20)), test=write(tmp_path / "b.csv", rows_of(6, stem="other")))
    )
    assert data.digest() == local.digest()


@pytest.mark.parametrize("through", ["hub", "file"])
def test_class_names_of_datasets_are_used_in_their_order(tmp_path: Path, hub: None, through: str) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    (tmp_path / "set").mkdir()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["world", "arts", "unused"])})
    Dataset.from_list(rows_of(20, (0, 1)), features=features).to_parquet(tmp_path / "set" / "train.parquet")
    train: str | HubSplit = HubSplit(dataset=str(tmp_path / "set"), split="train")
    data = read_task(task(train if through == "hub" else str(tmp_path / "set" / "train.parquet")))
    assert data.labels == ("world", "arts", "unused")
    assert data.train.labels.tolist() == [(row - 1) % 2 for row in data.train.rows]
    assert summarise(data)[0].absent == ("unused",)


def test_what_datasets_cannot_load_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as error:
        read_task(task(HubSplit(dataset="glue", config="mnli", split="train")))
    says(error, "glue, config mnli, split train", "Couldn't reach the Hub", "Check its name")
    assert "long story" not in str(error.value)


def test_hidden_labels_of_a_hub_test_split_are_an_error(tmp_path: Path, hub: None) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_list(rows_of(4, (0, 1)), features=features).to_parquet(tmp_path / "train.parquet")
    Dataset.from_list(rows_of(4, (-1,)), features=features).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError) as error:
        read_task(task(str(tmp_path / "train.parquet"), test=str(tmp_path / "test.parquet")))
    says(error, tmp_path / "test.parquet", "row 1", "no label", "-1", "use another split")


def test_dev_is_a_tenth_of_each_class_of_train(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [*rows_of(90, ("a", "a", "b")), {"text": "alone", "label": "c"}])
    data, again, other = read_task(task(path)), read_task(task(path)), read_task(task(path), seed=1)
    assert np.bincount(data.dev.labels).tolist() == [6, 3]  # the only c stays in train
    assert sorted([*data.train.rows, *data.dev.rows]) == list(range(1, 92))
    assert data.digest() == again.digest() != other.digest()


def test_texts_of_test_that_are_in_train_are_counted_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = write(tmp_path / "a.csv", rows_of(10)), write(tmp_path / "b.csv", rows_of(2, stem="new") + rows_of(3))
    dev = write(tmp_path / "d.csv", rows_of(10))
    data = load_data(task(train, dev=dev, test=test), seed=0)
    assert data.duplicates == 3
    assert "3 of 5 examples of test are also in train (row 3 is row 1 of" in caplog.text
    caplog.clear()
    load_data(task(train, dev=dev, test=write(tmp_path / "c.csv", rows_of(10, stem="new"))), seed=0)
    assert not caplog.records


# ---- what cannot be read


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.xlsx", "x", ["files ending in '.xlsx'", ".parquet"]),
        ("imdb", "x", ["files without a suffix", "{dataset: imdb, split: train}"]),
        ("a.csv", "", ["there are no rows"]),
        ("a.csv", "text,label\n", ["there are no rows", "Give a source"]),
        ("a.jsonl", "\n\n", ["there are no rows"]),
        ("a.csv", "txt,label\na,b\n", ["no column 'text'", "Did you mean 'txt'?", "'txt', 'label'"]),
        ("a.csv", "text,label,text\na,b,c\n", ["several columns 'text'", "Rename"]),
        ("a.jsonl", '{"text": "a"}\n{"tag": 1}\n', ["no column 'label'", "'text', 'tag'"]),
        ("a.csv", "text,label\na,b\nc,d,e\n", ["row 2", "names 2 columns, the row has 3", "double quotes"]),
        ("a.csv", "text,label\na,b\nc\n", ["row 2", "names 2 columns, the row has 1"]),
        ("a.csv", 'text,label\na,b\n"c,d\n', ["row 2", "not valid CSV", "Close every double quote"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"text": \n', ["row 3", "not JSON", "one JSON object a line"]),
        ("a.json", "[1, 2]\n", ["row 1", "a JSON int", "one list of objects", "one object a line"]),
        ("a.csv", "text,label\na,x\n  ,y\n", ["row 2", "column 'text' is empty", "remove the row"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"label": 2}\n', ["row 2", "'text' is missing"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": 5, "label": 2}\n', ["row 2", "is of type int (5), not text"]),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n{"text": "", "label": 2}\n', ["row 1", "Unicode", "in 2 rows"]),
        ("a.csv", "text,label\na,x\nb,\n", ["row 2", "no label in column 'label'", "Label the row"]),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', ["row 1", "no label", "nan"]),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', ["row 1", "is a list", "text or as a number"]),
        ("a.csv", "text,label\na,x\nb,x\n", ["every row has the label 'x'", "two labels", "'label'"]),
        ("a.csv", "text,label\na,x\nb,y\n", ["single example of each class", "`dev`"]),
        ("a.parquet", "PAR0", ["not a readable Parquet file"]),
    ],
)
def test_a_source_that_cannot_be_used_is_an_error_with_file_row_and_remedy(
    tmp_path: Path, name: str, content: str, said: list[str]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_task(task(str(path)))
    says(error, path, *said)


def test_a_missing_file_and_bytes_that_are_no_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_task(task(str(tmp_path / "none.csv")))
    says(error, tmp_path / "none.csv", "no such file", "Correct the path")
    (tmp_path / "latin.csv").write_bytes("text,label\na,b\ncaf\u00e9,c\n".encode("latin-1"))
    with pytest.raises(DataError) as error:
        read_task(task(str(tmp_path / "latin.csv")))
    says(error, tmp_path / "latin.csv", "line 3", "not UTF-8", "Save the file as UTF-8")


@pytest.mark.parametrize("listed", [None, ["neg", "pos"]])
def test_an_unseen_label_is_an_error_with_its_row(tmp_path: Path, listed: list[str] | None) -> None:
    train, test = write(tmp_path / "a.csv", rows_of(10)), write(tmp_path / "b.csv", rows_of(5, ("pos", "mixed")))
    with pytest.raises(DataError) as error:
        read_task(task(train, test=test, labels=listed))
    says(error, f"{test}, row 2", "'mixed'", "'neg', 'pos'", "Add it to `labels`" if listed else "List all labels")


# ---- few shots


@given(st.lists(st.integers(0, 2), min_size=12, max_size=40), st.integers(1, 3), st.integers(0, 5))
def test_few_shot_keeps_so_many_a_class_in_whatever_order(labels: list[int], shots: int, seed: int) -> None:
    data = data_of([0, 0, 0, 1, 1, 1, 2, 2, 2, *labels], dev=[0, 0, 0, 0, 1, 1])
    few = data.few_shot(shots, seed)
    assert np.bincount(few.train.labels).tolist() == [shots] * 3
    assert np.bincount(few.dev.labels).tolist() == [shots, min(shots, 2)]
    mixed = np.random.default_rng(seed).permutation(len(data.train))
    shuffled = dataclasses.replace(data, train=data.train.take(mixed))
    assert shuffled.few_shot(shots, seed).digest() == few.digest()
    assert set(few.train.texts) <= set(data.few_shot(3, seed).train.texts)


def test_few_shot_follows_its_seed_and_leaves_test_alone(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.csv", rows_of(60)), write(tmp_path / "b.csv", rows_of(20))
    few, other = (read_task(task(train, test=test, shots=4), seed=seed) for seed in (0, 1))
    assert few.test is not None
    assert (len(few.train), len(few.dev), len(few.test)) == (8, 6, 20)
    assert few.digest() != other.digest()
    assert few.duplicates == sum(texts in few.train.texts for texts in few.test.texts) > 0


def test_few_shot_names_the_classes_that_have_too_few(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", rows_of(40, ("a", "a", "a", "b")))
    with pytest.raises(DataError) as error:
        read_task(task(path, shots=10))
    says(error, path, "10 shots", "once dev is held out", "'b' 9", "lower `shots`")
    assert "'a'" not in str(error.value)
    with pytest.raises(RecipeError, match="at least 1"):
        data_of([0, 1, 2]).few_shot(0, seed=0)


# ---- labels and digests


@given(st.lists(st.integers(0, 3), min_size=1), st.permutations("abcd"))
def test_relabelling_there_and_back_changes_nothing(labels: list[int], order: list[str]) -> None:
    data = data_of(labels, classes=4)
    there = data.relabel(order)
    assert [there.labels[i] for i in there.train.labels] == [data.labels[i] for i in data.train.labels]
    assert there.relabel(data.labels).digest() == data.digest()
    assert (there.digest() == data.digest()) == (order == list("abcd"))


@pytest.mark.parametrize("order", [["a", "b", "x"], ["a", "b"], ["a", "b", "c", "c"]])
def test_relabelling_to_other_labels_lists_both_sides(order: list[str]) -> None:
    with pytest.raises(MismatchError) as error:
        data_of([0, 1, 2]).relabel(order)
    says(error, "train.csv", "'t'", f"Only in the task: {'none' if 'c' in order else repr('c')}", "in `labels`")
    says(error, f"Only in the head: {repr('x') if 'x' in order else 'none'}", f"Expected 3 labels, found {len(order)}")


def test_the_digest_is_of_the_content_alone_and_fixed_for_all_time() -> None:
    data = data_of([0, 1, 2])
    assert data.digest() == "a180bd6cca648023d34fff1bce7c1aea975b63df061405ff7c0b223f2c2fe727"
    elsewhere = dataclasses.replace(data.train, source="b", rows=data.dev.rows)
    moved = dataclasses.replace(data.with_settings(name="other"), train=elsewhere)
    assert moved.digest() == data.digest()
    changes = {"labels": ("a", "b", "x"), "test": data.dev, "dev": data.train}
    changed = [dataclasses.replace(data, **{key: value}).digest() for key, value in changes.items()]  # type: ignore[arg-type]
    changed += [data.with_settings(metric="mcc").digest(), data.with_settings(max_length=64).digest()]
    assert len({data.digest(), *changed}) == 6


def test_majority_and_take() -> None:
    data = data_of([2, 2, 0, 1], dev=[2, 0])
    assert (data.task.chance_prediction(data.train.targets, data.labels), chance_score(data, data.dev)) == (2, 0.5)
    some = data.train.take([3, 0])
    assert (some.texts, some.labels.tolist(), some.rows.tolist()) == ([("train 3",), ("train 0",)], [1, 2], [4, 1])


# ---- scores


@pytest.mark.parametrize(
    ("metric", "labels", "predictions", "expected"),
    [
        ("accuracy", [0, 0, 1, 1, 2], [0, 1, 1, 1, 0], 3 / 5),
        ("macro_f1", [0, 0, 1, 1, 2], [0, 1, 1, 1, 0], (0.5 + 0.8 + 0) / 3),
        ("macro_f1", [0, 0], [0, 3], (2 / 3 + 0) / 2),
        ("mcc", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 1 / 6),
        ("mcc", [0, 1], [1, 1], 0.0),
        ("mcc", [0, 0], [0, 0], 0.0),
        ("accuracy", list(range(40)), list(range(40)), 1.0),  # many classes: no warning
        ("macro_f1", list(range(40)), list(range(40)), 1.0),
        ("mcc", list(range(40)), list(range(40)), 1.0),
    ],
)
def test_scores_are_those_computed_by_hand(
    metric: str, labels: list[int], predictions: list[int], expected: float
) -> None:
    assert score(metric, labels, np.array(predictions)) == pytest.approx(expected)


def test_scores_of_nothing_or_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(MismatchError, match="2 labels, 1 predictions"):
        score("accuracy", [0, 1], [0])
    with pytest.raises(MismatchError, match="1 labels, 1 before, 2 after"):
        flips([0], [0], [0, 1])
    with pytest.raises(DataError, match="no examples to score"):
        score("accuracy", [], [])
    with pytest.raises(RecipeError, match="accuracy, macro_f1, mcc"):
        score("f1", [0], [0])


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3)))
def test_flips_account_for_the_change_in_accuracy(rows: list[tuple[int, int, int]]) -> None:
    labels, before, after = (np.array([row[i] for row in rows], dtype=int) for i in range(3))
    counted, reverse = flips(labels, before, after), flips(labels, after, before)
    assert counted.positive - counted.negative == (after == labels).sum() - (before == labels).sum()
    assert (reverse.positive, reverse.negative) == (counted.negative, counted.positive)
    assert counted.negative_rate + counted.positive_rate <= 1


def test_flips_by_hand() -> None:
    counted = flips([0, 0, 1, 1], [0, 0, 1, 0], [0, 1, 0, 1])
    assert counted == Flips(negative=2, positive=1, total=4)
    assert (counted.negative_rate, counted.positive_rate, Flips(0, 0, 0).negative_rate) == (0.5, 0.25, 0)


# ---- the summary and the command


def test_the_summary_counts_classes_and_words() -> None:
    data = data_of([0, 0, 1])
    texts: list[tuple[str, ...]] = [("one",), ("one two", "three"), (" ".join("w" * 9),)]
    train, dev = summarise(dataclasses.replace(data, train=dataclasses.replace(data.train, inputs=texts)))
    assert (train.name, train.examples, train.counts, train.absent) == ("train", 3, {"a": 2, "b": 1, "c": 0}, ("c",))
    assert (train.median_words, train.max_words) == (3, 9)
    assert train.p95_words == pytest.approx(8.4)
    assert (dev.name, dev.absent) == ("dev", ())


def run_check(file: Path) -> Any:
    import typer
    from typer.testing import CliRunner

    from regraft.cli import task as command

    app = typer.Typer()
    app.add_typer(command.app, name="task")
    return CliRunner().invoke(app, ["task", "check", str(file)], env={"COLUMNS": "120"})


def test_task_check_shows_the_data(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", rows_of(40, ("[red]bad", "ok", "ok", "ok")))
    write(tmp_path / "b.csv", rows_of(4, ("[red]bad", "ok"), stem="new") + rows_of(1, ("ok",)))
    (tmp_path / "my.yaml").write_text("name: '[bold]my'\ntrain: a.csv\ntest: b.csv\ntext: text\nlabel: label\n")
    result = run_check(tmp_path / "my.yaml")
    shown = re.sub(r"[^\S\n]+", " ", result.stdout)
    assert result.exit_code == 0, result.output
    for part in (
        "[bold]my",
        "[red]bad 9 25.0%",
        "ok 27 75.0%",
        "dev 4 3 3 3 0.750",
        "test 5 3 3 3 0.600",
        "max_length 128",
        "dev is held out",
    ):
        assert part in shown, shown
    assert "1 of 5 examples of test are also in train" in shown


def test_task_check_cuts_a_long_list_of_classes(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", rows_of(90, tuple(range(30))))
    (tmp_path / "t.yaml").write_text("train: a.csv\ntext: text\nlabel: label\n")
    assert "and 10 more" in run_check(tmp_path / "t.yaml").stdout


def test_task_check_leaves_errors_to_the_main_command(tmp_path: Path) -> None:
    assert isinstance(run_check(tmp_path / "none.yaml").exception, DataError)
