"""The loss between tuned models: known barriers, exact ends, planes, refusals, and cost."""

import copy
import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from helpers import LABELS, load_tuned_model, write_adaptation, write_base
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from regraft import Base
from regraft.diagnosis.blend import Blend, named_tensors
from regraft.diagnosis.connectivity import barrier, segment
from regraft.diagnosis.plane import blend_coefficients, plane
from regraft.errors import DataError, MismatchError, RecipeError
from regraft.model import encode, predict
from regraft.task import load_data, score

NUMBERS = st.floats(-100, 100, allow_nan=False)
CURVES = st.lists(NUMBERS, min_size=2, max_size=20)


@pytest.fixture(scope="module")
def pair(opened_bases, tmp_path_factory):
    """Two full fine-tunes of a BERT that differ in every tensor."""
    folder = tmp_path_factory.mktemp("pair")
    old, new = opened_bases["bert"]
    first = load_tuned_model(write_adaptation(old, "full", folder / "a"), old)
    second = load_tuned_model(write_adaptation(new, "full", folder / "b", seed=3), new)
    return first, second


def make_unit_grid(num_points):
    return [i / (num_points - 1) for i in range(num_points)]


class VectorModel(torch.nn.Module):
    """A model whose only parameter is one vector."""

    def __init__(self, *vector):
        super().__init__()
        self.vector = torch.nn.Parameter(torch.tensor(vector, dtype=torch.float64))


def compute_barrier(loss, first, second, points=11):
    blend = Blend((first, second), ["a", "b"])
    losses = []
    for mu in make_unit_grid(points):
        blend.set_coefficients(mu)
        losses.append(float(loss(blend.model.vector.detach())))
    return barrier(make_unit_grid(points), losses)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(0.1, 5))
def test_barrier_of_a_quadratic_equals_its_closed_form(coordinates, curvature):
    """−k/2·‖x‖² rises between two points by k/8 of their squared distance; k/2·‖x‖² does not rise."""
    a, b = VectorModel(*coordinates[:2]), VectorModel(*coordinates[2:])
    expected = curvature / 8 * float((a.vector - b.vector).detach().square().sum())
    assert compute_barrier(lambda x: -curvature / 2 * x @ x, a, b) == pytest.approx(expected, abs=1e-9)
    assert compute_barrier(lambda x: curvature / 2 * x @ x, a, b) == pytest.approx(0, abs=1e-9)
    assert compute_barrier(lambda x: x @ x, a, a) == 0


def test_barrier_of_a_double_well_is_its_height():
    def double_well(x):
        return (x[0] ** 2 - 1) ** 2 + x[1] ** 2

    assert compute_barrier(double_well, VectorModel(-1.0, 0.0), VectorModel(1.0, 0.0)) == 1
    assert compute_barrier(double_well, VectorModel(1.0, -1.0), VectorModel(1.0, 1.0)) == 0


@settings(max_examples=100, deadline=None)
@given(CURVES, NUMBERS, NUMBERS)
def test_a_barrier_is_not_negative_and_ignores_linear_terms(losses, offset, slope):
    mu = np.array(make_unit_grid(len(losses)))
    height = barrier(mu, losses)
    assert height >= 0 and (len(losses) > 2 or height == 0)
    assert barrier(mu, np.array(losses) + offset + slope * mu) == pytest.approx(height, abs=1e-9)
    assert barrier(mu, offset + slope * mu) == pytest.approx(0, abs=1e-9)
    convex_losses = min(losses) + slope**2 * (mu - 0.3) ** 2
    assert barrier(mu, convex_losses) == pytest.approx(0, abs=1e-8)
    assert height >= max(losses) - max(losses[0], losses[-1]) - 1e-9


def test_a_barrier_needs_finite_losses_at_ascending_positions():
    assert barrier([0, 0.5, 1], [1, math.nan, 1]) == math.inf
    for mu, losses in (([0, 1], [1, 2, 3]), ([0], [1]), ([0, 0, 1], [1, 2, 3]), ([1, 0], [1, 2])):
        with pytest.raises(RecipeError, match="ascending positions"):
            barrier(mu, losses)


@pytest.mark.parametrize("kind", ["full", "lora", "bottleneck", "prefix"])
def test_the_ends_equal_the_models_exactly(opened_bases, tmp_path, encoded_dev, kind):
    old, new = opened_bases["bert"]
    models = (
        load_tuned_model(write_adaptation(old, kind, tmp_path / "a"), old),
        load_tuned_model(write_adaptation(new, kind, tmp_path / "b", seed=3), new),
    )
    copies = [{name: tensor.clone() for name, tensor in named_tensors(model).items()} for model in models]
    blend = Blend(models, ["old", "new"])
    for mu in (0.3, 1, 0.7, 0, 0.5):
        blend.set_coefficients(mu)
        if mu in (0, 1):
            assert all(tensor.equal(copies[mu][name]) for name, tensor in named_tensors(blend.model).items())
            logits = predict(blend.model, encoded_dev["bert"], "fp32")
            assert logits.equal(predict(models[mu], encoded_dev["bert"], "fp32"))
        for name, tensor in named_tensors(blend.model).items():
            if tensor.is_floating_point():
                expected = torch.lerp(copies[0][name], copies[1][name], mu)
                torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    for model, tensors in zip(models, copies, strict=True):
        assert all(tensor.equal(tensors[name]) for name, tensor in named_tensors(model).items())


