"""Tasks of data files and folders without a task file, and what `task check` shows of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers import ONE_STEP, assert_mentions, make_tokenizer, run_command, write_base, write_sentences

import regraft
from regraft import Task
from regraft.errors import DataError
from regraft.task import read_task

CHAT = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
TEMPLATE = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}<s>"


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_answers(answers: list[Any]) -> list[dict[str, Any]]:
    """Return a row per answer, each with another prompt."""
    return [{"prompt": f"q{index}", "completion": answer} for index, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT, "id": 3}, {"type": "text-generation", "messages": "messages"}),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"type": "text-generation", "messages": "conversations"},
        ),
        ({"prompt": "a", "completion": "b"}, {"prompt": "prompt", "completion": "completion"}),
        ({"prompt": "a"}, {"type": "text-generation", "prompt": "prompt"}),
        (
            {"instruction": "a", "input": "", "output": "b", "text": "a b"},
            {"type": "text-generation", "instruction": "instruction", "input": "input", "output": "output"},
        ),
        ({"text": "a b c", "url": "x"}, {"type": "text-generation", "text": "text", "metric": "loss"}),
        ({"text": "a", "label": "x"}, {"type": "text-classification", "text": "text", "label": "label"}),
        ({"text": "a", "label": 1}, {"type": "text-classification", "metric": "accuracy"}),
        ({"tokens": ["a"], "ner_tags": ["O"]}, {"type": "token-classification", "words": "tokens", "tags": "ner_tags"}),
        ({"words": ["a"], "tags": ["O"]}, {"type": "token-classification", "words": "words", "tags": "tags"}),
    ],
)
def test_types_follow_from_columns(tmp_path: Path, row: dict[str, Any], expected: dict[str, str]) -> None:
    file = write_rows(tmp_path / "data.jsonl", [row, row])
    task = Task.load(file)
    values = task.model_dump()
    assert {key: values[key] for key in expected} == expected
    assert (task.name, task.train, task.dev, task.hold_out_test) == ("data", str(file), None, True)
    (tmp_path / "task.yaml").write_text(task.as_yaml())
    assert Task.load(tmp_path / "task.yaml") == task


@pytest.mark.parametrize(
    ("row", "phrases"),
    [
        ({"text": "a", "label": 0.5}, ["'label'", "decimals", "text-regression", "`tolerance`"]),
        ({"text": "a", "label": "0.5"}, ["'label'", "decimals", "text-regression"]),
        ({"text": "a", "label": ["x"]}, ["'label'", "multi-label-classification"]),
        ({"text": "a", "sentiment": "x"}, ["'text', 'sentiment'", "not those of a task type", "task file"]),
        ({"question": "a", "answer": "x"}, ["'question', 'answer'", "not those of a task type"]),
        ({"prompt": "a", "chosen": "x", "rejected": "y"}, ["'prompt', 'chosen', 'rejected'"]),
        ({"instruction": "a", "context": "", "response": "y"}, ["'instruction', 'context', 'response'"]),
        ({"messages": CHAT, "prompt": "a", "completion": "b"}, ["'messages', 'prompt', 'completion'"]),
        (
            {"messages": CHAT, "text": "a", "label": "b"},
            ["could be of the types text-classification and text-generation"],
        ),
        ({"messages": "no"}, ["data.jsonl, row 1"]),
    ],
)
def test_other_columns_need_a_task_file(tmp_path: Path, row: dict[str, Any], phrases: list[str]) -> None:
    with pytest.raises(DataError) as error:
        Task.load(write_rows(tmp_path / "data.jsonl", [row, row]))
    assert_mentions(error, "data.jsonl", *phrases)


@pytest.mark.parametrize(
    ("answers", "metric"),
    [
        (["yes", "no"] * 20, "exact_match"),
        (["yes", "no", "neither of the two"] * 5, "exact_match"),
        ([f"name {index}" for index in range(40)], "rouge_l"),
        (["a sentence of more than five words", "no"] * 20, "rouge_l"),
        ([json.dumps({"a": index}) for index in range(9)], "json_match"),
        (["[1]", "{}"] * 9, "json_match"),
        (["1", "2"] * 9, "exact_match"),
        ([None] * 9, "rouge_l"),
    ],
)
def test_the_metric_follows_from_the_answers(tmp_path: Path, answers: list[Any], metric: str) -> None:
    rows = make_answers(answers) if answers[0] else [{"prompt": "a"}] * len(answers)
    task = Task.load(write_rows(tmp_path / "data.jsonl", rows))
    assert task.metric == metric
    assert f"metric: {metric}\n" in task.as_yaml()
    assert task.max_new_tokens == (32 if metric == "exact_match" else 256)


def test_dev_is_held_out_by_the_seed_and_test_in_the_same_way_for_all(tmp_path: Path) -> None:
    rows = make_answers(["yes", "no"] * 50)
    task = Task.load(write_rows(tmp_path / "data.jsonl", rows))
    data = read_task(task, 0)
    splits = (data.train, data.dev, data.test)
    assert [split.name for split in splits] == ["train", "dev", "test"]
    assert [len(split) for split in splits] == [82, 8, 10]
    assert sorted(row for split in splits for row in split.row_numbers.tolist()) == list(range(1, 101))
    assert sorted(data.test.targets.tolist()) == ["no"] * 5 + ["yes"] * 5
    assert data.test.row_numbers.tolist() == read_task(task, 0).test.row_numbers.tolist()
    assert data.test.row_numbers.tolist() == read_task(task, 1).test.row_numbers.tolist()
    assert data.dev.row_numbers.tolist() != read_task(task, 1).dev.row_numbers.tolist()


@pytest.mark.parametrize("dev_name", ["dev", "validation"])
def test_folders_of_splits(tmp_path: Path, dev_name: str) -> None:
    folder = tmp_path / "reviews"
    rows = [{"text": f"t{index}", "label": "ab"[index % 2]} for index in range(20)]
    write_rows(folder / "train.jsonl", rows)
    (folder / f"{dev_name}.json.gz").write_bytes(gzip.compress(json.dumps(rows[:4]).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[4:8]), folder / "test.parquet")
    (folder / "README.md").write_text("notes")
    task = Task.load(folder)
    assert (task.name, task.hold_out_test) == ("reviews", False)
    data = read_task(task)
    assert [len(split) for split in (data.train, data.dev, data.test)] == [20, 4, 4]
    (folder / "test.parquet").unlink()
    assert [len(split) for split in (read_task(Task.load(folder)).train, read_task(Task.load(folder)).test)] == [18, 2]


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    rows = [{"text": f"t{index}", "label": "ab"[index % 2]} for index in range(20)]
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": split, "validation": split.select(range(4))}).save_to_disk(str(tmp_path / "d"))
    data = read_task(Task.load(tmp_path / "d"))
    assert [len(split) for split in (data.train, data.dev, data.test)] == [18, 4, 2]
    split.save_to_disk(str(tmp_path / "s"))
    data = read_task(Task.load(tmp_path / "s"))
    assert [len(split) for split in (data.train, data.dev, data.test)] == [16, 2, 2]


def test_conll_is_read_by_its_outer_columns(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("Ann NNP B-PER\nran VBD O\n\n" * 4)
    task = Task.load(tmp_path / "a.conll")
    assert (task.type, task.words, task.tags) == ("token-classification", "0", "-1")
    assert read_task(task).train.inputs[0] == ("Ann", "ran")


def test_folders_without_training_data(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        Task.load(tmp_path)
    assert_mentions(error, str(tmp_path), "train.jsonl")
    write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError) as error:
        Task.load(tmp_path)
    assert_mentions(error, "'chats'", "Name one of them train")
    for name in ("train.jsonl", "dev.jsonl", "validation.jsonl"):
        write_rows(tmp_path / name, [{"messages": CHAT}])
    with pytest.raises(DataError) as error:
        Task.load(tmp_path)
    assert_mentions(error, "several sources for dev", "dev.jsonl", "validation.jsonl")
    with pytest.raises(DataError) as error:
        Task.load(tmp_path / "missing.csv")
    assert_mentions(error, "missing.csv", "no such file")


def test_the_task_file_that_says_the_same_is_logged(tmp_path: Path, caplog) -> None:
    write_sentences(tmp_path / "reviews.csv", 60, 0)
    base = write_base(tmp_path / "base")
    file = tmp_path / "reviews.csv"
    output = run_command("task", "check", file)
    for phrase in ("test is held out of train", "guessing"):
        assert phrase in output, output
    outcome = regraft.tune(base, file, tmp_path / "again", recipe=ONE_STEP)
    assert f"{file} is read as by this task file:\ntype: text-classification\n" in caplog.text
    assert "hold_out_test: true" in caplog.text
    assert outcome.record.scores.test is not None


def test_task_check_shows_what_is_learnt(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    long = [{"role": "user", "content": "the film " * 20}, CHAT[1]]
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 30 + [{"messages": long}] * 4)
    output = run_command("task", "check", file)
    assert "guessing exact_match: the new base without the adaptation" in " ".join(output.split())
    (tmp_path / "t.yaml").write_text(f"type: text-generation\ntrain: {file}\ndev: {file}\nmax_length: 20\n")
    output = run_command("task", "check", tmp_path / "t.yaml", "--base", base)
    lines = [" ".join(line.split()) for line in output.splitlines()]
    for line in ("tokens: largest number 48", "examples truncated to 20 tokens 4", "examples without labels 4"):
        assert line in lines, output
    assert "](learnt)" in output
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "the film"}] * 30)
    output = run_command("task", "check", tmp_path / "prompts.jsonl", "--base", base)
    assert "labels: no token: there is no answer" in " ".join(output.split())
    assert "(learnt)" in run_command("task", "check", file, "--base", base)
    (tmp_path / "turns.jinja").write_text("{% for m in messages %}{{ m.content }} </s>{% endfor %}")
    (tmp_path / "t.yaml").write_text(f"type: text-generation\ntrain: {file}\ntemplate: turns.jinja\n")
    assert "the film </s>[good </s>](learnt)" in " ".join(
        run_command("task", "check", tmp_path / "t.yaml", "--base", base).split()
    )
