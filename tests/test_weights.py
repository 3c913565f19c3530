"""Grafts and distances of tensors, compared with algebraic identities and numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from regraft.weights import distance, graft

FLOATS = st.floats(-1e4, 1e4, width=32)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


def same_shape_tensors(count):
    """Draw several float32 tensors of one shape."""

    def arrays_of_shape(shape):
        return st.tuples(*[hnp.arrays(np.float32, shape, elements=FLOATS)] * count)

    arrays = hnp.array_shapes(max_dims=3, max_side=6).flatmap(arrays_of_shape)
    return arrays.map(lambda tensors: [torch.from_numpy(array) for array in tensors])


@given(same_shape_tensors(2), DTYPES)
def test_graft_onto_the_old_base_equals_the_fine_tune(tensors, dtype):
    old, tuned = (tensor.to(dtype) for tensor in tensors)
    assert torch.equal(graft(old, tuned, old), tuned)


@given(same_shape_tensors(2), DTYPES)
def test_graft_of_a_zero_delta_equals_the_new_base(tensors, dtype):
    old, new = (tensor.to(dtype) for tensor in tensors)
    assert torch.equal(graft(new, old, old), new)
    assert torch.equal(graft(new, new, old, scale=0.0), new)


@given(same_shape_tensors(3), DTYPES, st.floats(-2, 2))
def test_graft_equals_the_formula_rounded_once(tensors, dtype, scale):
    new, tuned, old = (tensor.to(dtype) for tensor in tensors)
    n, t, o = (tensor.to(torch.float64).numpy() for tensor in (new, tuned, old))
    exact = n + scale * (t - o)
    grafted = graft(new, tuned, old, scale).to(torch.float64).numpy()
    unit = torch.finfo(dtype).eps / 2 + (torch.finfo(torch.float32).eps if dtype.itemsize == 2 else 0)
    slack = 1e-6 if dtype.itemsize == 2 else 1e-12  # rounding in float32 or float64 where large terms cancel
    bound = unit * np.abs(exact) + slack * (np.abs(n) + np.abs(t) + np.abs(o)) + torch.finfo(dtype).smallest_normal
    is_within_bound = np.abs(grafted - exact) <= bound
    assert (is_within_bound | ~np.isfinite(grafted)).all()


def test_bf16_delta_below_the_rounding_of_the_weights_survives_on_average():
    """Each delta is below half a unit in the last place of its new weight, but their mean survives."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(100_000, generator=generator).to(torch.bfloat16)
    tuned = (old.float() + 2e-3).to(torch.bfloat16)
    new = torch.randn(100_000, generator=generator)
    grafted = graft(new, tuned, old)
    mean_delta = (tuned.double() - old.double()).mean()
    assert grafted.dtype == torch.bfloat16
    assert abs((grafted.double() - new.double()).mean() - mean_delta) < 5e-5


def test_mixed_dtypes_are_computed_in_float64():
    new = torch.tensor([1.0 + 2**-20])
    tuned = torch.tensor([1.0 + 2**-18])
    old = torch.tensor([1.0], dtype=torch.bfloat16)
    assert graft(new, tuned, old).item() == 1.0 + 2**-20 + 2**-18


@given(same_shape_tensors(3))
def test_distance_is_a_metric(tensors):
    a, b, c = tensors
    ab, ba, bc, ac = (distance([pair]).l2 for pair in ((a, b), (b, a), (b, c), (a, c)))
    assert ab == ba
    assert distance([(a, a)]).l2 == 0
    assert ac <= ab + bc + 1e-9 * (ab + bc)
    assert (ab == 0) == torch.equal(a, b)


@given(same_shape_tensors(2), same_shape_tensors(2))
def test_distance_equals_the_distance_of_the_concatenated_vectors(first_pair, second_pair):
    result = distance([tuple(first_pair), tuple(second_pair)])
    a, b = (
        torch.cat([first.flatten(), second.flatten()]).double().numpy()
        for first, second in zip(first_pair, second_pair, strict=True)
    )
    assert result.l2 == pytest.approx(np.linalg.norm(a - b), rel=1e-9)
    assert result.parameters == a.size
    if np.linalg.norm(a) and np.linalg.norm(b):
        assert result.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)
        assert result.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-9)


def test_cosine_and_relative_distance_are_defined_for_zeros():
    zeros = torch.zeros(3)
    ones = torch.ones(3)
    assert distance([(zeros, zeros)]).cosine == 1
    assert distance([(zeros, zeros)]).relative == 0
    assert distance([(zeros, ones)]).cosine == 0
    assert distance([(zeros, ones)]).relative == math.inf
