"""Multi-label classification and text regression, against second implementations and from end to end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from helpers import BAD, GOOD, NEUTRAL, Rows, assert_mentions, make_adapted_model, run_command, write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, root_mean_squared_error
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.loss.loss_utils import ForSequenceClassificationLoss

import regraft
from regraft import Base, Recipe, Upgrade, check, compare, load_adaptation, recycle, tune
from regraft.adaptation import load_model, save_model
from regraft.adaptation.families.full import Full
from regraft.errors import DataError, MismatchError, RecipeError
from regraft.task import (
    Head,
    MultiLabelClassification,
    Split,
    Task,
    TaskData,
    TextClassification,
    TextRegression,
    agreement,
    chance_score,
    data_warnings,
    find_metric,
    read_task,
    score,
)
from regraft.task.bootstrap import resampled_scores
from regraft.task.types import ModelPredictions, Scatter, Signal, task_types
from regraft.task.types.likelihood import BERNOULLI, Normal
from regraft.task.types.text_regression import MAX_POINTS
from regraft.tuning import fresh_scaled_model

if TYPE_CHECKING:
    from collections.abc import Sequence

LONG = Recipe(steps=120, batch_size=16, learning_rate=5e-3, eval_every=40, save_every=120, precision="fp32")
SHORT = Recipe(steps=4, batch_size=16, learning_rate=1e-3, eval_every=2, save_every=4, precision="fp32")
LABELS = ("bad", "good", "scene")
KEYS = {
    "multi-label-classification": {"label": "topics"},
    "text-regression": {"label": "value", "tolerance": 10},
}


def make_rows(count: int, seed: int, unit: float = 10.0) -> Rows:
    """Build rows with a set of labels and a number, both of which follow from the words."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        good, bad = rng.randint(0, 3), rng.randint(0, 3)
        words = [*rng.choices(NEUTRAL, k=rng.randint(3, 8)), *rng.choices(GOOD, k=good), *rng.choices(BAD, k=bad)]
        rng.shuffle(words)
        presence = (bad > 0, good > 0, "scene" in words)
        topics = [label for label, is_present in zip(LABELS, presence, strict=True) if is_present]
        rows.append({"text": " ".join(words), "topics": topics, "value": unit * (5 + good - bad)})
    return rows


def make_task(type_name: str, train: str | Path = "train.jsonl", **keys: Any) -> Task:
    """Build a task of a type, with other keys of its task file."""
    values = {"name": "t", "type": type_name, "text": "text", **KEYS[type_name], "train": str(train), **keys}
    return Task.from_mapping({key: value for key, value in values.items() if value != "absent"}, "t.yaml")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> dict[str, Task]:
    """A task of each type on the same sentences."""
    folder = tmp_path_factory.mktemp("types")
    files = {
        split: write_table(folder / f"{split}.jsonl", make_rows(count, seed))
        for split, count, seed in (("train", 160, 1), ("dev", 40, 2), ("test", 60, 3))
    }
    return {name: make_task(name, max_length=32, **files) for name in KEYS}


# ---- likelihoods


