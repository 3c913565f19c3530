"""The arithmetic on tensors against its identities and numpy."""

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


def tensors(count):
    """Several tensors of one shape."""
    shapes = hnp.array_shapes(max_dims=3, max_side=6)
    arrays = shapes.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=FLOATS)] * count))
    return arrays.map(lambda several: [torch.from_numpy(array) for array in several])


@given(tensors(2), DTYPES)
def test_graft_onto_the_old_base_is_the_tuned_to_the_bit(several, dtype):
    old, tuned = (t.to(dtype) for t in several)
    assert torch.equal(graft(old, tuned, old), tuned)


@given(tensors(2), DTYPES)
def test_what_was_not_tuned_becomes_the_new_base(several, dtype):
    old, new = (t.to(dtype) for t in several)
    assert torch.equal(graft(new, old, old), new)
    assert torch.equal(graft(new, new, old, scale=0.0), new)


@given(tensors(3), DTYPES, st.floats(-2, 2))
def test_graft_is_the_formula_rounded_once(several, dtype, scale):
    new, tuned, old = (t.to(dtype) for t in several)
    n, t, o = (x.to(torch.float64).numpy() for x in (new, tuned, old))
    exact = n + scale * (t - o)
    found = graft(new, tuned, old, scale).to(torch.float64).numpy()
    unit = torch.finfo(dtype).eps / 2 + (torch.finfo(torch.float32).eps if dtype.itemsize == 2 else 0)
    slack = 1e-6 if dtype.itemsize == 2 else 1e-12  # what float32 or float64 lose where large terms cancel
    bound = unit * np.abs(exact) + slack * (np.abs(n) + np.abs(t) + np.abs(o)) + torch.finfo(dtype).smallest_normal
    within = np.abs(found - exact) <= bound
    assert (within | ~np.isfinite(found)).all()


def test_a_bf16_delta_smaller_than_the_weights_rounding_is_not_lost():
    """Over many weights the mean of the delta survives, though each is below half a unit of the new weight."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(100_000, generator=generator).to(torch.bfloat16)
    tuned = (old.float() + 2e-3).to(torch.bfloat16)
    new = torch.randn(100_000, generator=generator)
    found = graft(new, tuned, old)
    wanted = (tuned.double() - old.double()).mean()
    assert found.dtype == torch.bfloat16
    assert abs((found.double() - new.double()).mean() - wanted) < 5e-5


def test_mixed_dtypes_are_computed_wide():
    new, old = torch.tensor([1.0 + 2**-20]), torch.tensor([1.0], dtype=torch.bfloat16)
    tuned = torch.tensor([1.0 + 2**-18])
    assert graft(new, tuned, old).item() == 1.0 + 2**-20 + 2**-18


@given(tensors(3))
def test_distance_is_a_metric(several):
    a, b, c = several
    ab, ba, bc, ac = (distance([pair]).l2 for pair in ((a, b), (b, a), (b, c), (a, c)))
    assert ab == ba
    assert distance([(a, a)]).l2 == 0
    assert ac <= ab + bc + 1e-9 * (ab + bc)
    assert (ab == 0) == torch.equal(a, b)


@given(tensors(2), tensors(2))
def test_distance_is_that_of_one_long_vector(first, second):
    found = distance([tuple(first), tuple(second)])
    a, b = (np.concatenate([first[i].numpy().ravel(), second[i].numpy().ravel()]).astype(np.float64) for i in (0, 1))
    assert found.l2 == pytest.approx(np.linalg.norm(a - b), rel=1e-9)
    assert found.parameters == a.size
    if np.linalg.norm(a) and np.linalg.norm(b):
        assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)
        assert found.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-9)


def test_distance_of_zeros():
    nothing, something = torch.zeros(3), torch.ones(3)
    assert distance([(nothing, nothing)]).cosine == 1
    assert distance([(nothing, nothing)]).relative == 0
    assert distance([(nothing, something)]).cosine == 0
    assert distance([(nothing, something)]).relative == math.inf
