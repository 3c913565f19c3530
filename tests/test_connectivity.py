"""The loss between tuned models: known barriers, exact ends, planes, refusals, and what it costs."""

import copy
import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from conftest import HEAD, LABELS, adapt, write_base
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from regraft import Base, load_adaptation
from regraft.adaptation import load_model
from regraft.diagnosis.blend import Blend, tensors_of
from regraft.diagnosis.connectivity import barrier, segment
from regraft.diagnosis.plane import plane, shares_at
from regraft.errors import DataError, MismatchError, RecipeError
from regraft.model import encode, predict
from regraft.task import load_data, score

NUMBERS = st.floats(-100, 100, allow_nan=False)
CURVES = st.lists(NUMBERS, min_size=2, max_size=20)


@pytest.fixture(scope="module")
def data(task_file):
    return load_data(task_file, 20).relabel(LABELS)


@pytest.fixture(scope="module")
def pair(opened, tmp_path_factory):
    """Two full fine-tunes of a BERT, apart in every tensor."""
    folder = tmp_path_factory.mktemp("pair")
    old, new = opened["bert"]
    return load(adapt(old, "full", folder / "a"), old), load(adapt(new, "full", folder / "b", seed=3), new)


def load(path, base):
    return load_model(load_adaptation(path), base, HEAD)


def places(count):
    return [i / (count - 1) for i in range(count)]


class Point(torch.nn.Module):
    """A model that is nothing but a place."""

    def __init__(self, *place):
        super().__init__()
        self.place = torch.nn.Parameter(torch.tensor(place, dtype=torch.float64))


def walked(loss, *ends, points=11):
    blend, found = Blend(ends, ["a", "b"]), []
    for mu in places(points):
        blend.at(mu)
        found.append(float(loss(blend.model.place.detach())))
    return barrier(places(points), found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(0.1, 5))
def test_a_quadratic_has_its_known_barrier(ends, curvature):
    """−k/2·‖x‖² rises between two points by k/8 of their squared distance; k/2·‖x‖² not at all."""
    a, b = Point(*ends[:2]), Point(*ends[2:])
    apart = float((a.place - b.place).detach().square().sum())
    assert walked(lambda x: -curvature / 2 * x @ x, a, b) == pytest.approx(curvature / 8 * apart, abs=1e-9)
    assert walked(lambda x: curvature / 2 * x @ x, a, b) == pytest.approx(0, abs=1e-9)
    assert walked(lambda x: x @ x, a, a) == 0


def test_a_double_well_has_its_known_barrier():
    def well(x):
        return (x[0] ** 2 - 1) ** 2 + x[1] ** 2

    assert walked(well, Point(-1.0, 0.0), Point(1.0, 0.0)) == 1
    assert walked(well, Point(1.0, -1.0), Point(1.0, 1.0)) == 0


@settings(max_examples=100, deadline=None)
@given(CURVES, NUMBERS, NUMBERS)
def test_a_barrier_is_not_negative_and_blind_to_slopes(losses, start, slope):
    mu = np.array(places(len(losses)))
    height = barrier(mu, losses)
    assert height >= 0 and (len(losses) > 2 or height == 0)
    assert barrier(mu, np.array(losses) + start + slope * mu) == pytest.approx(height, abs=1e-9)
    assert barrier(mu, start + slope * mu) == pytest.approx(0, abs=1e-9)
    assert barrier(mu, sorted(losses)[0] + slope**2 * (mu - 0.3) ** 2) == pytest.approx(0, abs=1e-8)  # convex
    assert height >= max(losses) - max(losses[0], losses[-1]) - 1e-9


def test_a_barrier_of_what_is_no_curve():
    assert barrier([0, 0.5, 1], [1, math.nan, 1]) == math.inf
    for mu, losses in (([0, 1], [1, 2, 3]), ([0], [1]), ([0, 0, 1], [1, 2, 3]), ([1, 0], [1, 2])):
        with pytest.raises(RecipeError, match="ascending places"):
            barrier(mu, losses)


@pytest.mark.parametrize("kind", ["full", "lora", "bottleneck", "prefix"])
def test_the_ends_are_exactly_the_models(opened, tmp_path, texts, kind):
    old, new = opened["bert"]
    ends = load(adapt(old, kind, tmp_path / "a"), old), load(adapt(new, kind, tmp_path / "b", seed=3), new)
    before = [{n: t.clone() for n, t in tensors_of(end).items()} for end in ends]
    blend = Blend(ends, ["old", "new"])
    for mu in (0.3, 1, 0.7, 0, 0.5):
        blend.at(mu)
        if mu in (0, 1):
            assert all(t.equal(before[mu][n]) for n, t in tensors_of(blend.model).items())
            found = predict(blend.model, texts["bert"], "fp32")
            assert found.equal(predict(ends[mu], texts["bert"], "fp32"))
        for name, tensor in tensors_of(blend.model).items():
            if tensor.is_floating_point():
                expected = torch.lerp(before[0][name], before[1][name], mu)
                torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    for end, tensors in zip(ends, before, strict=True):
        assert all(tensor.equal(tensors[name]) for name, tensor in tensors_of(end).items())


