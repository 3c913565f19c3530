"""Task files, hostile YAML, the summary of a task, and the command `task check`."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from helpers import TASK_KEYS, assert_mentions, make_data, make_rows, write_table

from regraft.errors import DataError
from regraft.task import HubSplit, Task, summarise

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

REQUIRED_KEYS = "".join(f"{key}: {value}\n" for key, value in TASK_KEYS.items())


def test_a_task_file_is_read_with_its_paths_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    file = tmp_path / "sentiment.yaml"
    file.write_text(
        "train: data/../train.csv\ndev: {dataset: imdb, split: 'train[:10%]', revision: 1.0}\n"
        "test: {dataset: reviews, split: test}\ntext: [premise, hypothesis]\nlabel: label\n"
        "labels: [no, 01, 1.5, ~yes]\nmetric: mcc\nshots: 8\nmax_length: 64\n"
    )
    task = Task.load(file)
    assert (task.name, task.train, task.metric) == ("sentiment", str(tmp_path / "train.csv"), "mcc")
    assert task.dev == HubSplit(dataset="imdb", split="train[:10%]", revision="1.0")
    assert task.test == HubSplit(dataset=str(tmp_path / "reviews"), split="test")
    assert (task.input_columns, task.shots, task.max_length) == (("premise", "hypothesis"), 8, 64)
    assert task.labels == ("no", "01", "1.5", "~yes")  # YAML 1.1 would read False and an octal number


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        ({"metirc": "mcc"}, ["unknown key 'metirc'", "Did you mean 'metric'?", "shots"]),
        ({"train": None}, ["'train' is nothing", "{dataset: NAME, split: SPLIT}"]),
        (
            {"train": {"dataset": "imdb", "spilt": "x"}},
            ["'train.spilt'", "Did you mean 'split'?", "'train.split' is mis"],
        ),
        ({"text": ["a", "b", "c"]}, ["'text'", "a list of two columns"]),
        ({"text": ["a", "a"]}, ["'text' names 'a' twice"]),
        ({"label": "text"}, ["'label' names 'text'", "the column to predict"]),
        ({"metric": "f1"}, ["'metric' is 'f1'", "accuracy, macro_f1, mcc"]),
        ({"shots": "few"}, ["'shots' is 'few'", "a whole number of examples per class, 1 or more"]),
        ({"shots": 0}, ["'shots' is '0'", "1 or more"]),
        ({"max_length": 7}, ["'max_length' is '7'", "8 or more"]),
        ({"labels": ["a", "b", "a"]}, ["'labels' lists 'a' more than once", "once"]),
        ({"labels": ["1", "1.0"]}, ["'labels' lists '1' more than once"]),
        ({"labels": ["a"]}, ["'labels' lists 1 label", "two or more"]),
        ({"labels": "a, b"}, ["'labels' is 'a, b'", "a list of label names"]),
    ],
)
def test_an_invalid_key_is_named_with_its_file_and_remedy(
    tmp_path: Path, changes: dict[str, Any], phrases: list[str]
) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(json.dumps(TASK_KEYS | changes))
    with pytest.raises(DataError) as error:
        Task.load(file)
    assert_mentions(error, f"{file}: ", *phrases)


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("train: [a\nlabel: b\n", ["line 2", "is not valid YAML", "Correct that line"]),
        ("label: a\ntext: b\nlabel: c\n", ["line 3", "'label' is repeated"]),
        ("[a]: b\n", ["line 1", "is not valid YAML"]),
        ("", ["expected keys and values", "an empty file"]),
        ("- a\n", ["expected keys and values", "a list"]),
        ("text: text\nlabel: label\n", ["the key 'train' is missing", "Set it to a file (.csv"]),
        ("label: a\nname:\ntext: b\nmetirc: mcc\n", ["'train'", "'name'", "'metirc'"]),  # all at once
    ],
)
def test_a_file_that_is_not_a_task_is_refused_with_the_reason(tmp_path: Path, text: str, phrases: list[str]) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        Task.load(file)
    assert_mentions(error, file, *phrases)


def test_a_missing_or_binary_task_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: no such file"):
        Task.load(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"b\.yaml: is not UTF-8"):
        Task.load(tmp_path / "b.yaml")


def test_importing_tasks_loads_no_heavy_library() -> None:
    heavy_libraries = "{'numpy', 'pandas', 'pyarrow', 'datasets', 'sklearn', 'torch', 'transformers'}"
    code = f"import sys, regraft.task; assert not {heavy_libraries} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# ---- hostile YAML


def repeat_alias(name: str) -> str:
    """Return a YAML list that names an alias ten times."""
    return f"[{', '.join([f'*{name}'] * 10)}]"


# each level lists the level before it ten times, so the last would expand to 10^8 values or more
NESTED_ALIASES = "a0: &a0 [x, y]\n"
NESTED_ALIASES += "".join(f"a{i}: &a{i} {repeat_alias(f'a{i - 1}')}\n" for i in range(1, 10))
NESTED_ALIASES += "labels: *a9\n"
NESTED_MERGES = "m0: &m0 {k: v}\n"
NESTED_MERGES += "".join(f"m{i}: &m{i}\n  <<: {repeat_alias(f'm{i - 1}')}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NESTED_ALIASES, "after aliases are expanded"),
        (NESTED_MERGES, "after aliases are expanded"),
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
)
def test_yaml_made_to_exhaust_its_parser_is_refused_quickly(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(REQUIRED_KEYS + text)
    started = time.monotonic()
    with pytest.raises(DataError) as error:
        Task.load(tmp_path / "t.yaml")
    assert message in str(error.value)
    assert len(str(error.value)) < 10_000
    assert time.monotonic() - started < 10


def test_aliases_and_merges_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("text: text\nlabel: &l label\n<<: {train: a.csv}\nlabels: [*l, other]\n")
    assert Task.load(tmp_path / "t.yaml").labels == ("label", "other")


# ---- the summary and the command


def test_the_summary_counts_classes_and_words() -> None:
    data = make_data([0, 0, 1])
    texts: list[tuple[str, ...]] = [("one",), ("one two", "three"), (" ".join("w" * 9),)]
    train_split = dataclasses.replace(data.train, inputs=texts)
    train, dev = summarise(dataclasses.replace(data, train=train_split))
    assert (train.name, train.examples, train.counts, train.absent) == ("train", 3, {"a": 2, "b": 1, "c": 0}, ("c",))
    assert (train.median_words, train.max_words) == (3, 9)
    assert train.p95_words == pytest.approx(8.4)
    assert (dev.name, dev.absent) == ("dev", ())


def run_task_check(file: Path) -> Result:
    """Run `regraft task check` in this process, in a terminal 120 columns wide."""
    from typer.testing import CliRunner

    from regraft.cli import app

    return CliRunner().invoke(app, ["task", "check", str(file)], env={"COLUMNS": "120"})


def test_task_check_shows_the_data(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", make_rows(40, ("[red]bad", "ok", "ok", "ok")))
    write_table(tmp_path / "b.csv", make_rows(4, ("[red]bad", "ok"), stem="new") + make_rows(1, ("ok",)))
    (tmp_path / "my.yaml").write_text("name: '[bold]my'\ntrain: a.csv\ntest: b.csv\ntext: text\nlabel: label\n")
    result = run_task_check(tmp_path / "my.yaml")
    output = re.sub(r"[^\S\n]+", " ", result.stdout)
    assert result.exit_code == 0, result.output
    heading, train = (next(line for line in result.stdout.splitlines() if word in line) for word in ("share", " 36 "))
    assert heading.index("examples") + len("examples") == train.index("36") + len("36")  # aligned to the right
    for phrase in (
        "[bold]my",
        "[red]bad 9 25.0%",
        "ok 27 75.0%",
        "dev 4 3 3 3 0.750",
        "test 5 3 3 3 0.600",
        "max_length 128",
        "dev is held out",
        "1 of 5 test examples are also in train",
    ):
        assert phrase in output, output


def test_task_check_shortens_a_long_list_of_classes(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", make_rows(90, tuple(range(30))))
    (tmp_path / "t.yaml").write_text("train: a.csv\ntext: text\nlabel: label\n")
    assert "and 10 more" in run_task_check(tmp_path / "t.yaml").stdout


def test_task_check_leaves_errors_to_the_main_command(tmp_path: Path) -> None:
    assert isinstance(run_task_check(tmp_path / "none.yaml").exception, DataError)


def test_control_characters_of_labels_do_not_reach_the_terminal(tmp_path: Path) -> None:
    rows = make_rows(40, ("\x1b[31mred\nrow", "\u202eok"))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "t.yaml").write_text('name: "a\\eb"\n' + REQUIRED_KEYS.replace("a.csv", "a.json"))
    output = run_task_check(tmp_path / "t.yaml").stdout
    assert "\\x1b[31mred\\nrow" in output and "\\u202eok" in output and "a\\x1bb" in output
    assert "\x1b[31m" not in output and "\u202e" not in output
