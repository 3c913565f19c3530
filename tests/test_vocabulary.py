"""Rows matched by token, whatever their order, number and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import MismatchError
from regraft.weights import graft, graft_rows, match_rows

tokens = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=20, unique=True)
paddings = st.integers(0, 6)


def numbered(names):
    return {name: i for i, name in enumerate(names)}


@settings(deadline=None)
@given(tokens, tokens, paddings, paddings, st.integers(0, 2**31), st.floats(-1, 2))
def test_each_token_gets_its_own_delta(old_names, new_names, old_padding, new_padding, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    old_rows, new_rows = len(old_names) + old_padding, len(new_names) + new_padding
    old, tuned = (torch.randn(old_rows, 3, generator=generator) for _ in range(2))
    new = torch.randn(new_rows, 3, generator=generator)
    match = match_rows(numbered(old_names), numbered(new_names), old_rows, new_rows)
    found = graft_rows(new, tuned, old, match, scale)
    assert found.shape == new.shape
    for i, name in enumerate(new_names):
        if name in old_names:
            j = old_names.index(name)
            wanted = new[i].double() + scale * (tuned[j].double() - old[j].double())
            torch.testing.assert_close(found[i].double(), wanted, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found[i], new[i])
    for i in range(new_padding):
        row = found[len(new_names) + i]
        if i < old_padding:
            j = len(old_names) + i
            wanted = new[len(new_names) + i].double() + scale * (tuned[j].double() - old[j].double())
            torch.testing.assert_close(row.double(), wanted, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(row, new[len(new_names) + i])
    assert set(match.only_old) == set(old_names) - set(new_names)
    assert set(match.only_new) == set(new_names) - set(old_names)
    assert match.padding == new_padding


@settings(deadline=None)
@given(tokens, paddings, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_the_same_vocabulary_is_a_plain_graft(names, padding, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = len(names) + padding
    new, tuned, old = (torch.randn(rows, 3, generator=generator).to(dtype) for _ in range(3))
    match = match_rows(numbered(names), numbered(names), rows, rows)
    assert match.is_same
    assert torch.equal(graft_rows(new, tuned, old, match), graft(new, tuned, old))
    assert torch.equal(graft_rows(old, tuned, old, match), tuned)


def test_what_is_lost_is_said():
    match = match_rows(numbered(["a", "b", "c"]), numbered(["c", "d"]), 4, 4)
    assert match.old_row == (2, -1, 3, -1)
    assert match.summary() == (
        "4 rows: 1 tokens in both, 1 only in the new vocabulary, 2 only in the old ('a', 'b'), 2 rows of padding"
    )


def test_a_tokenizer_that_is_larger_than_the_weights_is_refused():
    with pytest.raises(
        MismatchError, match="the new vocabulary has token 'b' with id 1, and its embeddings have 1 rows"
    ):
        match_rows(numbered(["a"]), numbered(["a", "b"]), 1, 1)
    match = match_rows(numbered(["a"]), numbered(["a", "b"]), 1, 2)
    with pytest.raises(MismatchError, match="the tensors 2"):
        graft_rows(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1), match)