def test_losses_and_scores_are_those_of_models_made_by_hand(pair, opened, data):
    base, told = opened["bert"][0], []
    found = segment(*pair, base, data, points=3, ends=("here", "there"), progress=lambda *given: told.append(given))
    assert found.ends == ("here", "there") and found.mu == (0, 0.5, 1)
    middle = copy.deepcopy(pair[0])
    with torch.no_grad():
        for name, parameter in middle.named_parameters():
            parameter.copy_((parameter + dict(pair[1].named_parameters())[name]) / 2)
    for split in (data.dev, data.test):
        labels = torch.as_tensor(split.labels)
        losses = []
        for at, model in enumerate((pair[0], middle, pair[1])):
            logits = predict(model, encode(base, data, split), "fp32")
            losses.append(float(functional.cross_entropy(logits, labels)))
            assert found.loss[split.name][at] == pytest.approx(losses[-1], abs=1e-5)
            assert found.score[split.name][at] == score(data.metric, labels, logits.argmax(dim=1))
        expected = max(0, losses[1] - (losses[0] + losses[2]) / 2)
        assert found.barrier[split.name] == pytest.approx(expected, abs=1e-5)
    assert [given[:3] for given in told] == [("connectivity", done, 3) for done in (1, 2, 3)]
    assert told[1][3] == {f"{name} loss": pytest.approx(found.loss[name][1]) for name in ("dev", "test")}


def test_a_model_is_connected_with_itself(pair, opened, data):
    found = segment(pair[0], pair[0], opened["bert"][0], dataclasses.replace(data, test=None), points=4)
    assert found.connected and found.barrier == {"dev": 0} and len(set(found.loss["dev"])) == 1


def test_a_ridge_between_two_models_is_seen(opened, tuned, data):
    """The same function with the signs of its pooler turned: both ends are as good, nothing is left between."""
    base = opened["bert"][0]
    first = load(tuned["bert", "full"], base)
    second = copy.deepcopy(first)
    with torch.no_grad():  # tanh(−x) = −tanh(x)
        for parameter in (*second.bert.pooler.parameters(), second.classifier.weight):
            parameter.neg_()
    found = segment(first, second, base, data)
    for name in ("dev", "test"):
        assert found.loss[name][0] == pytest.approx(found.loss[name][-1], abs=1e-6)
        assert found.score[name][0] == found.score[name][-1] > 0.9 > found.score[name][5]
        assert found.barrier[name] == pytest.approx(found.loss[name][5] - found.loss[name][0], abs=1e-3)
    assert not found.connected
    assert segment(first, load(tuned["bert", "full"], base), base, data).connected


def test_tunings_of_one_base_are_connected(opened, tuned, data, tmp_path):
    """What was tuned on the old base, as it is and on the upgrade: full and LoRA."""
    old, new = opened["llama"]
    first = load(tuned["llama", "lora"], old)
    found = segment(first, load(tuned["llama", "lora"], new), old, data, points=5)
    assert found.connected and min(found.score["test"]) > 0.9 and len(set(found.loss["test"])) == 5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=3, max_size=3))
def test_a_plane_goes_through_its_three_models(points):
    """Coordinates are distances, and each model's place leads to exactly that model."""
    from regraft.diagnosis.plane import _places

    a, b, c = (torch.tensor(point, dtype=torch.float64) for point in points)
    u, v = b - a, c - a
    assume(u.norm() > 0.1 and (v - (v @ u) / (u @ u) * u).norm() > 0.1)
    models = [Point(*point) for point in points]
    found = _places(models, ["a", "b", "c"])
    blend = Blend(models, ["a", "b", "c"])
    for place, model in zip(found, models, strict=True):
        blend.at(*shares_at(*place, found))
        torch.testing.assert_close(blend.model.place, model.place, rtol=0, atol=1e-9)
    v = v - (v @ u) / (u @ u) * u
    for x, y in ((0.3, -1.2), (2.0, 0.7)):
        blend.at(*shares_at(x, y, found))
        expected = a + x * u / u.norm() + y * v / v.norm()
        torch.testing.assert_close(blend.model.place.detach(), expected, rtol=0, atol=1e-8)


