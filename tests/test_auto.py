"""`auto`: which stages it tries, where it stops, and the statistics behind its decisions."""

import dataclasses
import shutil
import tracemalloc
from functools import partial

import numpy as np
import pytest
from helpers import InterruptedRunError, have_equal_tensors, read_weights, write_base, write_upgrade
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from regraft import Base, Recipe, Task, Upgrade, check, compare, recycle, tune
from regraft.diagnosis.verdict import verdict
from regraft.errors import DataError, RecipeError
from regraft.methods.auto import Auto
from regraft.methods.target import Target
from regraft.model.probe import probe
from regraft.recipe import best_step
from regraft.report import write_report
from regraft.task import Interval, load_data, paired_difference, recovery, score
from regraft.task.bootstrap import resampled_scores
from regraft.task.metric import sum_metric
from regraft.task.types.class_metrics import ACCURACY

RECIPE = Recipe(steps=12, batch_size=8, learning_rate=1e-3, eval_every=3, save_every=3, precision="fp32")
SKLEARN_METRICS = {
    "accuracy": accuracy_score,
    "macro_f1": partial(f1_score, average="macro", zero_division=0.0),
    "mcc": matthews_corrcoef,
}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from(["accuracy", "macro_f1", "mcc"]))
def test_resampled_scores_equal_those_of_scikit_learn(seed, num_classes, metric):
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(0, num_classes, (2, 25))
    resample_counts = np.random.default_rng(seed).multinomial(25, np.full(25, 1 / 25), 6)
    (scores,) = resampled_scores(metric, labels, [predictions], seed=seed, resamples=6)
    sklearn_metric = SKLEARN_METRICS[metric]
    for counts, value in zip([np.ones(25, dtype=int), *resample_counts], scores, strict=True):
        indices = np.repeat(np.arange(25), counts)
        assert value == pytest.approx(sklearn_metric(labels[indices], predictions[indices]), abs=1e-12)
    # The score of the examples themselves is exactly that of scikit-learn.
    assert score(metric, labels, predictions) == sklearn_metric(labels, predictions)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "mcc"])
