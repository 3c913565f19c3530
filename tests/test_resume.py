"""Resumption: an interrupted run that is repeated has the result of an uninterrupted run."""

import contextlib
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
from helpers import (
    InterruptedRunError,
    have_equal_tensors,
    interrupt_at,
    make_sentence,
    read_curve,
    read_weights,
    run_command,
)

from regraft import Corpus, Distillation, Recipe, Upgrade, recycle, tune
from regraft.adaptation import find_outcome, fresh_model
from regraft.errors import OutcomeError
from regraft.model import Deployment
from regraft.model.corpus import pack
from regraft.progress import silent
from regraft.task import load_data
from regraft.tuning.distill import compute_teacher_outputs

SOURCE = Path(__file__).parents[1] / "src"
COMMON = ["--batch-size", "8", "--learning-rate", "3e-3", "--precision", "fp32", "--eval-every", "20"]
MANY_STEPS = [*COMMON, "--save-every", "20", "--steps", "240"]


def popen_arguments(*arguments):
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return {
        "args": [sys.executable, "-m", "regraft", *map(str, arguments)],
        "env": {**os.environ, "PYTHONPATH": path},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def run_and_kill(out, *arguments, stage="", checkpoints=2):
    """Run a command, kill it after a number of checkpoints of a stage, and return its working folder."""
    process = subprocess.Popen(**popen_arguments(*arguments))
    written = set()
    work = out.parent / f".{out.name}.partial"
    deadline = time.monotonic() + 240
    try:
        while len(written) < checkpoints:
            assert process.poll() is None, f"the run ended before it was killed: {process.communicate()[0]}"
            assert time.monotonic() < deadline
            written |= {file.parent.name for file in (work / stage).glob("checkpoints/checkpoint-*/trainer_state.json")}
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not out.exists()
    assert work.is_dir()
    return work


def without_seconds(curve):
    return [{name: value for name, value in point.items() if name != "seconds"} for point in curve]


def read_timeless_curve(out):
    return without_seconds(read_curve(out))


@pytest.fixture
def reported_steps(monkeypatch):
    """Record the steps that commands report, by stage."""
    steps = {}

    @contextlib.contextmanager
    def record_steps():
        yield lambda stage, step, total, figures: steps.setdefault(stage, []).append(step)

    monkeypatch.setattr("regraft.cli.terminal.show_progress", record_steps)
    return steps


def assert_resumed(steps, interval):
    """Check that training resumed at the step after a checkpoint."""
    assert steps[0] > 1
    assert steps[0] % interval == 1


def check_outcomes(killed, uninterrupted):
    assert have_equal_tensors(read_weights(killed / "adaptation"), read_weights(uninterrupted / "adaptation"))
    assert read_timeless_curve(killed) == read_timeless_curve(uninterrupted)
    assert len(read_timeless_curve(killed)) == 13
    assert (killed / "predictions.jsonl").read_text() == (uninterrupted / "predictions.jsonl").read_text()
    assert not list(killed.parent.glob(".*.partial"))


@pytest.mark.slow
def test_tune_resumes_after_a_kill(tmp_path, bases, task_file, reported_steps):
    arguments = ["tune", bases["bert"][0], "--task", task_file, *MANY_STEPS]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    run_and_kill(killed, *arguments, "--out", killed)
    run_command(*arguments, "--out", killed)
    assert_resumed(reported_steps["tune"], 20)
    run_command(*arguments, "--out", uninterrupted)
    check_outcomes(killed, uninterrupted)


@pytest.mark.slow
def test_recycle_with_a_teacher_resumes_after_a_kill(tmp_path, bases, tuned_outcomes, task_file, reported_steps):
    old, new = bases["llama"]
    arguments = ["recycle", "--old-base", old, "--new-base", new, "--adaptation", tuned_outcomes["llama", "lora"]]
    arguments += ["--task", task_file, "--method", "init+distill", *MANY_STEPS]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    work = run_and_kill(killed, *arguments, "--out", killed)
    assert (work / "teacher.safetensors").is_file()
    run_command(*arguments, "--out", killed)
    assert_resumed(reported_steps["tune"], 20)
    run_command(*arguments, "--out", uninterrupted)
    check_outcomes(killed, uninterrupted)


@pytest.mark.slow
def test_pretrain_resumes_after_a_kill_in_each_stage(tmp_path, reported_steps):
    import torch
    from helpers import make_config, make_tokenizer
    from transformers import BertModel

    torch.manual_seed(0)
    base, text = tmp_path / "base", tmp_path / "text.txt"
    BertModel(make_config("bert")).save_pretrained(base)  # without a head, so that there are two stages
    make_tokenizer("bert").save_pretrained(base)
    rng = random.Random(0)
    text.write_text("\n".join(make_sentence(rng, i % 2 == 0) for i in range(500)), encoding="utf-8")
    arguments = ["pretrain", base, text, "--block", "32", *COMMON, "--save-every", "5", "--steps", "200"]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    run_and_kill(killed, *arguments, "--out", killed, stage="head", checkpoints=1)
    run_and_kill(killed, *arguments, "--out", killed, stage="body")
    run_command(*arguments, "--out", killed)
    assert "pretrain head" not in reported_steps
    assert_resumed(reported_steps["pretrain"], 5)
    run_command(*arguments, "--out", uninterrupted)
    assert have_equal_tensors(read_weights(killed), read_weights(uninterrupted))
    record, expected = (json.loads((out / "pretraining.json").read_text()) for out in (killed, uninterrupted))
    assert without_seconds(record.pop("curve")) == without_seconds(expected.pop("curve"))
    assert record == expected
    assert not list(tmp_path.glob(".*.partial"))


def truncate(file):
    file.write_bytes(b"")


def fill_with_zeros(file):
    """Damage a file as a power loss damages one that was not synced: the size stays, the content is zeros."""
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.slow
def test_damaged_files_are_discarded_and_undamaged_files_are_used(tmp_path, bases, task_file):
    def run(out, progress=silent):
        recipe = Recipe(steps=12, eval_every=2, save_every=4, learning_rate=3e-3, precision="fp32", batch_size=8)
        return tune(bases["bert"][0], task_file, out, recipe=recipe, progress=progress)

    uninterrupted = run(tmp_path / "uninterrupted")
    out = tmp_path / "out"
    copy = tmp_path / "copy"
    with pytest.raises(InterruptedRunError):
        run(out, interrupt_at("tune", 10))
    work = tmp_path / ".out.partial"
    shutil.copytree(work, copy)
    assert [entry.name for entry in (work / "checkpoints").iterdir()] == ["checkpoint-8"]
    checkpoint = Path("checkpoints", "checkpoint-8")
    best = next((work / "best").glob("step-*")).relative_to(work)
    cases = [
        (truncate, checkpoint / "optimizer.pt", 0),
        (Path.unlink, checkpoint / "optimizer.pt", 0),
        (truncate, checkpoint / "rng_state.pth", 0),
        (fill_with_zeros, checkpoint / "model.safetensors", 0),
        (fill_with_zeros, checkpoint / "trainer_state.json", 0),
        (truncate, checkpoint / "config.json", 0),
        (fill_with_zeros, best, 0),
        (Path.touch, Path("checkpoints", "checkpoint-999"), 8),
        (truncate, Path("inputs.json"), 0),
    ]
    for damage, file, completed_steps in cases:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(copy, work)
        shutil.rmtree(out, ignore_errors=True)
        damage(work / file)
        steps = []
        run(out, lambda stage, step, *_, steps=steps: steps.append(step) if stage == "tune" else None)
        assert steps[0] == completed_steps + 1, file
        weights, expected = (read_weights(folder / "adaptation") for folder in (out, uninterrupted.path))
        assert have_equal_tensors(weights, expected), file
        assert read_timeless_curve(out) == read_timeless_curve(uninterrupted.path)
    assert not work.exists()


def test_damaged_caches_are_recomputed(tmp_path, opened_bases, task_file):
    base = opened_bases["bert"][0]
    data = load_data(task_file, 20)
    text = tmp_path / "text.txt"
    text.write_text("good film\n" * 50, encoding="utf-8")

    def tokenise():
        return pack(Corpus((str(text),)), base, 8, tmp_path / "tokens.bin", silent).tolist()

    def compute_logits():
        teacher = Deployment(fresh_model(base, data.head, 1), base, data, "fp32")
        order = range(len(data.dev))
        options = Distillation(beta=0.0, temperature=5.0)
        return compute_teacher_outputs(teacher, data.dev, order, options, tmp_path).signal.logits.clone()

    tokens = tokenise()
    logits = compute_logits()
    for damage in (fill_with_zeros, truncate, Path.unlink):
        for name in ("tokens.bin", "teacher.safetensors"):
            damage(tmp_path / name)
        assert tokenise() == tokens
        assert compute_logits().equal(logits)


@pytest.mark.slow
def test_ctrl_c_prints_how_to_resume(tmp_path, bases, task_file):
    out = tmp_path / "out"
    arguments = ["tune", bases["bert"][0], "--task", task_file, *COMMON, "--steps", "100000", "--out", out]
    process = subprocess.Popen(**popen_arguments(*arguments))
    while not list(tmp_path.glob(".out.partial/best/*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "interrupted" in output
    assert f"The work so far is in {tmp_path / '.out.partial'}. The same command resumes it." in output


def test_outcome_of_a_faster_process_is_used(tmp_path, bases, tuned_outcomes, task_file, monkeypatch):
    """Publish an outcome between the first search for one and the lock: it is used, and no working folder remains."""
    arguments = Upgrade(*bases["bert"]), tuned_outcomes["bert", "lora"], task_file, "direct", tmp_path / "out"
    first = recycle(*arguments)
    searches = []

    def find_nothing_first(out, inputs, bases):
        searches.append(out)
        return None if len(searches) == 1 else find_outcome(out, inputs, bases)

    monkeypatch.setattr(sys.modules["regraft.methods.recycle"], "find_outcome", find_nothing_first)
    assert recycle(*arguments).record == first.record
    assert len(searches) == 2
    assert os.listdir(tmp_path) == ["out"]


def test_damaged_outcome_is_refused(tmp_path, bases, tuned_outcomes, task_file):
    arguments = Upgrade(*bases["bert"]), tuned_outcomes["bert", "lora"], task_file, "direct", tmp_path / "out"
    recycle(*arguments)
    for damage, name, problem in [
        (truncate, "predictions.jsonl", "is truncated"),
        (Path.unlink, "adaptation/adapter_model.safetensors", "adapter_model.safetensors"),
    ]:
        damage(tmp_path / "out" / name)
        with pytest.raises(OutcomeError, match=rf"no longer a complete outcome .*{problem}.* Remove it"):
            recycle(*arguments)
