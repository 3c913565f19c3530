"""`project`: the map from outdated to upgraded weights, against maps that are known and dense regressions."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import adapt, move_base, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from regraft import Base, Recipe, Upgrade, load_adaptation, recycle
from regraft.errors import MismatchError, OutcomeError, RecipeError
from regraft.methods import parse_options
from regraft.methods.project import Projection
from regraft.methods.project_distill import _learning_rates
from regraft.weights.project import leave_one_out_errors, project

FEW = Recipe(steps=4, batch_size=8, learning_rate=3e-3, eval_every=2, precision="fp32")
LABELS = ("negative", "positive")


def dense_map(old, new, v, ridge, rank, intercept):
    """Reduced-rank ridge regression with all matrices written out."""
    ones = old.mean(dim=0) if intercept else torch.zeros(old.shape[1]).double()
    shift = new.mean(dim=0) if intercept else torch.zeros(new.shape[1]).double()
    x, y = old - ones, new - shift
    strength = ridge * x.square().sum() / len(x)
    inner = x.T @ x + strength * torch.eye(x.shape[1]).double()
    w = torch.linalg.solve(inner, x.T @ y) if ridge else torch.linalg.pinv(x) @ y
    stacked = torch.cat([x, strength.sqrt() * torch.eye(x.shape[1]).double()]) @ w
    right = torch.linalg.svd(stacked, full_matrices=False).Vh[:rank]
    return (v - ones) @ w @ right.T @ right + shift


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 9), st.floats(0.05, 5), st.integers(1, 7), st.booleans()
)
def test_the_map_is_the_dense_regression(seed, count, size, ridge, rank, intercept):
    torch.manual_seed(seed)
    old, new, v = torch.randn(count, size).double(), torch.randn(count, size).double(), torch.randn(size).double()
    weights = project(old @ old.T, new @ new.T, old @ v, ridge, rank, intercept=intercept)
    expected = dense_map(old, new, v, ridge, rank, intercept)
    torch.testing.assert_close(weights @ new, expected, rtol=1e-6, atol=1e-8)
    if intercept:
        assert abs(float(weights.sum()) - 1) < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.floats(0.1, 3), st.integers(1, 6), st.booleans())
def test_left_out_errors_are_those_of_maps_fitted_without(seed, count, ridge, rank, intercept):
    torch.manual_seed(seed)
    old, new = torch.randn(count, 8).double(), torch.randn(count, 8).double()
    errors = leave_one_out_errors(old @ old.T, new @ new.T, ridge, rank, intercept=intercept)
    for out in range(count):
        rest = [i for i in range(count) if i != out]
        if count == 2 and intercept:
            mapped = new[rest[0]]
        else:
            mapped = dense_map(old[rest], new[rest], old[out], ridge, rank, intercept)
        torch.testing.assert_close(errors[out], (mapped - new[out]).square().sum(), rtol=1e-6, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_a_map_of_low_rank_is_recovered_where_pairs_have_been(seed, rank):
    torch.manual_seed(seed)
    m = torch.randn(12, rank).double() @ torch.randn(rank, 12).double()
    b = torch.randn(12).double()
    old = torch.randn(8, 12).double()
    v = torch.randn(8).double() @ (old - old.mean(dim=0)) + old.mean(dim=0)
    for offset, intercept in ((b, True), (0 * b, False)):
        new = old @ m + offset
        weights = project(old @ old.T, new @ new.T, old @ v, 0.0, rank, intercept=intercept)
        torch.testing.assert_close(weights @ new, v @ m + offset, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_a_strong_ridge_leaves_the_mean_or_nothing(seed, count):
    torch.manual_seed(seed)
    old, new, v = torch.randn(count, 9).double(), torch.randn(count, 9).double(), torch.randn(9).double()
    for intercept, expected in ((True, new.mean(dim=0)), (False, torch.zeros(9).double())):
        weights = project(old @ old.T, new @ new.T, old @ v, 1e12, 16, intercept=intercept)
        torch.testing.assert_close(weights @ new, expected, rtol=0, atol=1e-8)


def vector(path, base):
    """What of an adaptation is mapped, by name, in float64."""
    found = {}
    for name, tensor in weights(path).items():
        inner = name.removeprefix(base.prefix + ".")
        if (path / "adapter_config.json").exists():
            if "classifier" not in name and "score" not in name and "pooler" not in name:
                found[name] = tensor.double()
        elif inner != name and inner in base.body:
            found[name] = tensor.double() - base.checkpoint[base.body[inner]].double()
    return found


def write_new(path, upgrade, target, folder):
    """The same adaptation on the new base, its vector being another one."""
    shutil.copytree(path, folder)
    tensors = weights(path)
    for name, numbers in target.items():
        inner = name.removeprefix(upgrade.new.prefix + ".")
        is_full = not (path / "adapter_config.json").exists()
        start = upgrade.new.checkpoint[upgrade.new.body[inner]].double() if is_full else 0
        tensors[name] = (start + numbers).float()
    file = "model" if is_full else "adapter_model"
    save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
    record = {"base": {"name": upgrade.new.name, "fingerprint": upgrade.new.fingerprint}, "labels": list(LABELS)}
    (folder / "lineage.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def moved(tmp_path_factory, bases):
    """An upgrade that changed every tensor."""
    folder = tmp_path_factory.mktemp("moved")
    upgrades = {}
    for name in ("bert", "llama"):
        new = move_base(bases[name][0], folder / name, 0.05)
        tensors = load_file(new / "model.safetensors")
        torch.manual_seed(0)
        tensors = {n: t + 0.01 * torch.randn_like(t) if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        upgrades[name] = Upgrade(bases[name][0], new)
    return upgrades


CASES = [("bert", "full"), ("bert", "lora"), ("bert", "bottleneck"), ("llama", "full"), ("llama", "lora")]


def make_pairs(upgrade, kind, tmp_path, change, count=3):
    """Pairs whose new vector is a change of the old one."""
    pairs = []
    for seed in range(count):
        old = adapt(upgrade.old, kind, tmp_path / f"old{seed}", 10 + seed)
        new = write_new(old, upgrade, change(vector(old, upgrade.old)), tmp_path / f"new{seed}")
        pairs.append(f"{old}={new}")
    return tuple(pairs)


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_a_constant_change_is_recovered(tmp_path, moved, task_file, architecture, kind):
    upgrade = moved[architecture]
    offsets = {}

    def change(old):
        for name, numbers in old.items():
            offsets.setdefault(name, 0.05 * torch.randn(numbers.shape).double())
        return {name: numbers + offsets[name] for name, numbers in old.items()}

    pairs = make_pairs(upgrade, kind, tmp_path, change)
    path = adapt(upgrade.old, kind, tmp_path / "mine" / "adaptation", 99)
    out = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW, options=Projection(pairs))
    found, wanted = vector(out.path / "adaptation", upgrade.new), change(vector(path, upgrade.old))
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-6)
    before, after = weights(path), weights(out.path / "adaptation")
    heads = before.keys() - wanted.keys()
    assert heads
    assert all(torch.equal(before[name], after[name]) for name in heads)
    notes = out.record.notes
    assert notes["pairs"] == 3
    known = [[load_adaptation(side).fingerprint for side in pair.split("=")] for pair in pairs]
    assert notes["learned_from"] == known
    assert notes["left_out_error"] < 0.01 < notes["direct_error"]
    assert out.record.cost.labels == 0


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_whole_method_is_the_dense_regression(tmp_path, moved, task_file, kind, residual):
    upgrade = moved["bert"]
    torch.manual_seed(1)
    pairs = make_pairs(upgrade, kind, tmp_path, lambda v: {n: t + 0.1 * torch.randn_like(t) for n, t in v.items()}, 4)
    path = adapt(upgrade.old, kind, tmp_path / "mine" / "adaptation", 99)
    options = Projection(pairs, rank=2, residual=residual, ridge=0.3)
    out = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW, options=options)

    def flat(where, base):
        return torch.cat([t.flatten() for _, t in sorted(vector(where, base).items())])

    sides = [pair.split("=") for pair in pairs]
    old = torch.stack([flat(Path(first), upgrade.old) for first, _ in sides])
    new = torch.stack([flat(Path(second), upgrade.new) for _, second in sides])
    v = flat(path, upgrade.old)
    # in coordinates of the span of all, which the dense matrices then fit in
    q = torch.linalg.qr(torch.cat([old, new, v[None]]).T).Q
    target = new - old if residual else new
    expected = dense_map(old @ q, target @ q, v @ q, 0.3, 2, True) @ q.T + (v if residual else 0)
    torch.testing.assert_close(flat(out.path / "adaptation", upgrade.new), expected, rtol=0, atol=1e-5)


def test_a_strong_ridge_without_a_mean_is_direct(tmp_path, moved, task_file):
    upgrade = moved["bert"]
    pairs = make_pairs(upgrade, "lora", tmp_path, lambda v: {n: t + 0.1 for n, t in v.items()})
    path = adapt(upgrade.old, "lora", tmp_path / "mine" / "adaptation", 99)
    options = Projection(pairs, ridge=1e12, intercept=False)
    out = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW, options=options)
    before, after = weights(path), weights(out.path / "adaptation")
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_an_upgrade_that_changed_nothing_gives_the_old_weights(tmp_path, bases, task_file, architecture, kind):
    old = Base.open(bases[architecture][0])
    path = adapt(old, kind, tmp_path / "old" / "adaptation", 2)
    other = adapt(old, kind, tmp_path / "other", 3)
    options = Projection((f"{other}={other}",))
    out = recycle(Upgrade(old, old), path, task_file, "project", tmp_path / "out", recipe=FEW, options=options)
    before, after = weights(path), weights(out.path / "adaptation")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_says_when_the_map_is_worse_than_direct(tmp_path, moved, task_file, caplog):
    upgrade = moved["bert"]
    torch.manual_seed(1)
    noisy = make_pairs(
        upgrade, "lora", tmp_path / "n", lambda v: {n: t + 0.02 * torch.randn_like(t) for n, t in v.items()}
    )
    path = adapt(upgrade.old, "lora", tmp_path / "mine" / "adaptation", 99)
    with caplog.at_level(logging.WARNING):
        out = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW, options=Projection(noisy))
    assert "the map is worse" in caplog.text
    assert out.record.notes["left_out_error"] > out.record.notes["direct_error"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        recycle(upgrade, path, task_file, "project", tmp_path / "two", recipe=FEW, options=Projection(noisy[:2]))
        recycle(upgrade, path, task_file, "project", tmp_path / "one", recipe=FEW, options=Projection(noisy[:1]))
    assert "2 pairs are too few" in caplog.text
    assert "1 pairs are too few" in caplog.text


def test_what_does_not_belong_together_is_refused(tmp_path, moved, task_file):
    upgrade = moved["bert"]
    path = adapt(upgrade.old, "lora", tmp_path / "mine" / "adaptation", 99)
    old, new = adapt(upgrade.old, "lora", tmp_path / "o", 1), adapt(upgrade.new, "lora", tmp_path / "n", 1)
    wide = adapt(upgrade.new, "lora", tmp_path / "wide", 1, rank=4)
    full = adapt(upgrade.old, "full", tmp_path / "full", 1)
    strong = tmp_path / "strong"
    shutil.copytree(new, strong)
    config = json.loads((strong / "adapter_config.json").read_text())
    (strong / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 30}))

    def run(pairs, **more):
        recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW, options=Projection(pairs, **more))

    for pairs, error, told in (
        ((), RecipeError, "pass pairs"),
        ((f"{old}",), RecipeError, "OLD=NEW"),
        ((f"{old}=",), RecipeError, "OLD=NEW"),
        ((f"{old}={old}",), MismatchError, "was not tuned on"),
        ((f"{new}={new}",), MismatchError, "was not tuned on"),
        ((f"{old}={wide}",), MismatchError, "the same shapes"),
        ((f"{full}={new}",), MismatchError, "one kind"),
        ((f"{old}={strong}",), MismatchError, "lora_alpha"),
    ):
        with pytest.raises(error, match=told):
            run(pairs)
        assert not (tmp_path / "out").exists()
    run((f"{old}={new}",))
    with pytest.raises(RecipeError, match="fit=regression"):
        recycle(
            upgrade, full, task_file, "project", tmp_path / "f", recipe=FEW,
            options=Projection((f"{full}={task_file}",), fit="distill"),
        )  # fmt: skip


def test_other_tasks_may_have_other_labels(tmp_path, moved, task_file):
    upgrade = moved["bert"]
    old = adapt(upgrade.old, "lora", tmp_path / "o", 1, labels=("a", "b", "c"))
    new = adapt(upgrade.new, "lora", tmp_path / "n", 1, labels=("a", "b", "c"))
    path = adapt(upgrade.old, "lora", tmp_path / "mine" / "adaptation", 99)
    out = recycle(
        upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW, options=Projection((f"{old}={new}",))
    )
    assert len(weights(out.path / "adaptation")["base_model.model.classifier.weight"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "residual"), [("bert", True), ("bert", False), ("llama", True)])
def test_distilling_the_map_lowers_the_loss_and_begins_at_direct(
    tmp_path, moved, bases, tuned, task_file, architecture, residual
):
    upgrade = Upgrade(bases[architecture][0], move_base(bases[architecture][0], tmp_path / "new", 0.3))
    path = tuned[architecture, "lora"] / "adaptation"
    options = Projection(
        (f"{path}={task_file}",), fit="distill", residual=residual, steps=60, learning_rate=3e-3, rank=4
    )
    out = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW, options=options)
    first, last = out.record.notes["fit_loss"]
    assert last < first
    slow = dataclasses.replace(options, steps=1, learning_rate=1e-9)
    start = recycle(upgrade, path, task_file, "project", tmp_path / "start", recipe=FEW, options=slow)
    before, after = weights(path), weights(start.path / "adaptation")
    apart = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert apart < 1e-6 if residual else apart > 0.01
    direct = recycle(upgrade, path, task_file, "direct", tmp_path / "direct", recipe=FEW)
    if residual:
        assert out.record.scores.test >= direct.record.scores.test


@pytest.mark.parametrize("part", [0, 1, 2])
@given(size=st.integers(50, 5000), rank=st.integers(8, 32), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_step_of_each_part_of_the_map_moves_a_weight_as_far(part, size, rank, scale, seed):
    drawn = torch.Generator().manual_seed(seed)
    v = scale * torch.randn(size, generator=drawn, dtype=torch.float64)
    shapes = ((size, rank), (rank, size), (size,))
    parts = [0.02 * torch.randn(shape, generator=drawn, dtype=torch.float64) for shape in shapes]
    rate = _learning_rates([v], Projection(("a=b",), rank=rank, learning_rate=1e-3))[part]
    moved = [tensor.clone().requires_grad_(number == part) for number, tensor in enumerate(parts)]
    before = v @ parts[0] @ parts[1] + parts[2]
    (v @ moved[0] @ moved[1] + moved[2])[0].backward()  # each moves as this weight of the map's result would have it
    torch.optim.Adam([moved[part]], lr=rate).step()
    after = v @ moved[0] @ moved[1] + moved[2]
    assert 1e-4 < abs(float((after - before).detach()[0])) < 1e-2  # 1e-3 on average, over the signs of few numbers


def test_options_as_they_are_written():
    assert parse_options("project", ["pairs=[a/x=b/x, a/y=b/y]", "rank=4"]) == Projection(("a/x=b/x", "a/y=b/y"), 4)
    assert parse_options("project", ["pairs=a=b"]) == Projection(("a=b",))
    for make in (
        lambda: Projection(fit="guess"),
        lambda: Projection(rank=0),
        lambda: Projection(ridge=-1),
        lambda: Projection(steps=0),
        lambda: Projection(learning_rate=0),
    ):
        with pytest.raises(RecipeError):
            make()
    for given_ridge, rank in ((-1, 1), (1, 0)):
        with pytest.raises(RecipeError):
            project(torch.eye(2), torch.eye(2), torch.ones(2), given_ridge, rank)


def test_distilling_the_map_goes_on_where_it_was_interrupted(tmp_path, bases, tuned, task_file):
    path = tuned["bert", "lora"] / "adaptation"
    given = (Upgrade(*bases["bert"]), path, task_file, "project")
    options = Projection((f"{path}={task_file}",), fit="distill", steps=8, learning_rate=3e-3, rank=2)
    recipe = dataclasses.replace(FEW, save_every=3)
    seen = []

    def progress(stage, done, *_):
        if stage == "map":
            seen.append(done)
            if seen == [1, 2, 3, 4, 5, 6, 7]:
                raise KeyboardInterrupt

    whole = recycle(*given, tmp_path / "whole", recipe=recipe, options=options)
    with pytest.raises(KeyboardInterrupt):
        recycle(*given, tmp_path / "out", recipe=recipe, options=options, progress=progress)
    out = recycle(*given, tmp_path / "out", recipe=recipe, options=options, progress=progress)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 7, 8]
    one, other = weights(whole.path / "adaptation"), weights(out.path / "adaptation")
    assert all(one[name].equal(other[name]) for name in one)
    assert out.record.notes["fit_loss"] == whole.record.notes["fit_loss"]


def test_an_outcome_is_of_the_content_of_its_pairs(tmp_path, bases, tuned, task_file):
    upgrade = Upgrade(*bases["bert"])
    path, old, new = tuned["bert", "lora"] / "adaptation", tmp_path / "old", tmp_path / "new"
    adapt(upgrade.old, "lora", old, rank=8)
    adapt(upgrade.new, "lora", new, seed=3, rank=8)
    given = (upgrade, path, task_file, "project", tmp_path / "out")
    options = Projection((f"{old}={new}",))
    first = recycle(*given, recipe=FEW, options=options)
    assert recycle(*given, recipe=FEW, options=options).record == first.record
    record = json.loads((first.path / "outcome.json").read_text())
    del record["inputs"]["pairs"]  # as regraft 0.1 wrote it
    (first.path / "outcome.json").write_text(json.dumps(record))
    assert recycle(*given, recipe=FEW, options=options).record.inputs == record["inputs"]
    shutil.rmtree(new)
    adapt(upgrade.new, "lora", new, seed=4, rank=8)
    with pytest.raises(OutcomeError, match="inputs differ in pairs"):
        recycle(*given, recipe=FEW, options=options)
