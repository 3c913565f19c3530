"""The data of a task: held-out dev, few-shot samples, labels, digests, and warnings about unreliable scores."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers import assert_mentions, make_data, make_rows, make_task, write_table
from hypothesis import given
from hypothesis import strategies as st

from regraft.diagnosis.verdict import verdict
from regraft.errors import DataError, MismatchError, RecipeError
from regraft.methods.target import Target
from regraft.task import Split, chance_score, data_warnings, load_data, read_task, weakness
from regraft.task.types.class_metrics import ACCURACY

if TYPE_CHECKING:
    from pathlib import Path


def test_dev_is_a_tenth_of_each_class_of_train(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", [*make_rows(90, ("a", "a", "b")), {"text": "alone", "label": "c"}])
    data, repeated = read_task(make_task(path)), read_task(make_task(path))
    reseeded = read_task(make_task(path), seed=1)
    assert np.bincount(data.dev.labels).tolist() == [6, 3]  # the only c stays in train
    assert sorted([*data.train.row_numbers, *data.dev.row_numbers]) == list(range(1, 92))
    assert data.digest() == repeated.digest() != reseeded.digest()


def test_test_texts_in_train_are_counted_and_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, dev = (write_table(tmp_path / name, make_rows(10)) for name in ("a.csv", "d.csv"))
    test = write_table(tmp_path / "b.csv", make_rows(2, stem="new") + make_rows(3))
    data = load_data(make_task(train, dev=dev, test=test), seed=0)
    assert data.duplicates == 3
    assert "3 of 5 test examples are also in train (row 3 is row 1 of" in caplog.text
    caplog.clear()
    load_data(make_task(train, dev=dev, test=write_table(tmp_path / "c.csv", make_rows(10, stem="new"))), seed=0)
    assert not caplog.records


# ---- few shots


@given(st.lists(st.integers(0, 2), min_size=12, max_size=40), st.integers(1, 3), st.integers(0, 5))
def test_few_shot_samples_do_not_depend_on_the_order_of_examples(labels: list[int], shots: int, seed: int) -> None:
    data = make_data([0, 0, 0, 1, 1, 1, 2, 2, 2, *labels], dev=[0, 0, 0, 0, 1, 1])
    few_shot_data = data.few_shot(shots, seed)
    assert np.bincount(few_shot_data.train.labels).tolist() == [shots] * 3
    assert np.bincount(few_shot_data.dev.labels).tolist() == [shots, min(shots, 2)]
    permutation = np.random.default_rng(seed).permutation(len(data.train))
    shuffled = dataclasses.replace(data, train=data.train.take(permutation))
    assert shuffled.few_shot(shots, seed).digest() == few_shot_data.digest()
    assert set(few_shot_data.train.texts) <= set(data.few_shot(3, seed).train.texts)


def test_few_shot_samples_depend_on_the_seed_and_leave_test_alone(tmp_path: Path) -> None:
    train, test = write_table(tmp_path / "a.csv", make_rows(60)), write_table(tmp_path / "b.csv", make_rows(20))
    few_shot_data, reseeded = (read_task(make_task(train, test=test, shots=4), seed=seed) for seed in (0, 1))
    assert few_shot_data.test is not None
    assert (len(few_shot_data.train), len(few_shot_data.dev), len(few_shot_data.test)) == (8, 6, 20)
    assert few_shot_data.digest() != reseeded.digest()
    assert few_shot_data.duplicates == sum(texts in few_shot_data.train.texts for texts in few_shot_data.test.texts) > 0


def test_few_shot_names_the_classes_that_have_too_few(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", make_rows(40, ("a", "a", "a", "b")))
    with pytest.raises(DataError) as error:
        read_task(make_task(path, shots=10))
    assert_mentions(error, path, "10 shots", "once dev is held out", "'b' 9", "lower `shots`")
    assert "'a'" not in str(error.value)
    with pytest.raises(RecipeError, match="at least 1"):
        make_data([0, 1, 2]).few_shot(0, seed=0)


# ---- labels and digests


@given(st.lists(st.integers(0, 3), min_size=1), st.permutations("abcd"))
def test_relabelling_is_reversible(labels: list[int], order: list[str]) -> None:
    data = make_data(labels, labels="abcd")
    relabelled = data.relabel(order)
    label_names = [data.labels[i] for i in data.train.labels]
    assert [relabelled.labels[i] for i in relabelled.train.labels] == label_names
    assert relabelled.relabel(data.labels).digest() == data.digest()
    assert (relabelled.digest() == data.digest()) == (order == list("abcd"))


@pytest.mark.parametrize("order", [["a", "b", "x"], ["a", "b"], ["a", "b", "c", "c"]])
def test_relabelling_to_different_labels_lists_the_differences(order: list[str]) -> None:
    with pytest.raises(MismatchError) as error:
        make_data([0, 1, 2]).relabel(order)
    only_task = "none" if "c" in order else "'c'"
    only_head = "'x'" if "x" in order else "none"
    assert_mentions(error, "train.csv", "'t'", f"Only in the task: {only_task}", f"Only in the head: {only_head}")
    assert_mentions(error, f"Expected 3 labels, found {len(order)}", "in `labels`")


@pytest.mark.parametrize(
    ("labels", "head_labels"),
    [
        (("false", "true"), ("True", "False")),
        (("false", "true"), ("TRUE", "FALSE")),
        (("1", "2"), ("2.0", "1.0")),
        (("Negative", "positive"), ("POSITIVE", "NEGATIVE")),
        (("a", "A", "true"), ("A", "True", "a")),
        (("caf\u00e9", "x"), ("x ", "cafe\u0301")),
    ],
)
def test_a_head_may_spell_its_labels_differently(labels: tuple[str, ...], head_labels: tuple[str, ...]) -> None:
    data = make_data([0, 1, 1, *range(len(labels))], [0, 1], labels)
    relabelled = data.relabel(head_labels)
    assert relabelled.labels == head_labels
    for old_class, new_class in zip(data.train.labels, relabelled.train.labels, strict=True):
        assert head_labels[new_class].casefold()[0] == labels[old_class].casefold()[0]
    assert relabelled.relabel(labels).digest() == data.digest()


@pytest.mark.parametrize("head_labels", [("a", "A"), ("a", "b", "B"), ("yes", "no")])
def test_labels_that_match_several_of_the_head_or_none_are_refused(head_labels: tuple[str, ...]) -> None:
    with pytest.raises(MismatchError, match="in `labels`"):
        make_data([0, 1], [0], "ab").relabel(head_labels)


def test_labels_that_look_alike_or_missing_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ("positive", "Positive", "positive ", "posi\u200btive", "caf\u00e9", "cafe\u0301", "N/A", "fine")
    (tmp_path / "a.json").write_text(json.dumps(make_rows(160, labels)))
    with caplog.at_level(logging.WARNING):
        data = load_data(make_task(str(tmp_path / "a.json")), seed=0)
    spelling_warning, accent_warning, missing_warning = data_warnings(data)
    for label in ("'posi\\u200btive'", "'Positive'", "'positive '"):
        assert label in spelling_warning
    assert "'caf\\xe9'" in accent_warning and "'cafe\\u0301'" in accent_warning
    assert "'N/A' looks like a missing value" in missing_warning
    assert [record.getMessage() for record in caplog.records] == data_warnings(data)
    task_with_labels = make_task(str(tmp_path / "a.json"), labels=["positive", "caf\u00e9", "N/A", "fine"])
    with pytest.raises(DataError, match=r"'Positive' is not among .* differs from 'positive' only in case"):
        read_task(task_with_labels)


def test_the_digest_depends_on_the_content_alone_and_stays_as_recorded() -> None:
    data = make_data([0, 1, 2])
    assert data.digest() == "a180bd6cca648023d34fff1bce7c1aea975b63df061405ff7c0b223f2c2fe727"
    train_elsewhere = dataclasses.replace(data.train, source="b", row_numbers=data.dev.row_numbers)
    renamed = dataclasses.replace(data.with_settings(name="renamed"), train=train_elsewhere)
    assert renamed.digest() == data.digest()
    changed_data = [
        dataclasses.replace(data, labels=("a", "b", "x")),
        dataclasses.replace(data, test=data.dev),
        dataclasses.replace(data, dev=data.train),
        data.with_settings(metric="mcc"),
        data.with_settings(max_length=64),
    ]
    assert len({data.digest(), *(changed.digest() for changed in changed_data)}) == 6


def test_chance_is_the_score_of_the_most_frequent_class() -> None:
    data = make_data([2, 2, 0, 1], dev=[2, 0])
    assert data.task.chance_prediction(data.train.targets, data.labels) == 2
    assert chance_score(data, data.dev) == 0.5


def test_examples_are_selected_with_their_texts_labels_and_rows() -> None:
    selected = make_data([2, 2, 0, 1]).train.take([3, 0])
    assert selected.texts == [("train 3",), ("train 0",)]
    assert selected.labels.tolist() == [1, 2]
    assert selected.row_numbers.tolist() == [4, 1]


# ---- splits that cannot tell models apart


def test_tiny_and_single_class_splits_are_warned_about() -> None:
    tiny, single, large = (make_data([0, 1] * 9, dev, "ab") for dev in ([1], [1] * 20, [0, 1] * 10))
    assert "dev has 1 example, too few" in data_warnings(tiny)[0]
    assert "examples of a single class" in data_warnings(single)[0]
    assert data_warnings(large) == []


def test_split_is_importable_from_its_module_of_regraft_0_1() -> None:
    assert importlib.import_module("regraft.task.data").Split is Split


@pytest.mark.parametrize("labels", [[1], [1] * 30])
def test_no_verdict_is_certain_on_a_split_that_cannot_tell_models_apart(labels: list[int]) -> None:
    data = make_data([0, 1] * 9, labels, "ab")
    dev_weakness = weakness(data, data.dev)
    uncertain = verdict(ACCURACY, labels, labels, labels, 0.0, weakness=dev_weakness)
    assert (uncertain.choice, uncertain.sure, uncertain.reasons[-1].name) == ("use as is", 0.0, "examples")
    target = Target(
        ACCURACY, labels, labels, 1.0, 0.5, 1.0, None, tolerance=0.02, confidence=0.9, weakness=dev_weakness
    )
    assert target.measure(labels)["verdict"] == "undecided"
    balanced = [0, 1] * 15
    assert verdict(ACCURACY, balanced, balanced, balanced, 0.5).sure == 1.0
