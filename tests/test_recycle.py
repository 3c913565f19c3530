"""Recycling, end to end, on tiny bases of every architecture."""

import pytest

from regraft import load_outcome

CELLS = [(a, k) for a in ("bert", "roberta", "distilbert", "llama") for k in ("full", "lora")]


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_tuning_learns_the_task(tuned, architecture, kind):
    outcome = load_outcome(tuned[architecture, kind])
    assert outcome.scores["test"] > 0.8
    assert outcome.curve[0]["step"] == 0
    assert [point["step"] for point in outcome.curve] == [0, 20, 40, 60]
