"""What training reports to TensorBoard, through the command line and from Python."""

import filecmp
import json

import pytest
from conftest import weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from regraft import recycle, tune
from regraft.cli import main
from regraft.errors import RecipeError
from regraft.tuning import tracking
from regraft.upgrade import Upgrade


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tuning_reports_its_curve_and_is_the_same_with_and_without(tmp_path, bases, task_file, quick):
    plain = tune(bases["bert"][0], task_file, tmp_path / "plain", recipe=quick)
    with tracking(["tensorboard"], tmp_path / "logs"):
        tracked = tune(bases["bert"][0], task_file, tmp_path / "tracked", recipe=quick)
    found = scalars(tmp_path / "logs" / "tracked")
    assert [step for step, _ in found["eval/score"]] == [point["step"] for point in tracked.curve]
    assert [score for _, score in found["eval/score"]] == pytest.approx([point["score"] for point in tracked.curve])
    assert len(found["train/loss"]) == 60 // 10
    one, other = (weights(outcome.path / "adaptation") for outcome in (plain, tracked))
    assert all((one[name] == other[name]).all() for name in one)
    assert json.dumps(plain.record.inputs) == json.dumps(tracked.record.inputs)
    assert filecmp.cmp(plain.path / "predictions.jsonl", tracked.path / "predictions.jsonl", shallow=False)
    confidences = [
        json.loads(line)["confidence"] for line in (plain.path / "predictions.jsonl").read_text().splitlines()
    ]
    assert all(0.5 <= confidence <= 1 for confidence in confidences)


def test_a_tracker_that_there_is_not(tmp_path, bases, tuned, task_file, quick):
    with tracking(["tensorbord"], tmp_path / "logs"), pytest.raises(RecipeError, match=r"tensorbord.*tensorboard"):
        recycle(Upgrade(*bases["bert"]), tuned["bert", "full"], task_file, "init", tmp_path / "out", recipe=quick)
    with tracking(["swanlab"], tmp_path / "logs"), pytest.raises(RecipeError, match="not installed"):
        recycle(Upgrade(*bases["bert"]), tuned["bert", "full"], task_file, "init", tmp_path / "out", recipe=quick)
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, bases, task_file, monkeypatch):
    given = ["--task", str(task_file), "--steps", "10", "--eval-every", "5", "--precision", "fp32"]
    command = ["regraft", "tune", str(bases["bert"][0]), *given, "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", [*command, "--report-to", "tensorboard"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert len(scalars(tmp_path / "run-logs" / "run")["eval/score"]) == 3