def test_losses_and_scores_match_models_averaged_by_hand(pair, opened_bases, data):
    base = opened_bases["bert"][0]
    updates = []
    result = segment(*pair, base, data, points=3, ends=("a", "b"), progress=lambda *update: updates.append(update))
    assert result.ends == ("a", "b") and result.mu == (0, 0.5, 1)
    middle = copy.deepcopy(pair[0])
    with torch.no_grad():
        for name, parameter in middle.named_parameters():
            parameter.copy_((parameter + dict(pair[1].named_parameters())[name]) / 2)
    for split in (data.dev, data.test):
        labels = torch.as_tensor(split.labels)
        losses = []
        for point, model in enumerate((pair[0], middle, pair[1])):
            logits = predict(model, encode(base, data, split), "fp32")
            losses.append(float(functional.cross_entropy(logits, labels)))
            assert result.loss[split.name][point] == pytest.approx(losses[-1], abs=1e-5)
            assert result.score[split.name][point] == score(data.metric, labels, logits.argmax(dim=1))
        expected = max(0, losses[1] - (losses[0] + losses[2]) / 2)
        assert result.barrier[split.name] == pytest.approx(expected, abs=1e-5)
    assert [update[:3] for update in updates] == [("connectivity", point, 3) for point in (1, 2, 3)]
    assert updates[1][3] == {f"{name} loss": pytest.approx(result.loss[name][1]) for name in ("dev", "test")}


def test_a_model_is_connected_with_itself(pair, opened_bases, data):
    result = segment(pair[0], pair[0], opened_bases["bert"][0], dataclasses.replace(data, test=None), points=4)
    assert result.connected and result.barrier == {"dev": 0} and len(set(result.loss["dev"])) == 1


def test_a_barrier_between_two_models_is_measured(opened_bases, tuned_outcomes, data):
    """Flipping the pooler's signs leaves a model's outputs, but the mean of both models is useless."""
    base = opened_bases["bert"][0]
    first = load_tuned_model(tuned_outcomes["bert", "full"], base)
    second = copy.deepcopy(first)
    with torch.no_grad():  # tanh(−x) = −tanh(x)
        for parameter in (*second.bert.pooler.parameters(), second.classifier.weight):
            parameter.neg_()
    result = segment(first, second, base, data)
    for name in ("dev", "test"):
        assert result.loss[name][0] == pytest.approx(result.loss[name][-1], abs=1e-6)
        assert result.score[name][0] == result.score[name][-1] > 0.9 > result.score[name][5]
        assert result.barrier[name] == pytest.approx(result.loss[name][5] - result.loss[name][0], abs=1e-3)
    assert not result.connected
    assert segment(first, load_tuned_model(tuned_outcomes["bert", "full"], base), base, data).connected


def test_an_adapter_is_connected_across_an_upgrade(opened_bases, tuned_outcomes, data):
    """One LoRA, without further tuning, on the old base and on the new base."""
    old, new = opened_bases["llama"]
    first = load_tuned_model(tuned_outcomes["llama", "lora"], old)
    result = segment(first, load_tuned_model(tuned_outcomes["llama", "lora"], new), old, data, points=5)
    assert result.connected and min(result.score["test"]) > 0.9 and len(set(result.loss["test"])) == 5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=3, max_size=3))
def test_a_plane_goes_through_its_three_models(points):
    """Coordinates are distances, and each model's coordinates lead to the model."""
    from regraft.diagnosis.plane import _corners

    a, b, c = (torch.tensor(point, dtype=torch.float64) for point in points)
    u, v = b - a, c - a
    assume(u.norm() > 0.1 and (v - (v @ u) / (u @ u) * u).norm() > 0.1)
    models = [VectorModel(*point) for point in points]
    corners = _corners(models, ["a", "b", "c"])
    blend = Blend(models, ["a", "b", "c"])
    for corner, model in zip(corners, models, strict=True):
        blend.set_coefficients(*blend_coefficients(*corner, corners))
        torch.testing.assert_close(blend.model.vector, model.vector, rtol=0, atol=1e-9)
    v = v - (v @ u) / (u @ u) * u
    for x, y in ((0.3, -1.2), (2.0, 0.7)):
        blend.set_coefficients(*blend_coefficients(x, y, corners))
        expected = a + x * u / u.norm() + y * v / v.norm()
        torch.testing.assert_close(blend.model.vector.detach(), expected, rtol=0, atol=1e-8)


