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
from typer.testing import CliRunner

from regraft import Corpus, Distillation, Recipe, Upgrade, recycle, tune
from regraft.adaptation import find_outcome, fresh_model
from regraft.cli import app
from regraft.errors import OutcomeError
from regraft.model import Deployment
from regraft.progress import silent
from regraft.task import load_data
from regraft.tuning.corpus import pack
from regraft.tuning.distill import compute_teacher_outputs

SOURCE = Path(__file__).parents[1] / "src"
COMMON = ["--batch-size", "8", "--learning-rate", "3e-3", "--precision", "fp32", "--eval-every", "20"]
MANY = [*COMMON, "--save-every", "20", "--steps", "240"]


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
    """Run a command in this process, which has imported all that it needs."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output


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
    assert len(outcome_curve(killed)) == 13
    assert (killed / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    assert not list(killed.parent.glob(".*.partial"))


@pytest.mark.slow
def test_tune(tmp_path, bases, task_file):
    given = ["tune", bases["bert"][0], "--task", task_file, *MANY]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    work = run_and_kill(killed, *given, "--out", killed)
    last = last_checkpoint(work)
    assert int(last.name.split("-")[1]) < 240
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
    given = ["pretrain", base, text, "--block", "32", *COMMON, "--save-every", "5", "--steps", "200"]
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


class Interrupted(Exception):
    """Stands for whatever ends a run at once."""


def interrupt(stage, step):
    """A progress callback that ends a run at a step."""

    def progress(at, done, total, figures):
        if (at, done) == (stage, step):
            raise Interrupted

    return progress


def empty(file):
    file.write_bytes(b"")


def zero(file):
    """What a machine that lost its power leaves of a file that was not synced: the right size, and zeros."""
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_discarded_and_what_is_whole_is_used(tmp_path, bases, task_file):
    def run(out, progress=silent):
        recipe = Recipe(steps=12, eval_every=2, save_every=4, learning_rate=3e-3, precision="fp32", batch_size=8)
        return tune(bases["bert"][0], task_file, out, recipe=recipe, progress=progress)

    whole, out, kept = run(tmp_path / "whole"), tmp_path / "out", tmp_path / "kept"
    with pytest.raises(Interrupted):
        run(out, interrupt("tune", 10))
    work = tmp_path / ".out.partial"
    shutil.copytree(work, kept)
    assert [entry.name for entry in (work / "checkpoints").iterdir()] == ["checkpoint-8"]
    last = Path("checkpoints", "checkpoint-8")
    best = next((work / "best").glob("step-*")).relative_to(work)
    damages = [
        (empty, last / "optimizer.pt", 0), (Path.unlink, last / "optimizer.pt", 0), (empty, last / "rng_state.pth", 0),
        (zero, last / "model.safetensors", 0), (zero, last / "trainer_state.json", 0), (empty, last / "config.json", 0),
        (zero, best, 0), (Path.touch, Path("checkpoints", "checkpoint-999"), 8), (empty, Path("inputs.json"), 0),
    ]  # fmt: skip
    for damage, file, first in damages:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(kept, work)
        shutil.rmtree(out, ignore_errors=True)
        damage(work / file)
        steps = []
        run(out, lambda stage, done, *_, steps=steps: steps.append(done) if stage == "tune" else None)
        assert steps[0] == first + 1, file
        assert same_weights(out / "adaptation/model.safetensors", whole.path / "adaptation/model.safetensors"), file
        assert outcome_curve(out) == outcome_curve(whole.path)
    assert not work.exists()


def test_what_was_cached_is_made_again_if_it_is_damaged(tmp_path, opened, task_file):
    base, data = opened["bert"][0], load_data(task_file, 20)
    text = tmp_path / "text.txt"
    text.write_text("good film\n" * 50, encoding="utf-8")

    def cached():
        return pack(Corpus((str(text),)), base, 8, tmp_path / "tokens.bin", silent).tolist()

    def taught():
        teacher = Deployment(fresh_model(base, data.head, 1), base, data, "fp32")
        every = range(len(data.dev))
        return compute_teacher_outputs(teacher, data.dev, every, Distillation(beta=0.0), tmp_path).signal.logits.clone()

    tokens, logits = cached(), taught()
    for damage in (zero, empty, Path.unlink):
        for name in ("tokens.bin", "teacher.safetensors"):
            damage(tmp_path / name)
        assert cached() == tokens
        assert taught().equal(logits)


@pytest.mark.slow
def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, bases, task_file):
    out = tmp_path / "out"
    given = ["tune", bases["bert"][0], "--task", task_file, *COMMON, "--steps", "100000", "--out", out]
    process = subprocess.Popen(**command(*given))
    while not list(tmp_path.glob(".out.partial/best/*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "interrupted: the same command goes on from here" in told
    assert f"kept in {tmp_path / '.out.partial'}" in told


def test_another_process_may_finish_first(tmp_path, bases, tuned, task_file, monkeypatch):
    """It published between the first look at --out and the lock: its outcome is found, and nothing is left behind."""
    arguments = Upgrade(*bases["bert"]), tuned["bert", "lora"], task_file, "direct", tmp_path / "out"
    first = recycle(*arguments)
    looks = []

    def blind_once(out, inputs, bases):
        looks.append(out)
        return None if len(looks) == 1 else find_outcome(out, inputs, bases)

    monkeypatch.setattr(sys.modules["regraft.methods.recycle"], "find_outcome", blind_once)
    assert recycle(*arguments).record == first.record
    assert len(looks) == 2
    assert os.listdir(tmp_path) == ["out"]


def test_an_outcome_that_lost_its_files_is_not_taken_for_done(tmp_path, bases, tuned, task_file):
    arguments = Upgrade(*bases["bert"]), tuned["bert", "lora"], task_file, "direct", tmp_path / "out"
    recycle(*arguments)
    for damage, name, says in [
        (empty, "predictions.jsonl", "is truncated"),
        (Path.unlink, "adaptation/adapter_model.safetensors", "adapter_model.safetensors"),
    ]:
        damage(tmp_path / "out" / name)
        with pytest.raises(OutcomeError, match=rf"no longer a complete outcome .*{says}.* Remove it"):
            recycle(*arguments)
