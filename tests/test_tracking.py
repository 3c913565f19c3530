"""Reports of training to TensorBoard, through the command line and from Python."""

import filecmp
import json

import pytest
from helpers import read_jsonl, read_weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from regraft import recycle, tune
from regraft.errors import RecipeError
from regraft.tuning import tracking
from regraft.upgrade import Upgrade


def read_scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tuning_reports_its_curve_without_effect_on_its_result(tmp_path, bases, task_file, quick_recipe):
    plain = tune(bases["bert"][0], task_file, tmp_path / "plain", recipe=quick_recipe)
    with tracking(["tensorboard"], tmp_path / "logs"):
        tracked = tune(bases["bert"][0], task_file, tmp_path / "tracked", recipe=quick_recipe)
    logged = read_scalars(tmp_path / "logs" / "tracked")
    assert [step for step, _ in logged["eval/score"]] == [point["step"] for point in tracked.curve]
    assert [score for _, score in logged["eval/score"]] == pytest.approx([point["score"] for point in tracked.curve])
    assert len(logged["train/loss"]) == 60 // 10
    plain_weights, tracked_weights = (read_weights(outcome.path / "adaptation") for outcome in (plain, tracked))
    assert all((plain_weights[name] == tracked_weights[name]).all() for name in plain_weights)
    assert json.dumps(plain.record.inputs) == json.dumps(tracked.record.inputs)
    assert filecmp.cmp(plain.path / "predictions.jsonl", tracked.path / "predictions.jsonl", shallow=False)
    confidences = [row["confidence"] for row in read_jsonl(plain.path / "predictions.jsonl")]
    assert all(0.5 <= confidence <= 1 for confidence in confidences)


def test_unknown_or_missing_tracker_is_refused(tmp_path, bases, tuned_outcomes, task_file, quick_recipe):
    with tracking(["tensorbord"], tmp_path / "logs"), pytest.raises(RecipeError, match=r"tensorbord.*tensorboard"):
        recycle(
            Upgrade(*bases["bert"]),
            tuned_outcomes["bert", "full"],
            task_file,
            "init",
            tmp_path / "out",
            recipe=quick_recipe,
        )
    with tracking(["swanlab"], tmp_path / "logs"), pytest.raises(RecipeError, match="not installed"):
        recycle(
            Upgrade(*bases["bert"]),
            tuned_outcomes["bert", "full"],
            task_file,
            "init",
            tmp_path / "out",
            recipe=quick_recipe,
        )
    assert not (tmp_path / "out").exists()


def test_report_to_option(tmp_path, bases, task_file, run_main):
    options = ["--task", task_file, "--steps", 10, "--eval-every", 5, "--precision", "fp32"]
    code, _, error = run_main(
        "tune", bases["bert"][0], *options, "--out", tmp_path / "run", "--report-to", "tensorboard"
    )
    assert code == 0, error
    assert len(read_scalars(tmp_path / "run-logs" / "run")["eval/score"]) == 3