def test_losses_equal_those_of_transformers() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 4, dtype=torch.float64)
    sets, numbers = torch.randint(0, 2, (7, 4)), torch.randn(7, dtype=torch.float64)
    config = AutoConfig.for_model("bert", num_labels=4, problem_type="multi_label_classification")
    expected = ForSequenceClassificationLoss(sets.double(), logits, config)
    torch.testing.assert_close(BERNOULLI.loss(logits, sets, "mean"), expected)
    torch.testing.assert_close(BERNOULLI.loss(logits, sets).mean(), expected)
    config = AutoConfig.for_model("bert", num_labels=1, problem_type="regression")
    expected = ForSequenceClassificationLoss(numbers[:, None], logits[:, :1], config) / (2 * 3.0**2)
    torch.testing.assert_close(Normal(3.0).loss(logits[:, :1], numbers, "mean"), expected)
    torch.testing.assert_close(Normal(3.0).loss(logits[:, :1], numbers).mean(), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_equal_those_of_torch(temperature: float) -> None:
    torch.manual_seed(1)
    student, teacher = 3 * torch.randn(2, 7, 4, dtype=torch.float64)
    terms = BERNOULLI.divergence_terms(student, Signal(teacher), temperature)
    distributions = (TorchBernoulli(logits=logits / temperature) for logits in (teacher, student))
    torch.testing.assert_close(terms, kl_divergence(*distributions) / 4)
    normal = Normal(3.0)
    student, teacher = student[:, :1], teacher[:, :1]
    terms = normal.divergence_terms(student, Signal(teacher), temperature)
    expected = kl_divergence(TorchNormal(teacher, 3.0), TorchNormal(student, 3.0))  # at any temperature
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(normal.excess_loss(student, Signal(teacher)), expected[:, 0])
    assert (BERNOULLI.gradient_scale(temperature), normal.gradient_scale(temperature)) == (temperature**2, 1)


def test_divergences_of_certain_models_are_finite() -> None:
    logits = torch.tensor([[-1e4, 1e4, 80.0]])
    assert BERNOULLI.divergence_terms(logits, Signal(-logits)).isfinite().all()
    assert BERNOULLI.divergence_terms(logits, Signal(logits)).abs().sum() == 0


def test_the_overlap_of_normals_equals_its_integral() -> None:
    means = torch.tensor([[0.0], [0.5], [4.0], [30.0]], dtype=torch.float64)
    x = torch.linspace(-60, 90, 300_001, dtype=torch.float64)[:, None]
    densities = [TorchNormal(mean[:, 0], 3.0).log_prob(x).exp() for mean in (means, torch.zeros_like(means))]
    expected = torch.trapezoid(torch.minimum(*densities), x, dim=0)
    overlap = Normal(3.0).overlap(means, Signal(torch.zeros_like(means)))
    torch.testing.assert_close(overlap, expected, atol=1e-7, rtol=0)


def test_the_overlap_of_label_sets_is_the_mean_over_labels() -> None:
    logits, other = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, -2.0]])
    distance = float(torch.tensor(2.0).sigmoid() - torch.tensor(-2.0).sigmoid())
    assert float(BERNOULLI.overlap(logits, Signal(other))) == pytest.approx(1 - distance / 2)


def test_predictions_and_confidence() -> None:
    logits = torch.tensor([[3.0, -1.0], [-2.0, -4.0]])
    assert BERNOULLI.predict(logits).tolist() == [[1, 0], [0, 0]]
    expected = logits.abs().sigmoid().prod(dim=1)
    assert torch.equal(BERNOULLI.confidence(logits), expected)
    assert BERNOULLI.right(logits, torch.tensor([[1, 0], [0, 1]])).tolist() == [True, False]
    normal = Normal(1.0, tolerance=0.5)
    assert normal.confidence(logits) is None
    assert normal.right(torch.tensor([[1.0], [1.6]]), torch.tensor([1.5, 1.0])).tolist() == [True, False]
    assert Normal(2.0).chance_loss([1.0, 5.0], 1) == 0.5


# ---- metrics


def compute_concordance(x: np.ndarray, y: np.ndarray) -> float:
    """Return Lin's concordance correlation coefficient as he defines it."""
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    scale = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(2 * covariance / scale) if scale else 1.0


def test_agreement_of_numbers_falls_with_their_scale_and_offset(tmp_path: Path) -> None:
    data = read_rows(tmp_path, "text-regression", make_rows(40, 5))
    numbers = data.train.targets
    assert agreement(data, numbers, numbers) == 1
    assert score("pearson", numbers, 0.6 * numbers + 10) == pytest.approx(1)
    assert agreement(data, numbers, 0.6 * numbers + 10) < 0.9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["continuous", "tied", "large"]))