def test_resampling_a_thousand_labels_needs_little_memory(metric):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 4000)
    predictions = np.where(rng.random(4000) < 0.5, labels, rng.integers(0, 1000, 4000))
    tracemalloc.start()
    interval = paired_difference(metric, labels, predictions, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert interval.low < interval.high < 0
    assert peak < 250 * 2**20


def test_a_metric_to_minimise_leads_to_the_same_choices():
    """The root mean squared error of labels 0 and 1 ranks predictions as accuracy does, in reverse."""
    error = sum_metric(
        "error",
        lambda targets, predictions: csr_array(
            np.stack([(targets - predictions) ** 2.0, np.ones(len(targets))], axis=1)
        ),
        lambda sums: np.sqrt(sums[:, 0] / sums[:, 1]),
        higher_is_better=False,
        is_bounded=False,
    )
    labels = np.arange(400) % 2
    old_predictions, new_predictions = labels.copy(), labels.copy()
    old_predictions[:40], new_predictions[:44] = 1 - labels[:40], 1 - labels[:44]
    difference = paired_difference(error, labels, old_predictions, new_predictions)
    assert difference.estimate == pytest.approx(np.sqrt(0.11) - np.sqrt(0.1))

    recommendation = verdict(error, labels, old_predictions, new_predictions, np.sqrt(0.5))
    assert (recommendation.choice, recommendation.predicted) == ("use as is", pytest.approx(0.96, abs=0.01))
    with_gain = verdict(error, labels, old_predictions, new_predictions, 0.7, gain=Interval(0.5, -0.1, 1))
    assert "+0.500 [-0.100, +1.00]" in with_gain.reasons[3].value
    assert [reason.value for reason in with_gain.reasons[:3]] == ["0.3162", "0.3317", "0.7000"]
    assert [error.format_score(score) for score in (12345.6, 0.0, -2.5, 4e-7)] == ["12,346", "0.000", "-2.500", "4e-07"]
    assert [error.format_deviation(score) for score in (1234.5, 0.0156, 0.0)] == ["1,234", "0.016", "0.0"]
    assert error.describe(1234.5, "d") == "1,234"
    assert error.round_score(1.23456789e-7) == 1.23457e-7

    tolerance = error.share_to_difference(0.01, np.sqrt(0.5), np.sqrt(0.1))
    assert tolerance == pytest.approx(0.01 * (np.sqrt(0.5) - np.sqrt(0.1)))
    target = Target(
        metric=error,
        targets=labels.tolist(),
        reference=old_predictions.tolist(),
        old=0.316,
        chance=0.707,
        score=0.316,
        gain=None,
        tolerance=tolerance,
        confidence=0.9,
        weakness=None,
    )
    assert target.measure(labels)["verdict"] == "passes"
    assert target.measure(1 - labels)["verdict"] == "fails"
    assert target.recovered_share(0.5) == pytest.approx(0.53, abs=0.01)

    assert recovery(0.5, 0.7, 0.3, error) == pytest.approx(0.5)
    assert recovery(0.5, 0.7, 0.8, error) is None
    assert recovery(0.5, 0.7, 0.69, error) is None  # a gain of less than 3 % of the chance score
    curve = [{"step": 0, "score": 0.5}, {"step": 5, "score": 0.2}, {"step": 9, "score": 0.2}]
    assert best_step(curve, error.merit) == 5


def test_the_interval_of_a_difference_matches_the_normal_approximation():
    """Of 400 examples, 40 are wrong in the predictions alone and 20 in the reference alone."""
    labels = np.zeros(400, dtype=int)
    predictions, reference = labels.copy(), labels.copy()
    predictions[:40] = 1
    reference[40:60] = 1
    interval = paired_difference("accuracy", labels, predictions, reference, confidence=0.95)
    standard_error = np.sqrt((60 / 400 - 0.05**2) / 400)
    assert interval.estimate == pytest.approx(-0.05)
    assert interval.low == pytest.approx(-0.05 - 1.645 * standard_error, abs=0.003)
    assert interval.high == pytest.approx(-0.05 + 1.645 * standard_error, abs=0.003)
    assert paired_difference("accuracy", labels, predictions, predictions).low == 0
    with pytest.raises(RecipeError, match="confidence"):
        paired_difference("accuracy", labels, predictions, reference, confidence=1.0)


def test_a_stage_passes_fails_or_is_undecided():
    labels = [0, 1] * 200
    target = Target(
        metric=ACCURACY,
        targets=labels,
        reference=list(labels),
        old=1.0,
        chance=0.5,
        score=1.0,
        gain=None,
        tolerance=0.02,
        confidence=0.9,
        weakness=None,
    )
    assert [target.recovered_share(score) for score in (1.0, 0.75, 0.5)] == [1.0, 0.5, 0.0]
    for expected_verdict, num_errors in {"passes": 2, "undecided": 9, "fails": 60}.items():
        predictions = [1 - label if i < num_errors else label for i, label in enumerate(labels)]
        result = target.measure(predictions)
        assert result["verdict"] == expected_verdict
        assert result["score"] == pytest.approx(1 - num_errors / 400, abs=1e-4)
    higher_target = dataclasses.replace(target, score=1.1)
    assert higher_target.measure(target.reference)["verdict"] == "fails"


def test_a_linear_probe_reads_the_sentiment_in_the_embeddings_of_a_base(bases, task_file):
    data = load_data(task_file, 20)
    predictions = probe(Base.open(bases["bert"][0]), data, "fp32")
    assert score("accuracy", data.dev.labels, predictions) > 0.75


def run_auto(tmp_path, upgrade, source, task_file, name="auto", recipe=RECIPE, **options):
    return recycle(upgrade, source, task_file, "auto", tmp_path / name, recipe=recipe, options=Auto(**options))


def stage_names(outcome):
    return [stage["rung"] for stage in outcome.record.notes["tried"]]


def assert_same_adapters(outcome, reference):
    assert have_equal_tensors(read_weights(outcome.path / "adaptation"), read_weights(reference.path / "adaptation"))


@pytest.fixture(scope="module")
def large_upgrade(tmp_path_factory, bases):
    """An upgrade whose base moved so far that `direct` fails."""
    new = write_upgrade(bases["bert"][0], tmp_path_factory.mktemp("large-upgrade") / "new", 2.0)
    return Upgrade(bases["bert"][0], new)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_auto_stops_at_direct_if_it_passes(tmp_path, bases, tuned_outcomes, task_file, kind):
    upgrade = Upgrade(*bases["bert"])
    source = tuned_outcomes["bert", kind]
    outcome = run_auto(tmp_path, upgrade, source, task_file)
    assert outcome.record.notes["chosen"] == "direct"
    assert "direct passes" in outcome.record.notes["why"]
    assert stage_names(outcome) == ["direct"]
    direct = recycle(upgrade, source, task_file, "direct", tmp_path / "direct", recipe=RECIPE)
    assert outcome.scores == direct.scores
    assert outcome.record.cost.steps == outcome.record.cost.labels == 0


def test_auto_tunes_if_direct_fails(tmp_path, large_upgrade, tuned_outcomes, task_file):
    outcome = run_auto(tmp_path, large_upgrade, tuned_outcomes["bert", "lora"], task_file)
    names = stage_names(outcome)
    assert names[:2] == ["direct", "ridge"]
    assert names[2] in ("direct, tuned 25 %", "ridge, tuned 25 %")
    assert "scratch" not in names  # a stage passes, or recovers at least half of the old score
    stages = outcome.record.notes["tried"]
    assert all(stage["verdict"] != "passes" for stage in stages[:-1])
    assert outcome.scores["dev"] >= max(stage["score"] for stage in stages) - 0.01 - 1e-4
    assert outcome.record.cost.steps == sum(stage["steps"] for stage in stages) > 0
    assert outcome.curve[-1]["step"] == outcome.record.cost.steps
    steps = [point["step"] for point in outcome.curve]
    assert steps == sorted(steps)


def test_auto_tries_scratch_if_little_of_the_score_survives(tmp_path, bases, tuned_outcomes, task_file):
    unrelated_base = write_base(tmp_path / "unrelated", "bert", seed=9)
    upgrade = Upgrade(bases["bert"][0], unrelated_base)
    source = tuned_outcomes["bert", "lora"]
    recipe = dataclasses.replace(RECIPE, steps=60, eval_every=20)
    outcome = run_auto(tmp_path, upgrade, source, task_file, recipe=recipe, training_free=("direct",), budgets=(0.05,))
    assert stage_names(outcome) == ["direct", "direct, tuned 5 %", "scratch"]
    assert outcome.record.notes["chosen"] == "scratch"
    scratch = recycle(upgrade, source, task_file, "scratch", tmp_path / "scratch", recipe=recipe)
    assert outcome.scores == {**scratch.scores, "dev_at_start": outcome.curve[0]["score"]}


def test_a_low_target_needs_no_tuning_and_a_high_one_does(tmp_path, bases, tuned_outcomes, task_file):
    upgrade = Upgrade(*bases["bert"])
    source = tuned_outcomes["bert", "lora"]
    low = run_auto(tmp_path, upgrade, source, task_file, "low", target=0.5)
    assert low.record.notes["chosen"] == "direct"
    high = run_auto(tmp_path, upgrade, source, task_file, "high", target=1.5, budgets=(0.5,), scratch=False)
    assert "nothing passes" in high.record.notes["why"]
    names = stage_names(high)
    # Ridge cannot pass either, but may be a better start for tuning.
    assert names[:2] == ["direct", "ridge"]
    assert names[2:] in (["direct, tuned 50 %"], ["ridge, tuned 50 %"])


def flip_labels(file):
    """Exchange the labels `positive` and `negative` of a CSV file."""
    flipped = {"positive": "negative", "negative": "positive"}
    header, *rows = file.read_text().splitlines()
    texts_and_labels = [row.rpartition(",")[::2] for row in rows]
    flipped_rows = [f"{text},{flipped[label]}" for text, label in texts_and_labels]
    file.write_text("\n".join([header, *flipped_rows]) + "\n")


def test_auto_without_labels_ignores_the_labels_of_the_task(tmp_path, large_upgrade, tuned_outcomes, task_file):
    flipped_task = tmp_path / "task"
    shutil.copytree(task_file.parent, flipped_task)
    for split in ("train", "dev"):
        flip_labels(flipped_task / f"{split}.csv")
    outcomes = [
        run_auto(
            tmp_path,
            large_upgrade,
            tuned_outcomes["bert", "lora"],
            task,
            name,
            labels=False,
            budgets=(0.5,),
            scratch=False,
        )
        for name, task in (("true", task_file), ("flipped", flipped_task / "task.yaml"))
    ]
    assert_same_adapters(*outcomes)
    stages, flipped_stages = (
        [{**stage, "seconds": 0} for stage in outcome.record.notes["tried"]] for outcome in outcomes
    )
    assert stages == flipped_stages
    for outcome in outcomes:
        assert "cannot be known" in outcome.record.notes["cannot_know"]
        # Without labels, the old model is scored by its agreement with itself.
        assert outcome.record.notes["old_deployment"] == 1.0


@pytest.fixture
def unlabelled_task(tmp_path, task_file):
    """The task's texts without the column of labels."""
    for split in ("train", "dev", "test"):
        lines = (task_file.parent / f"{split}.csv").read_text().splitlines()
        (tmp_path / f"{split}.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    content = task_file.read_text().replace("label: label", "label: null\nlabels: [negative, positive]")
    (tmp_path / "task.yaml").write_text(content)
    return tmp_path / "task.yaml"


def test_methods_without_labels_recycle_an_unlabelled_task(
    tmp_path, large_upgrade, tuned_outcomes, task_file, unlabelled_task
):
    source = tuned_outcomes["bert", "lora"]
    data = load_data(unlabelled_task, 20)
    assert not data.labelled
    assert (len(data.train), len(data.dev), data.labels) == (240, 60, ("negative", "positive"))
    for method in ("direct", "ridge", "scaled", "label-free"):
        outcome = recycle(large_upgrade, source, unlabelled_task, method, tmp_path / method, recipe=RECIPE)
        labelled_outcome = recycle(
            large_upgrade, source, task_file, method, tmp_path / f"{method}-labelled", recipe=RECIPE
        )
        assert_same_adapters(outcome, labelled_outcome)
        assert outcome.scores["dev"] is outcome.scores["test"] is outcome.scores["test_majority"] is None
        assert outcome.predictions("test") == labelled_outcome.predictions("test")
        assert outcome.record.cost.labels == 0
        assert bool(outcome.curve) == (method == "label-free")
        assert outcome == recycle(large_upgrade, source, unlabelled_task, method, tmp_path / method, recipe=RECIPE)
        assert "not measured" in (outcome.path / "README.md").read_text()
    outcome = run_auto(tmp_path, large_upgrade, source, unlabelled_task, labels=False, budgets=(0.5,), scratch=False)
    assert outcome.record.notes["cannot_know"]
    assert outcome.record.curve_is_agreement
    folders = [tmp_path / "direct", tmp_path / "label-free", outcome.path]
    text = write_report(folders, tmp_path / "report.md", "md").read_text()
    assert "3 methods, of which none has a score" in text
    assert "Learning curves" not in text


def test_methods_with_labels_refuse_an_unlabelled_task(tmp_path, large_upgrade, tuned_outcomes, unlabelled_task):
    source = tuned_outcomes["bert", "lora"]
    out = tmp_path / "out"
    for method in ("init", "masked", "auto"):
        with pytest.raises(DataError, match="has no labels"):
            recycle(large_upgrade, source, unlabelled_task, method, out, recipe=RECIPE)
    with pytest.raises(DataError, match="has no labels"):
        tune(large_upgrade.old, unlabelled_task, out, recipe=RECIPE)
    with pytest.raises(DataError, match="has no labels"):
        check(large_upgrade, source, unlabelled_task)
    with pytest.raises(DataError, match="has no labels"):
        compare(large_upgrade, source, unlabelled_task, ["direct"], tmp_path / "all", recipe=RECIPE)
    with pytest.raises(DataError, match="has no labels"):
        load_data(Task.load(unlabelled_task).with_shots(2), 20)
    assert not out.exists()
    unlabelled_task.write_text(unlabelled_task.read_text().replace("labels: [negative, positive]", ""))
    with pytest.raises(DataError, match="no column of labels"):
        Task.load(unlabelled_task)


def test_an_interrupted_run_resumes_at_its_stage(tmp_path, large_upgrade, tuned_outcomes, task_file):
    options = Auto(budgets=(0.25, 0.75), target=1.5, scratch=False, tolerance=0.0)
    tuning_steps = []

    def record(stage, step, total, metrics):
        if stage == "tune":
            tuning_steps.append(step)

    def interrupt_second_tuning(stage, step, total, metrics):
        record(stage, step, total, metrics)
        if stage == "tune" and tuning_steps[-2:] == [3, 1]:
            raise InterruptedRunError

    def run(name, progress):
        return recycle(
            large_upgrade,
            tuned_outcomes["bert", "lora"],
            task_file,
            "auto",
            tmp_path / name,
            recipe=RECIPE,
            options=options,
            progress=progress,
        )

    with pytest.raises(InterruptedRunError):
        run("resumed", interrupt_second_tuning)
    assert not (tmp_path / "resumed").exists()
    tuning_steps.clear()
    resumed = run("resumed", record)
    assert tuning_steps[0] in (1, 2)
    assert len(tuning_steps) <= 6  # not 9: the 3 steps of the first tuning are not repeated
    uninterrupted = run("uninterrupted", lambda *_: None)
    assert_same_adapters(resumed, uninterrupted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance"),
        ({"confidence": 1.0}, "confidence"),
        ({"training_free": ("ridge",)}, "must start with direct"),
        ({"budgets": (0.5, 0.25)}, "increasing"),
        ({"budgets": (2.0,)}, "increasing"),
        ({"labels": False, "target": 0.5}, "needs labels"),
    ],
)
def test_invalid_options_of_auto_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Auto(**options)


@pytest.mark.parametrize(("method", "options"), [("init", None), ("auto", Auto(target=2.0))])
def test_a_learning_rate_that_diverges_is_an_error(tmp_path, bases, tuned_outcomes, task_file, method, options):
    """`auto` skips methods that do not fit the kind of adaptation; it must not skip a tuning that diverged."""
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30)
    upgrade = Upgrade(*bases["bert"])
    source = tuned_outcomes["bert", "lora"]
    with pytest.raises(RecipeError, match=r"became (nan|inf) at step \d+\. Lower the learning rate \(1e\+30\)"):
        recycle(upgrade, source, task_file, method, tmp_path / "out", recipe=recipe, options=options)
    assert not list(tmp_path.iterdir())
