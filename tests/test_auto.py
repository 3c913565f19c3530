"""`auto`: what it stops at and why, and the statistics it goes by."""

import dataclasses
import shutil
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from conftest import move_base, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.sparse import csr_array
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from regraft import Base, Recipe, Task, Upgrade, check, compare, recycle, tune
from regraft.diagnosis.verdict import verdict
from regraft.errors import DataError, RecipeError
from regraft.methods.auto import Auto
from regraft.methods.target import Target
from regraft.model.probe import probe
from regraft.recipe import best_step
from regraft.task import Interval, load_data, paired_difference, recovery, score
from regraft.task.bootstrap import resampled_scores
from regraft.task.metric import sum_metric
from regraft.task.types.class_metrics import ACCURACY

FEW = Recipe(steps=12, batch_size=8, learning_rate=1e-3, eval_every=3, save_every=3, precision="fp32")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from(["accuracy", "macro_f1", "mcc"]))
def test_scores_of_resamples_are_those_of_scikit_learn(seed, classes, metric):
    chance = np.random.default_rng(seed)
    labels, guesses = chance.integers(0, classes, (2, 25))
    counts = np.random.default_rng(seed).multinomial(25, np.full(25, 1 / 25), 6)
    (scores,) = resampled_scores(metric, labels, [guesses], seed=seed, resamples=6)
    by_scikit_learn = {
        "accuracy": accuracy_score, "macro_f1": partial(f1_score, average="macro", zero_division=0.0),
        "mcc": matthews_corrcoef,
    }[metric]  # fmt: skip
    for count, value in zip([np.ones(25, dtype=int), *counts], scores, strict=True):
        drawn = np.repeat(np.arange(25), count)
        assert value == pytest.approx(by_scikit_learn(labels[drawn], guesses[drawn]), abs=1e-12)
    assert score(metric, labels, guesses) == by_scikit_learn(labels, guesses)  # to the bit


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "mcc"])
def test_a_thousand_labels_are_resampled_in_little_memory(metric):
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 1000, 4000)
    guesses = np.where(chance.random(4000) < 0.5, labels, chance.integers(0, 1000, 4000))
    tracemalloc.start()
    interval = paired_difference(metric, labels, guesses, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert interval.low < interval.high < 0
    assert peak < 250 * 2**20


def test_a_score_that_falls_leads_to_the_same_choices():
    """By the root of the mean squared error of 0 and 1, which orders predictions as accuracy does, the other way."""
    error = sum_metric(
        "error",
        lambda true, predicted: csr_array(np.stack([(true - predicted) ** 2.0, np.ones(len(true))], axis=1)),
        lambda sums: np.sqrt(sums[:, 0] / sums[:, 1]),
        higher_is_better=False,
        is_bounded=False,
    )
    labels = np.arange(400) % 2
    old, new = labels.copy(), labels.copy()
    old[:40], new[:44] = 1 - labels[:40], 1 - labels[:44]
    assert paired_difference(error, labels, old, new).estimate == pytest.approx(np.sqrt(0.11) - np.sqrt(0.1))
    found = verdict(error, labels, old, new, np.sqrt(0.5))
    assert (found.choice, found.predicted) == ("use as is", pytest.approx(0.96, abs=0.01))
    assert "+0.5 [-0.1, +1]" in verdict(error, labels, old, new, 0.7, gain=Interval(0.5, -0.1, 1)).reasons[3].value
    share = error.share_to_difference(0.01, np.sqrt(0.5), np.sqrt(0.1))
    assert share == pytest.approx(0.01 * (np.sqrt(0.5) - np.sqrt(0.1)))
    target = Target(error, labels.tolist(), old.tolist(), 0.316, 0.707, 0.316, None, share, 0.9, None)
    assert (target.measure(labels)["verdict"], target.measure(1 - labels)["verdict"]) == ("passes", "fails")
    assert target.recovered_share(0.5) == pytest.approx(0.53, abs=0.01)
    assert recovery(0.5, 0.7, 0.3, error) == pytest.approx(0.5)
    assert recovery(0.5, 0.7, 0.8, error) is None
    curve = [{"step": 0, "score": 0.5}, {"step": 5, "score": 0.2}, {"step": 9, "score": 0.2}]
    assert best_step(curve, error.merit) == 5


def test_the_interval_of_a_difference_is_the_binomials():
    """One model wrong on 40 of 400 where the other is right, and right on 20 where it is wrong."""
    labels = np.zeros(400, dtype=int)
    one, other = labels.copy(), labels.copy()
    one[:40] = 1
    other[40:60] = 1
    found = paired_difference("accuracy", labels, one, other, confidence=0.95)
    deviation = np.sqrt((60 / 400 - 0.05**2) / 400)
    assert found.estimate == pytest.approx(-0.05)
    assert found.low == pytest.approx(-0.05 - 1.645 * deviation, abs=0.003)
    assert found.high == pytest.approx(-0.05 + 1.645 * deviation, abs=0.003)
    assert paired_difference("accuracy", labels, one, one).low == 0
    with pytest.raises(RecipeError, match="confidence"):
        paired_difference("accuracy", labels, one, other, confidence=1.0)


def test_a_stage_passes_fails_or_is_undecided():
    labels = [0, 1] * 200
    reference = list(labels)
    target = Target(ACCURACY, labels, reference, 1.0, 0.5, 1.0, None, tolerance=0.02, confidence=0.9, weakness=None)
    assert [target.recovered_share(score) for score in (1.0, 0.75, 0.5)] == [1.0, 0.5, 0.0]
    wrong = {"passes": 2, "undecided": 9, "fails": 60}
    for outcome, count in wrong.items():
        guesses = [1 - label if i < count else label for i, label in enumerate(labels)]
        found = target.measure(guesses)
        assert found["verdict"] == outcome
        assert found["score"] == pytest.approx(1 - count / 400, abs=1e-4)
    above = dataclasses.replace(target, score=1.1)
    assert above.measure(reference)["verdict"] == "fails"


def test_a_probe_reads_what_a_base_knows(bases, task_file):
    """The tiny bases' embeddings tell good words from bad ones."""
    data = load_data(task_file, 20)
    found = probe(Base.open(bases["bert"][0]), data, "fp32")
    assert score("accuracy", data.dev.labels, found) > 0.75


def climb(tmp_path, upgrade, source, task_file, name="auto", recipe=FEW, **options):
    return recycle(upgrade, source, task_file, "auto", tmp_path / name, recipe=recipe, options=Auto(**options))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_auto_stops_at_direct_where_that_is_enough(tmp_path, bases, tuned, task_file, kind):
    upgrade, source = Upgrade(*bases["bert"]), tuned["bert", kind]
    outcome = climb(tmp_path, upgrade, source, task_file)
    notes = outcome.record.notes
    assert notes["chosen"] == "direct"
    assert "direct passes" in notes["why"]
    assert [stage["rung"] for stage in notes["tried"]] == ["direct"]
    direct = recycle(upgrade, source, task_file, "direct", tmp_path / "direct", recipe=FEW)
    assert outcome.scores == direct.scores
    assert outcome.record.cost.steps == outcome.record.cost.labels == 0


@pytest.fixture(scope="module")
def far(tmp_path_factory, bases):
    """An upgrade that moved so far that old weights are of no use."""
    return Upgrade(bases["bert"][0], move_base(bases["bert"][0], tmp_path_factory.mktemp("far") / "new", 2.0))


def test_auto_climbs_where_direct_is_not_enough(tmp_path, far, tuned, task_file):
    outcome = climb(tmp_path, far, tuned["bert", "lora"], task_file)
    notes = outcome.record.notes
    tried = [stage["rung"] for stage in notes["tried"]]
    assert tried[:2] == ["direct", "ridge"]
    assert tried[2] in ("direct, tuned 25 %", "ridge, tuned 25 %")
    assert "scratch" not in tried  # most of the old score survives
    assert all(stage["verdict"] != "passes" for stage in notes["tried"][:-1])
    scores = [stage["score"] for stage in notes["tried"]]
    assert outcome.scores["dev"] >= max(scores) - 0.01 - 1e-4
    assert outcome.record.cost.steps == sum(stage["steps"] for stage in notes["tried"]) > 0
    assert outcome.curve[-1]["step"] == outcome.record.cost.steps
    steps = [point["step"] for point in outcome.curve]
    assert steps == sorted(steps)


def test_scratch_is_tried_where_little_survives(tmp_path, bases, tuned, task_file):
    other = Upgrade(bases["bert"][0], write_base(tmp_path / "other", "bert", seed=9))  # nothing in common
    outcome = climb(
        tmp_path, other, tuned["bert", "lora"], task_file, recipe=dataclasses.replace(FEW, steps=60, eval_every=20),
        training_free=("direct",), budgets=(0.05,),
    )  # fmt: skip
    notes = outcome.record.notes
    assert [stage["rung"] for stage in notes["tried"]] == ["direct", "direct, tuned 5 %", "scratch"]
    assert notes["chosen"] == "scratch"
    scratch = recycle(
        other, tuned["bert", "lora"], task_file, "scratch", tmp_path / "scratch",
        recipe=dataclasses.replace(FEW, steps=60, eval_every=20),
    )  # fmt: skip
    assert outcome.scores == {**scratch.scores, "dev_at_start": outcome.curve[0]["score"]}


def test_a_given_target_is_met_or_climbed_for(tmp_path, bases, tuned, task_file):
    upgrade, source = Upgrade(*bases["bert"]), tuned["bert", "lora"]
    low = climb(tmp_path, upgrade, source, task_file, "low", target=0.5)
    assert low.record.notes["chosen"] == "direct"
    high = climb(tmp_path, upgrade, source, task_file, "high", target=1.5, budgets=(0.5,), scratch=False)
    assert "nothing passes" in high.record.notes["why"]
    tried = [stage["rung"] for stage in high.record.notes["tried"]]
    assert tried[:2] == ["direct", "ridge"]  # a better start is worth having even where it cannot pass
    assert tried[2:] in (["direct, tuned 50 %"], ["ridge, tuned 50 %"])


def test_without_labels_no_label_is_read(tmp_path, far, tuned, task_file):
    scrambled = tmp_path / "task"
    shutil.copytree(task_file.parent, scrambled)
    for split in ("train", "dev"):
        lines = (scrambled / f"{split}.csv").read_text().splitlines()
        other = {"positive": "negative", "negative": "positive"}
        turned = [row.rpartition(",")[0] + "," + other[row.rpartition(",")[2]] for row in lines[1:]]
        (scrambled / f"{split}.csv").write_text("\n".join([lines[0], *turned]) + "\n")
    found = [
        climb(tmp_path, far, tuned["bert", "lora"], task, name, labels=False, budgets=(0.5,), scratch=False)
        for name, task in (("true", task_file), ("false", scrambled / "task.yaml"))
    ]
    one, other = (load_file(out.path / "adaptation" / "adapter_model.safetensors") for out in found)
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = ([{**r, "seconds": 0} for r in out.record.notes["tried"]] for out in found)
    assert first == second
    for out in found:
        assert "cannot be known" in out.record.notes["cannot_know"]
        assert out.record.notes["old_deployment"] == 1.0  # it agrees with itself


@pytest.fixture
def unlabelled(tmp_path, task_file):
    """The task's texts alone."""
    for split in ("train", "dev", "test"):
        lines = (task_file.parent / f"{split}.csv").read_text().splitlines()
        (tmp_path / f"{split}.csv").write_text("\n".join(row.rpartition(",")[0] for row in lines) + "\n")
    text = task_file.read_text().replace("label: label", "label: null\nlabels: [negative, positive]")
    (tmp_path / "task.yaml").write_text(text)
    return tmp_path / "task.yaml"


def test_a_task_without_labels_is_recycled_by_what_reads_none(tmp_path, far, tuned, task_file, unlabelled):
    source = tuned["bert", "lora"]
    data = load_data(unlabelled, 20)
    assert not data.labelled
    assert (len(data.train), len(data.dev), data.labels) == (240, 60, ("negative", "positive"))
    for method in ("direct", "ridge", "scaled", "label-free"):
        outcome = recycle(far, source, unlabelled, method, tmp_path / method, recipe=FEW)
        scored = recycle(far, source, task_file, method, tmp_path / f"{method}-scored", recipe=FEW)
        one, other = (load_file(out.path / "adaptation" / "adapter_model.safetensors") for out in (outcome, scored))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert outcome.scores["dev"] is outcome.scores["test"] is outcome.scores["test_majority"] is None
        assert outcome.predictions("test") == scored.predictions("test")
        assert outcome.record.cost.labels == 0
        assert "not measured" in (outcome.path / "README.md").read_text()
    outcome = climb(tmp_path, far, source, unlabelled, labels=False, budgets=(0.5,), scratch=False)
    assert outcome.record.notes["cannot_know"]
    for method, options in (("init", None), ("masked", None), ("auto", None)):
        with pytest.raises(DataError, match="has no labels"):
            recycle(far, source, unlabelled, method, tmp_path / "out", recipe=FEW, options=options)
    for act in (
        lambda: tune(far.old, unlabelled, tmp_path / "out", recipe=FEW),
        lambda: check(far, source, unlabelled),
        lambda: compare(far, source, unlabelled, ["direct"], tmp_path / "all", recipe=FEW),
        lambda: load_data(Task.load(unlabelled).with_shots(2), 20),
    ):
        with pytest.raises(DataError, match="has no labels"):
            act()
    assert not (tmp_path / "out").exists()
    unlabelled.write_text(unlabelled.read_text().replace("labels: [negative, positive]", ""))
    with pytest.raises(DataError, match="no column of them"):
        Task.load(unlabelled)


def test_an_interrupted_climb_goes_on_where_it_was(tmp_path, far, tuned, task_file):
    class Stopped(Exception):
        pass

    seen = []

    def interrupt(stage, done, total, figures):
        seen.append((stage, done))
        if stage == "tune" and [step for name, step in seen if name == "tune"][-2:] == [3, 1]:
            raise Stopped

    def work(name, progress):
        return recycle(
            far, tuned["bert", "lora"], task_file, "auto", tmp_path / name, recipe=FEW,
            options=Auto(budgets=(0.25, 0.75), target=1.5, scratch=False, tolerance=0.0), progress=progress,
        )  # fmt: skip

    with pytest.raises(Stopped):  # in the second of its tunings
        work("one", interrupt)
    assert not (tmp_path / "one").exists()
    seen.clear()
    one = work("one", lambda stage, done, *_: seen.append((stage, done)))
    assert next(done for stage, done in seen if stage == "tune") in (1, 2)  # not the first stage's steps again
    assert sum(stage == "tune" for stage, _ in seen) <= 6
    other = work("other", lambda *_: None)
    first, second = (load_file(out.path / "adaptation" / "adapter_model.safetensors") for out in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_options_that_cannot_be():
    for wrong, says in (
        ({"tolerance": -0.1}, "tolerance"),
        ({"confidence": 1.0}, "confidence"),
        ({"training_free": ("ridge",)}, "must start with direct"),
        ({"budgets": (0.5, 0.25)}, "must be increasing"),
        ({"budgets": (2.0,)}, "must be increasing"),
        ({"labels": False, "target": 0.5}, "needs labels"),
    ):
        with pytest.raises(RecipeError, match=says):
            Auto(**wrong)


def test_a_rate_that_diverges_is_the_error_it_is_elsewhere(tmp_path, bases, tuned, task_file):
    """It is no method that does not fit the kind, which alone is left out."""
    recipe = dataclasses.replace(FEW, learning_rate=1e30)
    for method, options in (("init", None), ("auto", Auto(target=2.0))):
        with pytest.raises(RecipeError, match=r"became (nan|inf) at step \d+\. Lower the learning rate \(1e\+30\)"):
            recycle(
                Upgrade(*bases["bert"]), tuned["bert", "lora"], task_file, method, tmp_path / "out", recipe=recipe,
                options=options,
            )  # fmt: skip
        assert not list(tmp_path.iterdir())