def test_scores_of_resamples_equal_those_of_scikit_learn_and_scipy(seed: int, numbers_are: str) -> None:
    size, resamples = 25, 6
    rng = np.random.default_rng(seed)
    sets = rng.integers(0, 2, (2, size, 3))
    numbers = rng.normal(size=(2, size)) if numbers_are != "tied" else rng.integers(0, 4, (2, size)).astype(float)
    if numbers_are == "large":
        numbers = 1e6 * numbers + 1e8
    multinomial = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), resamples)
    references = {
        "micro_f1": (sets, lambda a, b: f1_score(a, b, average="micro", zero_division=0.0)),
        "macro_f1": (sets, lambda a, b: f1_score(a, b, average="macro", zero_division=np.nan)),
        "subset_accuracy": (sets, accuracy_score),
        "pearson": (numbers, lambda a, b: pearsonr(a, b).statistic),
        "spearman": (numbers, lambda a, b: spearmanr(a, b).statistic),
        "concordance": (numbers, compute_concordance),
        "rmse": (numbers, root_mean_squared_error),
    }
    for metric, ((targets, predictions), reference) in references.items():
        (scores,) = resampled_scores(metric, targets, [predictions], seed=seed, resamples=resamples)
        for counts, value in zip([np.ones(size, dtype=int), *multinomial], scores, strict=True):
            drawn = np.repeat(np.arange(size), counts)
            expected = reference(targets[drawn], predictions[drawn])
            assert value == pytest.approx(expected, rel=1e-9, abs=1e-9), metric


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_intervals_of_correlations_equal_those_of_scipy(metric: str) -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=80)
    predictions = targets + rng.normal(size=80)
    (scores,) = resampled_scores(metric, targets, [predictions], resamples=4000)
    statistic = {"pearson": pearsonr, "spearman": spearmanr}[metric]
    expected = bootstrap(
        (targets, predictions),
        lambda x, y: statistic(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        confidence_level=0.9,
        method="percentile",
        random_state=np.random.default_rng(1),
    ).confidence_interval
    assert np.quantile(scores[1:], [0.05, 0.95]) == pytest.approx([expected.low, expected.high], abs=0.015)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize("constant", [0.0, 0.3, 1e6 + 0.1])
def test_a_correlation_with_a_constant_is_0(metric: str, constant: float) -> None:
    numbers = [0.1, 0.2, 0.4]
    assert score(metric, numbers, [constant] * 3) == score(metric, [constant] * 3, numbers) == 0
    # some resamples of two different numbers draw only one of them
    (scores,) = resampled_scores(metric, [constant, 1.5], [[1.0, 2.0]], resamples=50)
    assert set(np.round(abs(scores), 9)) == {0.0, 1.0}


@pytest.mark.parametrize("metric", ["pearson", "spearman", "rmse"])
def test_a_score_of_nan_is_nan(metric: str) -> None:
    assert np.isnan(score(metric, [1.0, 2.0, 3.0], [np.nan, 1.0, 2.0]))


def test_scores_of_empty_label_sets_are_0() -> None:
    sets = np.zeros((4, 3), dtype=int)
    assert score("micro_f1", sets, sets) == score("macro_f1", sets, sets) == 0
    assert score("subset_accuracy", sets, sets) == 1


@pytest.mark.parametrize("metric", ["micro_f1", "macro_f1", "subset_accuracy"])
def test_chance_of_label_sets_is_the_best_set_by_the_metric(metric: str) -> None:
    targets = np.random.default_rng(3).binomial(1, [0.1, 0.3, 0.35], size=(40, 3))
    task = make_task("multi-label-classification", metric=metric)
    chance = score(task.scoring, targets, np.array([task.chance_prediction(targets, LABELS)] * 40))
    sets = itertools.product((0, 1), repeat=3)
    assert chance == max(score(task.scoring, targets, np.array([labels] * 40)) for labels in sets)


def test_chance_is_the_best_constant_prediction(tasks) -> None:
    data = read_task(tasks["multi-label-classification"])
    sets = [[int(bit) for bit in f"{code:03b}"] for code in range(8)]
    best = max(score("micro_f1", data.train.targets, [prediction] * len(data.train)) for prediction in sets)
    assert chance_score(data, data.train) == pytest.approx(best)
    data = read_task(tasks["text-regression"])
    assert chance_score(data, data.test) == 0
    assert chance_score(data.with_settings(metric="rmse"), data.train) == pytest.approx(data.train.targets.std())


# ---- reading


def read_rows(folder: Path, type_name: str, rows: Rows, suffix: str = ".jsonl", **keys: Any) -> TaskData:
    """Write rows, and read them as the train split of a task."""
    return read_task(make_task(type_name, write_table(folder / f"train{suffix}", rows), **keys))


@pytest.mark.parametrize(
    ("type_name", "keys", "row", "phrases"),
    [
        ("text-regression", {}, {"value": "high"}, ["row 7", "finite number", "'value'", "'high'"]),
        ("text-regression", {}, {"value": True}, ["row 7", "finite number"]),
        ("text-regression", {}, {"value": None}, ["row 7", "found None"]),
        ("text-regression", {}, {"value": float("nan")}, ["row 7", "finite number"]),
        ("text-regression", {}, {"value": "inf"}, ["row 7", "finite number"]),
        ("text-regression", {}, {"value": "1_000"}, ["row 7", "finite number"]),
        ("text-regression", {}, {"value": 10**400}, ["row 7", "finite number"]),
        ("multi-label-classification", {}, {"topics": "good"}, ["row 7", "list of labels", '["a", "b"]']),
        ("multi-label-classification", {}, {"topics": None}, ["row 7", "list of labels", "found None"]),
        ("multi-label-classification", {}, {"topics": ["good", None]}, ["row 7", "is missing"]),
        ("multi-label-classification", {}, {"topics": [["good"]]}, ["row 7", "not a list"]),
        (
            "multi-label-classification",
            {"labels": ["good", "bad", "scene"]},
            {"topics": ["Good "]},
            ["row 7", "'Good '", "differs from 'good' only in case"],
        ),
        ("multi-label-classification", {"label": ["value", "other"]}, {}, ["row 1", "expected 0 or 1", "'value'"]),
    ],
)
def test_an_invalid_row_is_named(tmp_path: Path, type_name: str, keys: Any, row: Any, phrases: list[str]) -> None:
    rows = [row | {"other": 1} for row in make_rows(12, 5)]
    rows[6] |= row
    with pytest.raises(DataError) as error:
        read_rows(tmp_path, type_name, rows, **keys)
    assert_mentions(error, tmp_path / "train.jsonl", *phrases)


@pytest.mark.parametrize(
    ("type_name", "keys", "phrases"),
    [
        ("text-regression", {"tolerance": 0}, ["'tolerance' is 0", "above 0"]),
        ("text-regression", {"tolerance": "wide"}, ["'tolerance' is 'wide'"]),
        ("text-regression", {"label": "text"}, ["'label' names 'text'"]),
        ("text-regression", {"labels": ["a", "b"]}, ["unknown key 'labels'"]),
        ("text-regression", {"shots": 0}, ["examples in all"]),
        ("text-regression", {"metric": "mse"}, ["pearson, spearman, concordance, rmse"]),
        ("multi-label-classification", {"label": ["a", "a"]}, ["'label' lists 'a' more than once"]),
        ("multi-label-classification", {"label": ["a"]}, ["'label' lists 1 label"]),
        ("multi-label-classification", {"label": ["a", "text"]}, ["'label' names 'text'"]),
        ("multi-label-classification", {"label": ["a", "b"], "labels": ["a", "c"]}, ["'labels' lacks 'b'"]),
        ("multi-label-classification", {"label": None}, ["'labels' is required"]),
        ("multi-label-classification", {"metric": "accuracy"}, ["micro_f1, macro_f1, subset_accuracy"]),
    ],
)
def test_an_invalid_key_is_named(type_name: str, keys: dict[str, Any], phrases: list[str]) -> None:
    with pytest.raises(DataError) as error:
        make_task(type_name, **keys)
    assert_mentions(error, "t.yaml: the key" if "unknown" not in phrases[0] else "t.yaml", *phrases)


def test_a_missing_tolerance_is_suggested(tmp_path: Path) -> None:
    rows = make_rows(100, 5)
    with pytest.raises(DataError) as error:
        read_rows(tmp_path, "text-regression", rows, dev=str(tmp_path / "train.jsonl"), tolerance="absent")
    half = np.std([row["value"] for row in rows]) / 2
    assert_mentions(error, "`tolerance`", f"such as {half:.2g}, half the standard deviation")


def test_train_has_more_than_one_target(tmp_path: Path) -> None:
    rows = [row | {"value": 3, "topics": ["good", "bad"]} for row in make_rows(12, 5)]
    for type_name, phrase in (("text-regression", "the number 3"), ("multi-label-classification", "bad, good")):
        with pytest.raises(DataError) as error:
            read_rows(tmp_path, type_name, rows)
        assert_mentions(error, "every row has", phrase)


@pytest.mark.parametrize("numbers", [[1e9, 1e9 + 1, 1e9 + 2], [1e308, -1e308]], ids=["close", "huge"])
def test_numbers_that_float32_cannot_tell_apart_are_refused(tmp_path: Path, numbers: list[float]) -> None:
    rows = [row | {"value": numbers[index % len(numbers)]} for index, row in enumerate(make_rows(12, 5))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"float32.*'value'.*Subtract their mean"):
            read_rows(tmp_path, "text-regression", rows)


def test_small_numbers_are_shown_with_their_digits(tmp_path: Path) -> None:
    file = write_table(tmp_path / "train.jsonl", make_rows(40, 5, unit=1e-6))
    keys = {"type": "text-regression", "text": "text", "label": "value", "tolerance": 1e-6, "metric": "rmse"}
    (tmp_path / "task.yaml").write_text(json.dumps({"train": file, **keys}))
    printed = run_command("task", "check", tmp_path / "task.yaml")
    assert "median" in printed
    assert printed.count("e-06") + printed.count("e−06") > 5
    assert "0.000" not in printed


def test_numbers_are_read_from_text(tmp_path: Path) -> None:
    rows = make_rows(40, 5)
    expected = read_rows(tmp_path, "text-regression", rows)
    for suffix in (".csv", ".parquet"):
        data = read_rows(tmp_path, "text-regression", rows, suffix)
        assert data.digest() == expected.digest()
    texts = [row | {"value": f" {row['value'] / 10:+.1e}"} for row in rows]
    file = write_table(tmp_path / "texts.csv", texts)
    targets = read_task(make_task("text-regression", file, dev=file)).train.targets
    assert (10 * targets).tolist() == [row["value"] for row in rows]


def test_a_task_with_another_tolerance_is_another_task(tmp_path: Path) -> None:
    digests = {read_rows(tmp_path, "text-regression", make_rows(40, 5), tolerance=size).digest() for size in (1, 2, 2)}
    assert len(digests) == 2


def test_lists_and_columns_of_labels_are_the_same_task(tmp_path: Path) -> None:
    rows = make_rows(40, 5)
    lists = read_rows(tmp_path, "multi-label-classification", rows)
    assert lists.labels == LABELS
    for suffix, absent, present in ((".jsonl", 0, 1), (".csv", "false", "True"), (".csv", 0.0, 1.0)):
        columns = [
            {"text": row["text"], **{label: present if label in row["topics"] else absent for label in LABELS}}
            for row in rows
        ]
        data = read_rows(tmp_path, "multi-label-classification", columns, suffix, label=list(LABELS))
        assert data.digest() == lists.digest()
    in_json = [row | {"topics": json.dumps(row["topics"])} for row in rows]
    for suffix, same in ((".parquet", rows), (".csv", in_json)):
        assert read_rows(tmp_path, "multi-label-classification", same, suffix).digest() == lists.digest()


def test_class_names_of_a_data_set_are_the_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    rows = [
        {"text": row["text"], "topics": [LABELS.index(label) for label in row["topics"]]} for row in make_rows(40, 5)
    ]
    features = Features({"text": Value("string"), "topics": List(ClassLabel(names=[*LABELS, "unused"]))})
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    source = {"dataset": str(tmp_path / "set"), "split": "train"}
    values = {"name": "t", "type": "multi-label-classification", "train": source, "text": "text", "label": "topics"}
    data = read_task(Task.from_mapping(values, "t.yaml"))
    assert data.labels == (*LABELS, "unused")
    described = {data.train.inputs[i][0]: data.task.describe(data.train.targets[i], data.labels) for i in range(3)}
    names_by_text = {row["text"]: ", ".join(sorted(LABELS[index] for index in row["topics"])) for row in rows}
    assert described == {text: names_by_text[text] or "(no label)" for text in described}
    assert data.train.targets[:, 3].sum() == 0


def test_task_check_shows_large_errors_in_their_unit(tmp_path: Path) -> None:
    file = write_table(tmp_path / "train.jsonl", make_rows(40, 5, unit=1e4))
    (tmp_path / "t.yaml").write_text(
        f"type: text-regression\ntrain: {file}\ndev: {file}\ntext: text\nlabel: value\ntolerance: 1000\nmetric: rmse\n"
    )
    targets = read_task(Task.load(tmp_path / "t.yaml")).train.targets
    printed = run_command("task", "check", tmp_path / "t.yaml")
    assert f"{targets.std():,.0f}" in printed
    assert "Numbers in train" in printed


def test_labels_without_examples_and_in_any_order(tmp_path: Path) -> None:
    rows = make_rows(40, 5)
    data = read_rows(tmp_path, "multi-label-classification", rows, labels=["scene", "rare", "good", "bad"])
    relabelled = data.relabel(["bad", "good", "RARE", "scene"])
    assert (relabelled.train.targets == data.train.targets[:, [3, 2, 1, 0]]).all()
    assert relabelled.train.targets[:, 2].sum() == 0
    sorted_data = read_rows(tmp_path, "multi-label-classification", rows)
    for split, other in ((relabelled.train, sorted_data.train), (relabelled.dev, sorted_data.dev)):
        assert (split.targets[:, [0, 1, 3]] == other.targets).all()


def test_lookalike_labels_are_warned_of(tmp_path: Path) -> None:
    rows = make_rows(40, 5)
    rows[3]["topics"] = ["Good", "n/a"]
    warnings_of_data = data_warnings(read_rows(tmp_path, "multi-label-classification", rows))
    assert any("'Good' and 'good' look alike" in warning for warning in warnings_of_data)
    assert any("'n/a' looks like a missing value" in warning for warning in warnings_of_data)


# ---- samples and views


def test_shots_of_a_regression_are_in_all_and_cover_the_quantiles(tasks) -> None:
    data = read_task(tasks["text-regression"])
    few, fewer = data.few_shot(16, 3), data.few_shot(8, 3)
    assert (len(few.train), len(few.dev), len(fewer.train)) == (16, 16, 8)
    assert set(fewer.train.row_numbers) < set(few.train.row_numbers)
    strata, names = data.task.strata(data.train.targets, ())
    row_strata = dict(zip(data.train.row_numbers.tolist(), strata.tolist(), strict=True))
    counts = np.bincount([row_strata[row] for row in few.train.row_numbers.tolist()], minlength=len(names))
    assert counts.max() - counts.min() <= 1
    with pytest.raises(DataError, match="train has fewer"):
        data.few_shot(161, 3)
    assert len(data.few_shot(160, 3).train) == 160


def test_shots_of_label_sets_include_every_label(tasks) -> None:
    data = read_task(tasks["multi-label-classification"])
    few = data.few_shot(4, 3)
    assert len(few.train) <= 4 * (len(LABELS) + 1)
    assert (few.train.targets.sum(axis=0) >= 4).all()


def test_a_dev_split_is_held_out(tmp_path: Path) -> None:
    for type_name in KEYS:
        data = read_rows(tmp_path, type_name, make_rows(100, 5))
        assert len(data.train) + len(data.dev) == 100
        assert 8 <= len(data.dev) <= 13


def make_predictions(task: Task, split: Split, predictions: list[Any]) -> ModelPredictions:
    confidence = [0.8] * len(split) if isinstance(task, MultiLabelClassification) else None
    return ModelPredictions(predictions, confidence, task.right(split.targets, predictions))


def test_views_of_label_sets(tasks) -> None:
    data = read_task(tasks["multi-label-classification"])
    exact = make_predictions(data.task, data.test, data.test.targets.tolist())
    empty = make_predictions(data.task, data.test, [[0, 0, 0]] * len(data.test))
    table, calibration = data.task.comparison_views(data.test.targets, exact, empty, data.labels)
    bad = data.test.targets[:, 0].sum()
    assert table.rows[0] == ("bad", bad, 1.0, 0.0, -1.0, bad, 0)
    assert isinstance(calibration, Scatter)
    by_label, by_size = data.task.example_views(data.train, data.labels)
    counts = data.train.targets.sum(axis=0)
    assert {row[0]: row[1] for row in by_label.rows} == dict(zip(LABELS, counts.tolist(), strict=True))
    assert sum(row[1] for row in by_size.rows) == len(data.train)


def test_views_of_numbers(tasks) -> None:
    task = tasks["text-regression"]
    count = MAX_POINTS + 500
    targets = np.linspace(0, 100, count)
    split = Split("test", "test.csv", [("a",)] * count, targets, np.arange(count))
    exact = make_predictions(task, split, targets.tolist())
    shifted = make_predictions(task, split, (targets + 20).tolist())
    (chart,) = task.comparison_views(targets, exact, shifted, ())
    assert chart.table.rows == (("old", 0.0, 0.0, 1.0), ("new", pytest.approx(20), pytest.approx(20), 0.0))
    assert all(len(series.x) == MAX_POINTS for series in chart.series)
    assert np.subtract(chart.series[1].y, chart.series[1].x) == pytest.approx(20)
    assert "1,000 of 1,500 examples" in chart.lead
    (table,) = task.example_views(split, ())
    assert dict(table.rows)["median"] == pytest.approx(50)


@pytest.mark.parametrize("type_name", KEYS)
def test_a_linear_probe_learns_the_targets(tasks, type_name: str) -> None:
    data = read_task(tasks[type_name])
    words = sorted({word for texts in data.train.inputs for word in texts[0].split()})
    train, test = (
        np.array([[texts[0].split().count(word) for word in words] for texts in split.inputs], dtype=np.float32)
        for split in (data.train, data.test)
    )
    targets = data.train.targets.copy()
    if type_name == "multi-label-classification":
        targets = np.concatenate([targets, np.zeros_like(targets[:, :1]), np.ones_like(targets[:, :1])], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictions = data.task.linear_probe().fit(5 * train, targets).predict(5 * test).tolist()
    if type_name == "multi-label-classification":  # of the last two labels, no example and every example has one
        assert all(prediction[3:] == [0, 1] for prediction in predictions)
        predictions = [prediction[:3] for prediction in predictions]
    assert data.task.scoring.gain(score(data.task.scoring, data.test.targets, predictions), 0.8) > 0


# ---- the whole way


@pytest.mark.slow
@pytest.mark.parametrize("type_name", KEYS)
@pytest.mark.parametrize(
    ("architecture", "kind"), [("bert", "full"), ("bert", "lora"), ("llama", "bottleneck"), ("llama", "prefix")]
)
def test_a_task_type_goes_the_whole_way(bases, tasks, tmp_path: Path, type_name, architecture, kind) -> None:
    old, new = bases[architecture]
    task, upgrade = tasks[type_name], Upgrade(old, new)
    tuned = tune(old, task, tmp_path / "tuned", kind=kind, recipe=LONG)
    assert load_adaptation(tuned.path).task_type == type_name
    assert task.scoring.gain(tuned.scores["test"], tuned.scores["test_majority"]) > 0.03 or kind == "prefix"
    diagnosis = check(upgrade, tuned.path, task, recipe=SHORT)
    assert diagnosis.agreement > 0.9
    methods = ["direct", "init+distill", *(["ridge"] if kind != "prefix" else [])]
    comparison = compare(upgrade, tuned.path, task, methods, tmp_path / "compared", recipe=SHORT)
    assert all(np.isfinite(row.test) for row in comparison.rows)
    label_free = recycle(upgrade, tuned.path, task, "label-free", tmp_path / "free", recipe=SHORT)
    assert label_free.record.cost.labels == 0
    other = next(task for name, task in tasks.items() if name != type_name)
    with pytest.raises(MismatchError, match=type_name):
        check(upgrade, tuned.path, other, recipe=SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("unit", [10.0, 1e6])
def test_transformers_predicts_in_the_unit_of_the_targets(bases, tmp_path: Path, unit: float) -> None:
    train, test = (
        write_table(tmp_path / f"{name}.jsonl", make_rows(count, seed, unit))
        for name, count, seed in (("train", 160, 1), ("test", 60, 3))
    )
    task = make_task("text-regression", train, test=test, tolerance=unit, metric="rmse", max_length=32)
    outcome = tune(bases["bert"][0], task, tmp_path / "tuned", recipe=LONG)
    model = AutoModelForSequenceClassification.from_pretrained(outcome.path / "adaptation").eval()
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)
    tokenizer = AutoTokenizer.from_pretrained(outcome.path / "adaptation")
    with torch.no_grad():
        outputs = [
            model(**tokenizer(text, return_tensors="pt")).logits.item() for (text,) in read_task(task).test.inputs[:10]
        ]
    assert outputs == pytest.approx(outcome.predictions("test")[:10], rel=1e-4)
    assert outcome.scores["test"] < outcome.scores["test_majority"] / 2
    assert np.isfinite(
        recycle(Upgrade(*bases["bert"]), outcome.path, task, "init", tmp_path / "out", recipe=SHORT).scores["test"]
    )
    with pytest.raises(RecipeError, match="copy or fresh"):
        recycle(Upgrade(*bases["bert"]), outcome.path, task, "direct", tmp_path / "resized", head="resize")


@pytest.mark.slow
def test_unlabelled_examples_are_recycled(bases, tasks, tmp_path: Path) -> None:
    for type_name, task in tasks.items():
        tuned = tune(bases["bert"][0], task, tmp_path / type_name, recipe=SHORT)
        keys = {"label": None, "labels": LABELS} if type_name == "multi-label-classification" else {"label": None}
        unlabelled = task.model_copy(update=keys)
        outcome = recycle(
            Upgrade(*bases["bert"]), tuned.path, unlabelled, "label-free", tmp_path / f"{type_name}-out", recipe=SHORT
        )
        assert outcome.record.cost.labels == 0


@pytest.mark.slow
def test_an_upgrade_of_a_multi_label_head_by_label_names(bases, tasks, tmp_path: Path) -> None:
    task = tasks["multi-label-classification"]
    tuned = tune(bases["bert"][0], task, tmp_path / "tuned", recipe=SHORT)
    turned = task.model_copy(update={"labels": ("scene", "good", "bad")})
    outcomes = [
        recycle(Upgrade(*bases["bert"]), tuned.path, each, "direct", tmp_path / f"out{index}")
        for index, each in enumerate((task, turned))
    ]
    assert outcomes[0].scores == outcomes[1].scores


def test_types_are_exported() -> None:
    for task_type in task_types().values():
        assert getattr(regraft, task_type.__name__) is getattr(regraft.task, task_type.__name__) is task_type


@pytest.mark.parametrize(
    ("config", "types"),
    [
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, ["TextRegression"]),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, ["TextRegression"]),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
            ["TextClassification"],
        ),
        ({"architectures": ["BertForTokenClassification"], "id2label": {"0": "O"}}, ["TokenClassification"]),
        ({"architectures": 5, "num_labels": 1}, []),
    ],
)
def test_a_config_without_a_problem_type_has_that_of_transformers(config: dict[str, Any], types: list[str]) -> None:
    assert [task_type.__name__ for task_type in Full().matching_task_types(config)] == types


