"""Scores of predictions, and the flips between two models' predictions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import DataError, MismatchError, RecipeError
from regraft.task import Flips, flips, score


@pytest.mark.parametrize(
    ("metric", "labels", "predictions", "expected"),
    [
        ("accuracy", [0, 0, 1, 1, 2], [0, 1, 1, 1, 0], 3 / 5),
        ("macro_f1", [0, 0, 1, 1, 2], [0, 1, 1, 1, 0], (0.5 + 0.8 + 0) / 3),
        ("macro_f1", [0, 0], [0, 3], (2 / 3 + 0) / 2),
        ("mcc", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 1 / 6),
        ("mcc", [0, 1], [1, 1], 0.0),
        ("mcc", [0, 0], [0, 0], 0.0),
        ("accuracy", list(range(40)), list(range(40)), 1.0),  # many classes: no warning
        ("macro_f1", list(range(40)), list(range(40)), 1.0),
        ("mcc", list(range(40)), list(range(40)), 1.0),
    ],
)
def test_scores_equal_values_computed_by_hand(
    metric: str, labels: list[int], predictions: list[int], expected: float
) -> None:
    assert score(metric, labels, np.array(predictions)) == pytest.approx(expected)


def test_no_examples_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(MismatchError, match="2 targets, 1 predictions"):
        score("accuracy", [0, 1], [0])
    with pytest.raises(MismatchError, match="1 targets, 1 before, 2 after"):
        flips([0], [0], [0, 1])
    with pytest.raises(DataError, match="no examples to score"):
        score("accuracy", [], [])
    with pytest.raises(RecipeError, match=r"macro_f1, .*accuracy, mcc"):
        score("f1", [0], [0])


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3)))
def test_flips_account_for_the_change_in_accuracy(rows: list[tuple[int, int, int]]) -> None:
    labels, before, after = (np.array([row[i] for row in rows], dtype=int) for i in range(3))
    counted, reverse = flips(labels, before, after), flips(labels, after, before)
    assert counted.positive - counted.negative == (after == labels).sum() - (before == labels).sum()
    assert (reverse.positive, reverse.negative) == (counted.negative, counted.positive)
    assert counted.negative_rate + counted.positive_rate <= 1


def test_flips_equal_counts_by_hand() -> None:
    counted = flips([0, 0, 1, 1], [0, 0, 1, 0], [0, 1, 0, 1])
    assert counted == Flips(negative=2, positive=1, total=4)
    assert (counted.negative_rate, counted.positive_rate) == (0.5, 0.25)
    assert Flips(0, 0, 0).negative_rate == 0