def test_a_plane_has_the_distances_and_losses_of_its_models(pair, opened_bases, data, tmp_path):
    base = opened_bases["bert"][0]
    updates = []
    third = load_tuned_model(write_adaptation(base, "full", tmp_path / "c", seed=9), base)
    models = (*pair, third)
    result = plane(
        models, ("a", "b", "c"), base, data, size=3, margin=0, progress=lambda *update: updates.append(update[:3])
    )
    assert result.names == ("a", "b", "c") and result.split == "test" and updates[-1] == ("plane", 9, 9)
    assert np.array(result.loss).shape == np.array(result.score).shape == (3, 3)
    vectors = [torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) for model in models]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = float((vectors[i] - vectors[j]).norm())
        assert math.dist(result.places[i], result.places[j]) == pytest.approx(expected, rel=1e-5)
    _, (b_x, _), (c_x, c_y) = result.places
    assert result.y == pytest.approx((0, c_y / 2, c_y))
    assert result.x[0] == min(0, c_x) and result.x[-1] == max(b_x, c_x)
    loss_on_x_axis = dict(zip(result.x, result.loss[0], strict=True))
    for model, x in zip(pair, (0, b_x), strict=True):
        if x in loss_on_x_axis:  # the grid starts or ends at c instead if c lies beyond a or b
            expected = segment(model, model, base, data, points=3).loss["test"][0]
            assert loss_on_x_axis[x] == pytest.approx(expected, abs=1e-5)
    wide = plane(models, ("a", "b", "c"), base, dataclasses.replace(data, test=None), size=2, margin=0.5)
    assert wide.split == "dev" and wide.y == pytest.approx((-c_y / 2, c_y * 1.5))


def test_three_models_on_a_line_span_no_plane(pair, opened_bases, data):
    blend = Blend(pair, ["a", "b"])
    blend.set_coefficients(0.5)
    base = opened_bases["bert"][0]
    for models in ((*pair, blend.model), (*pair, pair[0]), (pair[0], pair[0], pair[1])):
        with pytest.raises(MismatchError, match="a, b, c lie on one line"):
            plane(models, ("a", "b", "c"), base, data, size=2)


def test_models_that_cannot_be_interpolated_are_refused(pair, opened_bases, data, tmp_path):
    base = opened_bases["bert"][0]
    lora = load_tuned_model(write_adaptation(base, "lora", tmp_path / "lora"), base)
    with pytest.raises(MismatchError, match=r"only the old deployment has tensor .*convert … --to full"):
        segment(lora, pair[0], base, data)
    wider = load_tuned_model(write_adaptation(base, "lora", tmp_path / "wider", rank=4), base)
    with pytest.raises(MismatchError, match=r"lora_A.* \(3, 32\) in the old .* \(4, 32\) in the new .*--to full"):
        segment(lora, wider, base, data)
    shifted = copy.deepcopy(pair[0])
    shifted.bert.embeddings.position_ids += 1
    with pytest.raises(MismatchError, match=r"position_ids' holds integers"):
        segment(pair[0], shifted, base, data)
    with pytest.raises(DataError, match="no labels"):
        segment(*pair, base, dataclasses.replace(data, labelled=False))
    with pytest.raises(RecipeError, match="3 points or more, found 2"):
        segment(*pair, base, data, points=2)
    with pytest.raises(MismatchError, match="2 outputs, task 'mood' 3 labels"):
        segment(*pair, base, dataclasses.replace(data, labels=(*data.labels, "mixed")))
    with pytest.raises(RecipeError, match=r"found 3 models, 9, 0\.2 and 'train'"):
        plane((*pair, shifted), ("a", "b", "c"), base, data, split="train")


@pytest.mark.slow
def test_eleven_points_cost_no_more_than_eleven_evaluations(tmp_path, task_file):
    """CPU seconds of this process do not count the work of other processes."""
    base = Base.open(
        write_base(
            tmp_path / "base", hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768
        )
    )
    first, second = (
        load_tuned_model(write_adaptation(base, "full", tmp_path / str(seed), seed=seed), base) for seed in (2, 3)
    )
    data = load_data(task_file, 20).relabel(LABELS)
    data = dataclasses.replace(data, test=dataclasses.replace(data.train, name="test"))

    def evaluate():
        for examples in [encode(base, data, split) for split in (data.dev, data.test)] * 11:
            logits = predict(first, examples, "fp32")
            functional.cross_entropy(logits, torch.as_tensor(examples.targets))
            score(data.metric, examples.targets, logits.argmax(dim=1))

    def measure_cpu_seconds(function):
        start = time.process_time()
        function()
        return time.process_time() - start

    evaluate()  # warms up
    evaluation_times = []
    segment_times = []
    for _ in range(2):
        evaluation_times.append(measure_cpu_seconds(evaluate))
        segment_times.append(measure_cpu_seconds(lambda: segment(first, second, base, data)))
    expected, measured = min(evaluation_times), min(segment_times)
    assert measured <= 1.1 * expected, f"{measured:.2f} s against {expected:.2f} s ({measured / expected:.3f})"