def test_another_tolerance_is_another_task(tasks) -> None:
    """Else a repeated command would return an outcome whose right answers are those of the old tolerance."""
    data = read_task(tasks["text-regression"])
    assert data.with_settings(tolerance=20.0).digest() != data.digest() == data.with_settings(tolerance=10.0).digest()


@pytest.mark.parametrize(("architecture", "has_bias"), [("bert", True), ("llama", False)])
def test_a_fresh_head_begins_at_the_frequencies_of_the_labels(opened_bases, architecture, has_bias):
    targets = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
    split = Split("train", "train.csv", [("good",)] * 4, targets, np.arange(1, 5))
    values = {
        "type": "multi-label-classification",
        "name": "t",
        "train": "train.csv",
        "text": "text",
        "label": "labels",
    }
    data = TaskData(Task.from_mapping(values, "task"), ("a", "b"), split, split, None, 0)
    base = opened_bases[architecture][0]
    head, untuned_head = (
        fresh_scaled_model(base, each, 3).state_dict() for each in (data, dataclasses.replace(data, labelled=False))
    )
    different = [name for name in head if not torch.equal(head[name], untuned_head[name])]
    assert different == (["classifier.bias"] if has_bias else [])
    if has_bias:
        torch.testing.assert_close(head["classifier.bias"], torch.tensor([3.5 / 1.5, 1.5 / 3.5]).log())


