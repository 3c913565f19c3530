"""Killed in the middle, run again: the result is that of a run that nobody killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import sentence
from safetensors.torch import load_file

from regraft.tuning import trainer

SOURCE = Path(__file__).parents[1] / "src"
COMMON = ["--batch-size", "8", "--learning-rate", "3e-3", "--precision", "fp32", "--eval-every", "20"]
MANY = [*COMMON, "--save-every", "20", "--steps", "400"]


def command(*arguments):
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return {
        "args": [sys.executable, "-m", "regraft", *map(str, arguments)],
        "env": {**os.environ, "PYTHONPATH": path},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def run(*arguments):
    done = subprocess.run(**command(*arguments), timeout=300)
    assert done.returncode == 0, done.stdout


def run_and_kill(out, *arguments, stage="", after=2):
    """Kill a run once so many checkpoints of a stage have been written; tell what is left of it."""
    process = subprocess.Popen(**command(*arguments))
    seen, work = set(), out.parent / f".{out.name}.partial"
    deadline = time.monotonic() + 240
    try:
        while len(seen) < after:
            assert process.poll() is None, f"ended before it was killed: {process.communicate()[0]}"
            assert time.monotonic() < deadline
            seen |= {file.parent.name for file in (work / stage).glob("checkpoints/checkpoint-*/trainer_state.json")}
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not out.exists()
    assert work.is_dir()
    return work


def same_weights(one, other):
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    return all(first[name].equal(second[name]) for name in first)


def without_seconds(curve):
    return [{name: value for name, value in point.items() if name != "seconds"} for point in curve]


def outcome_curve(out):
    return without_seconds([json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()])


def last_checkpoint(work):
    return max((work / "checkpoints").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))


def check_outcomes(killed, whole, file):
    assert same_weights(killed / "adaptation" / file, whole / "adaptation" / file)
    assert outcome_curve(killed) == outcome_curve(whole)
    assert len(outcome_curve(killed)) == 21
    assert (killed / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    assert not list(killed.parent.glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [False, True], ids=["whole", "last checkpoint cut short"])
def test_tune(tmp_path, bases, task_file, damage):
    given = ["tune", bases["bert"][0], "--task", task_file, *MANY]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    work = run_and_kill(killed, *given, "--out", killed)
    last = last_checkpoint(work)
    assert int(last.name.split("-")[1]) < 400
    if damage:  # a machine that lost its power leaves such files
        (last / "trainer_state.json").write_text('{"best_global_step": null, "best_me')
    run(*given, "--out", killed)
    run(*given, "--out", whole)
    check_outcomes(killed, whole, "model.safetensors")


@pytest.mark.slow
def test_recycle_with_a_teacher(tmp_path, bases, tuned, task_file):
    old, new = bases["llama"]
    given = ["recycle", "--old-base", old, "--new-base", new, "--adaptation", tuned["llama", "lora"]]
    given += ["--task", task_file, "--method", "init+distill", *MANY]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    work = run_and_kill(killed, *given, "--out", killed)
    assert (work / "teacher.safetensors").is_file()
    run(*given, "--out", killed)
    run(*given, "--out", whole)
    check_outcomes(killed, whole, "adapter_model.safetensors")


@pytest.mark.slow
def test_pretrain_killed_in_both_stages(tmp_path):
    import torch
    from conftest import make_config, make_tokenizer
    from transformers import BertModel

    torch.manual_seed(0)
    base, text = tmp_path / "base", tmp_path / "text.txt"
    BertModel(make_config("bert")).save_pretrained(base)  # without a head, so that there are two stages
    make_tokenizer("bert").save_pretrained(base)
    chance = random.Random(0)
    text.write_text("\n".join(sentence(chance, i % 2 == 0) for i in range(500)), encoding="utf-8")
    given = ["pretrain", base, text, "--block", "32", *COMMON, "--save-every", "5", "--steps", "300"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_and_kill(killed, *given, "--out", killed, stage="head", after=1)
    run_and_kill(killed, *given, "--out", killed, stage="body")
    run(*given, "--out", killed)
    run(*given, "--out", whole)
    assert same_weights(killed / "model.safetensors", whole / "model.safetensors")
    one, other = (json.loads((out / "pretraining.json").read_text()) for out in (killed, whole))
    assert without_seconds(one.pop("curve")) == without_seconds(other.pop("curve"))
    assert one == other
    assert not list(tmp_path.glob(".*.partial"))


def test_half_written_checkpoints_are_cleared_away(tmp_path):
    for step in (20, 40, 60, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (20, 40, 100):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text('{"global_st')
    assert trainer._last_whole(tmp_path) == tmp_path / "checkpoint-40"
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-40"]
    shutil.rmtree(tmp_path / "checkpoint-20")
    shutil.rmtree(tmp_path / "checkpoint-40")
    assert trainer._last_whole(tmp_path) is None