def test_a_plane_of_losses(pair, opened, data, tmp_path):
    base, told = opened["bert"][0], []
    third = load(adapt(base, "full", tmp_path / "c", seed=9), base)
    models = (*pair, third)
    found = plane(models, ("a", "b", "c"), base, data, size=3, margin=0, progress=lambda *g: told.append(g[:3]))
    assert found.names == ("a", "b", "c") and found.split == "test" and told[-1] == ("plane", 9, 9)
    assert np.array(found.loss).shape == np.array(found.score).shape == (3, 3)
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert math.dist(found.places[i], found.places[j]) == pytest.approx(float((flat[i] - flat[j]).norm()), rel=1e-5)
    assert found.y == pytest.approx((0, found.places[2][1] / 2, found.places[2][1]))
    assert found.x[0] == min(0, found.places[2][0]) and found.x[-1] == max(found.places[1][0], found.places[2][0])
    ends = [segment(one, one, base, data, points=3).loss["test"][0] for one in pair]
    corners = {x: found.loss[0][i] for i, x in enumerate(found.x)}
    for place, loss in zip(found.places, ends, strict=False):
        if place[0] in corners:  # c may lie beyond them
            assert corners[place[0]] == pytest.approx(loss, abs=1e-5)
    wide = plane(models, ("a", "b", "c"), base, dataclasses.replace(data, test=None), size=2, margin=0.5)
    assert wide.split == "dev" and wide.y == pytest.approx((-found.places[2][1] / 2, found.places[2][1] * 1.5))


def test_three_models_on_a_line_span_no_plane(pair, opened, data):
    blend = Blend(pair, ["a", "b"])
    blend.at(0.5)
    base = opened["bert"][0]
    for models in ((*pair, blend.model), (*pair, pair[0]), (pair[0], pair[0], pair[1])):
        with pytest.raises(MismatchError, match="a, b, c lie on one line"):
            plane(models, ("a", "b", "c"), base, data, size=2)


def test_what_has_no_line_between_is_refused(pair, opened, data, tmp_path):
    base = opened["bert"][0]
    lora = load(adapt(base, "lora", tmp_path / "lora"), base)
    with pytest.raises(MismatchError, match=r"only the old deployment has tensor .*convert … --to full"):
        segment(lora, pair[0], base, data)
    wider = load(adapt(base, "lora", tmp_path / "wider", rank=4), base)
    with pytest.raises(MismatchError, match=r"lora_A.* \(3, 32\) in the old .* \(4, 32\) in the new .*--to full"):
        segment(lora, wider, base, data)
    other = copy.deepcopy(pair[0])
    other.bert.embeddings.position_ids += 1
    with pytest.raises(MismatchError, match=r"position_ids' holds whole numbers"):
        segment(pair[0], other, base, data)
    with pytest.raises(DataError, match="no labels"):
        segment(*pair, base, dataclasses.replace(data, labelled=False))
    with pytest.raises(RecipeError, match="3 points or more, found 2"):
        segment(*pair, base, data, points=2)
    with pytest.raises(MismatchError, match="2 outputs, task 'mood' 3 labels"):
        segment(*pair, base, dataclasses.replace(data, labels=(*data.labels, "mixed")))
    with pytest.raises(RecipeError, match=r"found 3 models, 9, 0\.2 and 'train'"):
        plane((*pair, other), ("a", "b", "c"), base, data, split="train")


@pytest.mark.slow
def test_eleven_points_cost_no_more_than_eleven_evaluations(tmp_path, task_file):
    """In seconds of this process, so that whatever else runs here plays no part."""
    base = Base.open(
        write_base(
            tmp_path / "base", hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768
        )
    )
    first, second = (load(adapt(base, "full", tmp_path / str(seed), seed=seed), base) for seed in (2, 3))
    data = load_data(task_file, 20).relabel(LABELS)
    data = dataclasses.replace(data, test=dataclasses.replace(data.train, name="test"))

    def plain():
        for examples in [encode(base, data, split) for split in (data.dev, data.test)] * 11:
            logits = predict(first, examples, "fp32")
            functional.cross_entropy(logits, torch.as_tensor(examples.targets))
            score(data.metric, examples.targets, logits.argmax(dim=1))

    def spent(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    spent(plain)
    pairs = [(spent(plain), spent(lambda: segment(first, second, base, data))) for _ in range(2)]
    evaluated, walked = (min(side) for side in zip(*pairs, strict=True))
    assert walked <= 1.1 * evaluated, f"{walked:.2f} s against {evaluated:.2f} s ({walked / evaluated:.3f})"