# ---- what a type may define otherwise


class Boundaries(TextClassification):
    """A type whose outputs are the boundaries between its ordered labels."""

    type: Literal["boundaries"] = "boundaries"  # type: ignore[assignment]

    @classmethod
    def head_settings(cls, labels: Sequence[str]) -> dict[str, Any]:
        """Describe one output less than there are labels."""
        return super().head_settings([f"{lower}|{upper}" for lower, upper in itertools.pairwise(labels)])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_outputs_may_differ_from_labels_in_number_and_names(bases, tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setitem(task_types(), "boundaries", Boundaries)
    base, head = Base.open(bases["bert"][0]), Head(Boundaries, ("low", "middle", "high"))
    assert str(head) == "2 outputs for 3 labels (low, middle, high)"
    folder = tmp_path / "adaptation"
    folder.mkdir()
    model, start = make_adapted_model(base, kind, head)
    save_model(model, base, head, folder, start)
    adaptation = load_adaptation(folder)
    assert adaptation.labels == head.labels
    assert load_model(adaptation, base, head).config.num_labels == 2
    if kind == "lora":
        run_command("weights", "merge-lora", "--base", base.path, "--adaptation", folder, "--out", tmp_path / "merged")
        folder = tmp_path / "merged"
    settings = json.loads((folder / "config.json").read_text())
    assert settings["id2label"] == {"0": "low|middle", "1": "middle|high"}


def test_agreement_is_a_share_if_its_metric_is_an_error(tasks, monkeypatch) -> None:
    data = read_task(tasks["text-regression"])
    old, new = [0.0, 50.0, 100.0, 80.0], [0.0, 55.0, 100.0, 20.0]  # the tolerance is 10
    assert agreement(data, old, new) == score("concordance", old, new)
    monkeypatch.setattr(TextRegression, "agreement_metric", find_metric("rmse"))
    assert agreement(data, old, new) == 0.75
