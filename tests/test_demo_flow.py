"""The flow of the demo of generation, on a tiny stand-in for its model and its texts."""

from __future__ import annotations

import dataclasses
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import fetch_or_skip, make_sentence, make_tokenizer, write_base

from regraft import Base, Recipe
from regraft.cli import main
from regraft.demo import run
from regraft.demo.answers import MAX_EXAMPLES, collect_answers
from regraft.demo.catalogue import MEDLINE, SMOLLM2
from regraft.demo.generation import GENERATION_TASKS
from regraft.demo.split import Row
from regraft.demo.tasks import TaskSource
from regraft.errors import RecipeError

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {{ eos_token }} {% endfor %}"
METHODS = ("scratch", "direct", "init")


def read_moods(_wheel: Path) -> Iterator[Row]:
    rng = random.Random(0)
    for index in range(200):
        is_positive = index % 2 == 0
        text = make_sentence(rng, is_positive)
        yield Row(text, "good" if is_positive else "bad", text, stratum="mood")


def converse(row: Row) -> dict:
    return {"messages": [{"role": "user", "content": row.text}, {"role": "assistant", "content": row.label}]}


def prepare_base(folder: Path) -> Path:
    if not folder.exists():
        write_base(folder, "llama", max_position_embeddings=128)
        tokenizer = make_tokenizer("llama")
        tokenizer.model_max_length = 128
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """A demo of generation that takes seconds, in place of the real one."""
    source = TaskSource(
        "bio",
        MEDLINE,
        {"type": "text-generation", "metric": "exact_match", "max_new_tokens": 4},
        read_moods,
        test_share=0.3,
        max_length=64,
        columns=converse,
        suffix=".jsonl",
    )
    recipe = Recipe(steps=4, batch_size=4, learning_rate=5e-3, eval_every=2, precision="fp32")
    size = dataclasses.replace(
        run.GENERATION,
        tasks=("mood",),
        pretraining=recipe,
        tuning=recipe,
        examples=(60, 10, 20),
        sources={"mood": source},
        prepare_base=prepare_base,
    )

    def write_corpus(_domain, file, _characters, exclude):
        assert [path.name for path in exclude] == ["dev.jsonl", "test.jsonl"]
        texts = [row.text for row in read_moods(Path())]
        file.write_text("".join(f'{{"text": "{text} {text}"}}\n' for text in texts))

    monkeypatch.setattr(run, "GENERATION", size)
    monkeypatch.setattr(run, "write_corpus", write_corpus)
    monkeypatch.setattr("regraft.demo.tasks.fetch", lambda _package: Path())
    monkeypatch.chdir(tmp_path)
    return size


def test_the_demo_shows_answers_side_by_side_and_names_the_report_and_the_next_command(tiny_demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["regraft", "demo", "--generation"])
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code in (0, None)
    printed = capsys.readouterr().out
    out = Path("runs/demo-generation")
    assert "old weights, new base" in printed
    assert re.search(r"Answers to 8 of 20 test prompts", printed)
    assert re.search(r"text +reference +old +scratch +direct +init", printed)
    assert f"report: {out / 'report.html'}" in printed
    assert "<html" in (out / "report.html").read_text()
    *_, command = printed.splitlines()
    path = out / "mood/recycled/init-seed20/adaptation"
    assert command == f"next: regraft adaptation servable {path} --base {out / 'new-base'}"
    assert path.is_dir()

    outcomes = {"old": out / "mood/old", **{name: out / f"mood/recycled/{name}-seed20" for name in METHODS}}
    answers = collect_answers(out / "mood/data/task.yaml", outcomes)
    assert answers.models == ("old", *METHODS)
    assert answers.examples == 20
    assert len(answers.rows) == MAX_EXAMPLES
    differ = [len(set(row[2:])) > 1 for row in answers.rows]
    assert differ == sorted(differ, reverse=True)
    texts = {row.text: row.label for row in read_moods(Path())}
    assert all(texts[text] == reference for text, reference, *_ in answers.rows)


def test_a_task_of_the_other_demo_is_refused(tiny_demo):
    with pytest.raises(RecipeError, match="Choose one of mood"):
        run.GENERATION.with_task("section-role")


@pytest.mark.slow
def test_the_real_model_and_task_of_the_demo_load(tmp_path):
    fetch_or_skip(SMOLLM2)
    fetch_or_skip(MEDLINE)
    size = run.GENERATION
    assert Base.open(size.prepare_base(tmp_path / "base")).is_decoder
    assert set(size.tasks) <= set(GENERATION_TASKS)
