"""`project`: the map from outdated to upgraded weights, compared with known maps and with dense regressions."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    FEW_STEPS,
    LABELS,
    find_weights,
    have_equal_tensors,
    is_peft,
    read_weights,
    write_adaptation,
    write_upgrade,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from regraft import Base, Upgrade, load_adaptation, recycle
from regraft.errors import MismatchError, OutcomeError, RecipeError
from regraft.methods import parse_options
from regraft.methods.project import Projection
from regraft.methods.project_distill import _learning_rates
from regraft.weights.project import leave_one_out_errors, project

PARAMETRIZE_KINDS = pytest.mark.parametrize(
    ("architecture", "kind"),
    [("bert", "full"), ("bert", "lora"), ("bert", "bottleneck"), ("llama", "full"), ("llama", "lora")],
)


def apply_dense_map(old, new, v, ridge, rank, intercept):
    """Reduced-rank ridge regression with all matrices written out."""
    old_mean = old.mean(dim=0) if intercept else torch.zeros(old.shape[1]).double()
    new_mean = new.mean(dim=0) if intercept else torch.zeros(new.shape[1]).double()
    x, y = old - old_mean, new - new_mean
    strength = ridge * x.square().sum() / len(x)
    identity = torch.eye(x.shape[1]).double()
    w = torch.linalg.solve(x.T @ x + strength * identity, x.T @ y) if ridge else torch.linalg.pinv(x) @ y
    fitted = torch.cat([x, strength.sqrt() * identity]) @ w
    right_vectors = torch.linalg.svd(fitted, full_matrices=False).Vh[:rank]
    return (v - old_mean) @ w @ right_vectors.T @ right_vectors + new_mean


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 9), st.floats(0.05, 5), st.integers(1, 7), st.booleans()
)
def test_the_map_equals_the_dense_regression(seed, num_pairs, size, ridge, rank, intercept):
    torch.manual_seed(seed)
    old, new = torch.randn(num_pairs, size).double(), torch.randn(num_pairs, size).double()
    v = torch.randn(size).double()
    pair_weights = project(old @ old.T, new @ new.T, old @ v, ridge, rank, intercept=intercept)
    expected = apply_dense_map(old, new, v, ridge, rank, intercept)
    torch.testing.assert_close(pair_weights @ new, expected, rtol=1e-6, atol=1e-8)
    if intercept:
        assert abs(float(pair_weights.sum()) - 1) < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.floats(0.1, 3), st.integers(1, 6), st.booleans())
def test_leave_one_out_errors_equal_those_of_refitted_maps(seed, num_pairs, ridge, rank, intercept):
    torch.manual_seed(seed)
    old, new = torch.randn(num_pairs, 8).double(), torch.randn(num_pairs, 8).double()
    errors = leave_one_out_errors(old @ old.T, new @ new.T, ridge, rank, intercept=intercept)
    for omitted in range(num_pairs):
        fitted = [i for i in range(num_pairs) if i != omitted]
        if num_pairs == 2 and intercept:  # a single centred pair is 0, so the map is the intercept
            mapped = new[fitted[0]]
        else:
            mapped = apply_dense_map(old[fitted], new[fitted], old[omitted], ridge, rank, intercept)
        expected = (mapped - new[omitted]).square().sum()
        torch.testing.assert_close(errors[omitted], expected, rtol=1e-6, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_a_map_of_low_rank_is_recovered_in_the_span_of_the_pairs(seed, rank):
    torch.manual_seed(seed)
    matrix = torch.randn(12, rank).double() @ torch.randn(rank, 12).double()
    bias = torch.randn(12).double()
    old = torch.randn(8, 12).double()
    v = torch.randn(8).double() @ (old - old.mean(dim=0)) + old.mean(dim=0)
    for offset, intercept in ((bias, True), (0 * bias, False)):
        new = old @ matrix + offset
        pair_weights = project(old @ old.T, new @ new.T, old @ v, 0.0, rank, intercept=intercept)
        torch.testing.assert_close(pair_weights @ new, v @ matrix + offset, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_a_strong_ridge_shrinks_the_map_to_its_intercept(seed, num_pairs):
    torch.manual_seed(seed)
    old, new = torch.randn(num_pairs, 9).double(), torch.randn(num_pairs, 9).double()
    v = torch.randn(9).double()
    for intercept, expected in ((True, new.mean(dim=0)), (False, torch.zeros(9).double())):
        pair_weights = project(old @ old.T, new @ new.T, old @ v, 1e12, 16, intercept=intercept)
        torch.testing.assert_close(pair_weights @ new, expected, rtol=0, atol=1e-8)


def read_vector(path, base):
    """The tensors of an adaptation that the map covers, in float64: a LoRA's factors, or a full fine-tune's deltas."""
    vector = {}
    for name, tensor in read_weights(path).items():
        body_name = name.removeprefix(base.prefix + ".")
        if is_peft(path):
            if "classifier" not in name and "score" not in name and "pooler" not in name:
                vector[name] = tensor.double()
        elif body_name != name and body_name in base.body:
            vector[name] = tensor.double() - base.checkpoint[base.body[body_name]].double()
    return vector


def write_upgraded(path, upgrade, vector, folder):
    """Write a copy of an adaptation for the new base with the tensors of another vector."""
    shutil.copytree(path, folder)
    tensors = read_weights(path)
    for name, values in vector.items():
        body_name = name.removeprefix(upgrade.new.prefix + ".")
        base_values = 0 if is_peft(path) else upgrade.new.checkpoint[upgrade.new.body[body_name]].double()
        tensors[name] = (base_values + values).float()
    save_file(tensors, find_weights(folder), metadata={"format": "pt"})
    record = {"base": {"name": upgrade.new.name, "fingerprint": upgrade.new.fingerprint}, "labels": list(LABELS)}
    (folder / "lineage.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def upgrades(tmp_path_factory, bases):
    """Upgrades that changed every tensor, by architecture."""
    folder = tmp_path_factory.mktemp("upgrades")
    upgrades = {}
    for name in ("bert", "llama"):
        new = write_upgrade(bases[name][0], folder / name, 0.05)
        tensors = load_file(new / "model.safetensors")
        torch.manual_seed(0)
        tensors = {n: t + 0.01 * torch.randn_like(t) if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        upgrades[name] = Upgrade(bases[name][0], new)
    return upgrades


def write_pairs(upgrade, kind, tmp_path, transform, count=3):
    """Write pairs of adaptations of which the new one has the transformed vector of the old one."""
    pairs = []
    for seed in range(count):
        old = write_adaptation(upgrade.old, kind, tmp_path / f"old{seed}", 10 + seed)
        vector = transform(read_vector(old, upgrade.old))
        new = write_upgraded(old, upgrade, vector, tmp_path / f"new{seed}")
        pairs.append(f"{old}={new}")
    return tuple(pairs)


def make_noise_transform(scale):
    """A transform of vectors that adds Gaussian noise."""
    return lambda vector: {name: t + scale * torch.randn_like(t) for name, t in vector.items()}


@PARAMETRIZE_KINDS
def test_a_constant_change_is_recovered(tmp_path, upgrades, task_file, architecture, kind):
    upgrade = upgrades[architecture]
    offsets = {}

    def add_offsets(vector):
        for name, values in vector.items():
            offsets.setdefault(name, 0.05 * torch.randn(values.shape).double())
        return {name: values + offsets[name] for name, values in vector.items()}

    pairs = write_pairs(upgrade, kind, tmp_path, add_offsets)
    path = write_adaptation(upgrade.old, kind, tmp_path / "source" / "adaptation", 99)
    options = Projection(pairs)
    outcome = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW_STEPS, options=options)
    mapped = read_vector(outcome.path / "adaptation", upgrade.new)
    expected = add_offsets(read_vector(path, upgrade.old))
    assert mapped.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(mapped[name], expected[name], rtol=0, atol=2e-6)
    before, after = read_weights(path), read_weights(outcome.path / "adaptation")
    head_names = before.keys() - expected.keys()
    assert head_names
    assert all(torch.equal(before[name], after[name]) for name in head_names)
    notes = outcome.record.notes
    assert notes["pairs"] == 3
    assert notes["learned_from"] == [[load_adaptation(p).fingerprint for p in pair.split("=")] for pair in pairs]
    assert notes["left_out_error"] < 0.01 < notes["direct_error"]
    assert outcome.record.cost.labels == 0


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("residual", [True, False])
def test_a_recycled_adaptation_equals_the_dense_regression(tmp_path, upgrades, task_file, kind, residual):
    upgrade = upgrades["bert"]
    torch.manual_seed(1)
    pairs = write_pairs(upgrade, kind, tmp_path, make_noise_transform(0.1), 4)
    path = write_adaptation(upgrade.old, kind, tmp_path / "source" / "adaptation", 99)
    options = Projection(pairs, rank=2, residual=residual, ridge=0.3)
    outcome = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW_STEPS, options=options)

    def read_flat(path, base):
        return torch.cat([tensor.flatten() for _, tensor in sorted(read_vector(path, base).items())])

    paths = [pair.split("=") for pair in pairs]
    old = torch.stack([read_flat(Path(old_path), upgrade.old) for old_path, _ in paths])
    new = torch.stack([read_flat(Path(new_path), upgrade.new) for _, new_path in paths])
    v = read_flat(path, upgrade.old)
    # In coordinates of the span of all vectors, the dense matrices fit into memory.
    q = torch.linalg.qr(torch.cat([old, new, v[None]]).T).Q
    target = new - old if residual else new
    expected = apply_dense_map(old @ q, target @ q, v @ q, 0.3, 2, True) @ q.T + (v if residual else 0)
    torch.testing.assert_close(read_flat(outcome.path / "adaptation", upgrade.new), expected, rtol=0, atol=1e-5)


def test_a_strong_ridge_without_an_intercept_equals_direct(tmp_path, upgrades, task_file):
    upgrade = upgrades["bert"]
    pairs = write_pairs(
        upgrade, "lora", tmp_path, lambda vector: {name: values + 0.1 for name, values in vector.items()}
    )
    path = write_adaptation(upgrade.old, "lora", tmp_path / "source" / "adaptation", 99)
    options = Projection(pairs, ridge=1e12, intercept=False)
    outcome = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW_STEPS, options=options)
    before, after = read_weights(path), read_weights(outcome.path / "adaptation")
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)


@PARAMETRIZE_KINDS
def test_project_reproduces_the_old_weights_on_an_equal_base(tmp_path, bases, task_file, architecture, kind):
    base = Base.open(bases[architecture][0])
    path = write_adaptation(base, kind, tmp_path / "old" / "adaptation", 2)
    pair_path = write_adaptation(base, kind, tmp_path / "pair", 3)
    upgrade, options = Upgrade(base, base), Projection((f"{pair_path}={pair_path}",))
    outcome = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW_STEPS, options=options)
    before, after = read_weights(path), read_weights(outcome.path / "adaptation")
    assert have_equal_tensors(before, after)


def test_a_map_that_is_worse_than_direct_is_warned_about(tmp_path, upgrades, task_file, caplog):
    upgrade = upgrades["bert"]
    torch.manual_seed(1)
    pairs = write_pairs(upgrade, "lora", tmp_path / "pairs", make_noise_transform(0.02))
    path = write_adaptation(upgrade.old, "lora", tmp_path / "source" / "adaptation", 99)

    def run(name, pairs):
        options = Projection(pairs)
        return recycle(upgrade, path, task_file, "project", tmp_path / name, recipe=FEW_STEPS, options=options)

    with caplog.at_level(logging.WARNING):
        outcome = run("three-pairs", pairs)
    assert "the map is worse" in caplog.text
    assert outcome.record.notes["left_out_error"] > outcome.record.notes["direct_error"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run("two-pairs", pairs[:2])
        run("one-pair", pairs[:1])
    assert "2 pairs are too few" in caplog.text
    assert "1 pair is too few" in caplog.text


def test_mismatched_pairs_are_refused(tmp_path, upgrades, task_file):
    upgrade = upgrades["bert"]
    out = tmp_path / "out"
    path = write_adaptation(upgrade.old, "lora", tmp_path / "source" / "adaptation", 99)
    old, new = (
        write_adaptation(upgrade.old, "lora", tmp_path / "old", 1),
        write_adaptation(upgrade.new, "lora", tmp_path / "new", 1),
    )
    new_of_higher_rank = write_adaptation(upgrade.new, "lora", tmp_path / "rank", 1, rank=4)
    old_full = write_adaptation(upgrade.old, "full", tmp_path / "full", 1)
    new_of_higher_alpha = tmp_path / "alpha"
    shutil.copytree(new, new_of_higher_alpha)
    config = json.loads((new_of_higher_alpha / "adapter_config.json").read_text())
    (new_of_higher_alpha / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 30}))
    for pairs, error, message in (
        ((), RecipeError, "pass pairs"),
        ((f"{old}",), RecipeError, "OLD=NEW"),
        ((f"{old}=",), RecipeError, "OLD=NEW"),
        ((f"{old}={old}",), MismatchError, "was not tuned on"),
        ((f"{new}={new}",), MismatchError, "was not tuned on"),
        ((f"{old}={new_of_higher_rank}",), MismatchError, "same shapes"),
        ((f"{old_full}={new}",), MismatchError, "a single kind"),
        ((f"{old}={new_of_higher_alpha}",), MismatchError, "lora_alpha"),
    ):
        with pytest.raises(error, match=message):
            recycle(upgrade, path, task_file, "project", out, recipe=FEW_STEPS, options=Projection(pairs))
        assert not out.exists()
    recycle(upgrade, path, task_file, "project", out, recipe=FEW_STEPS, options=Projection((f"{old}={new}",)))


def test_distilling_the_map_of_a_full_fine_tune_is_refused(tmp_path, upgrades, task_file):
    upgrade = upgrades["bert"]
    path = write_adaptation(upgrade.old, "full", tmp_path / "full", 1)
    options = Projection((f"{path}={task_file}",), fit="distill")
    with pytest.raises(RecipeError, match="fit=regression"):
        recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW_STEPS, options=options)


def test_pairs_of_tasks_with_other_labels_are_accepted(tmp_path, upgrades, task_file):
    upgrade = upgrades["bert"]
    old = write_adaptation(upgrade.old, "lora", tmp_path / "old", 1, labels=("a", "b", "c"))
    new = write_adaptation(upgrade.new, "lora", tmp_path / "new", 1, labels=("a", "b", "c"))
    path = write_adaptation(upgrade.old, "lora", tmp_path / "source" / "adaptation", 99)
    options = Projection((f"{old}={new}",))
    outcome = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW_STEPS, options=options)
    assert len(read_weights(outcome.path / "adaptation")["base_model.model.classifier.weight"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "residual"), [("bert", True), ("bert", False), ("llama", True)])
def test_distilling_the_map_lowers_the_loss_and_a_residual_map_starts_at_direct(
    tmp_path, bases, tuned_outcomes, task_file, architecture, residual
):
    upgrade = Upgrade(bases[architecture][0], write_upgrade(bases[architecture][0], tmp_path / "new", 0.3))
    path = tuned_outcomes[architecture, "lora"] / "adaptation"
    options = Projection(
        (f"{path}={task_file}",), fit="distill", residual=residual, steps=60, learning_rate=3e-3, rank=4
    )
    outcome = recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW_STEPS, options=options)
    initial_loss, final_loss = outcome.record.notes["fit_loss"]
    assert final_loss < initial_loss

    untrained = dataclasses.replace(options, steps=1, learning_rate=1e-9)
    initial = recycle(upgrade, path, task_file, "project", tmp_path / "initial", recipe=FEW_STEPS, options=untrained)
    before, after = read_weights(path), read_weights(initial.path / "adaptation")
    largest_change = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert largest_change < 1e-6 if residual else largest_change > 0.01
    direct = recycle(upgrade, path, task_file, "direct", tmp_path / "direct", recipe=FEW_STEPS)
    if residual:
        assert outcome.record.scores.test >= direct.record.scores.test


@pytest.mark.parametrize("index", [0, 1, 2], ids=["W1", "W2", "b"])
@given(size=st.integers(50, 5000), rank=st.integers(8, 32), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_steps_of_all_parameters_of_the_map_move_weights_equally_far(index, size, rank, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    v = scale * torch.randn(size, generator=generator, dtype=torch.float64)
    shapes = ((size, rank), (rank, size), (size,))
    initial = [0.02 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    learning_rate = _learning_rates([v], Projection(("a=b",), rank=rank, learning_rate=1e-3))[index]
    w1, w2, b = trained = [tensor.clone().requires_grad_(i == index) for i, tensor in enumerate(initial)]
    before = v @ initial[0] @ initial[1] + initial[2]
    (v @ w1 @ w2 + b)[0].backward()  # the gradient of a single weight, so that the step is in its direction
    torch.optim.Adam([trained[index]], lr=learning_rate).step()
    after = v @ w1 @ w2 + b
    # About 1e-3; the signs of few random numbers need not balance.
    assert 1e-4 < abs(float((after - before).detach()[0])) < 1e-2


def test_options_of_project_are_parsed():
    assert parse_options("project", ["pairs=[a/x=b/x, a/y=b/y]", "rank=4"]) == Projection(("a/x=b/x", "a/y=b/y"), 4)
    assert parse_options("project", ["pairs=a=b"]) == Projection(("a=b",))


@pytest.mark.parametrize("options", [{"fit": "guess"}, {"rank": 0}, {"ridge": -1}, {"steps": 0}, {"learning_rate": 0}])
def test_invalid_options_of_project_are_refused(options):
    with pytest.raises(RecipeError):
        Projection(**options)


@pytest.mark.parametrize(("ridge", "rank"), [(-1, 1), (1, 0)])
def test_a_negative_ridge_and_a_rank_of_0_are_refused(ridge, rank):
    with pytest.raises(RecipeError):
        project(torch.eye(2), torch.eye(2), torch.ones(2), ridge, rank)


def test_interrupted_distillation_of_the_map_resumes(tmp_path, bases, tuned_outcomes, task_file):
    path = tuned_outcomes["bert", "lora"] / "adaptation"
    arguments = (Upgrade(*bases["bert"]), path, task_file, "project")
    options = Projection((f"{path}={task_file}",), fit="distill", steps=8, learning_rate=3e-3, rank=2)
    recipe = dataclasses.replace(FEW_STEPS, save_every=3)
    steps = []

    def interrupt_after_7_steps(stage, step, *_):
        if stage == "map":
            steps.append(step)
            if steps == [1, 2, 3, 4, 5, 6, 7]:
                raise KeyboardInterrupt

    def run_interrupted():
        return recycle(
            *arguments, tmp_path / "resumed", recipe=recipe, options=options, progress=interrupt_after_7_steps
        )

    uninterrupted = recycle(*arguments, tmp_path / "uninterrupted", recipe=recipe, options=options)
    with pytest.raises(KeyboardInterrupt):
        run_interrupted()
    resumed = run_interrupted()
    assert steps == [1, 2, 3, 4, 5, 6, 7, 7, 8]  # the state was saved after step 6
    expected, tensors = read_weights(uninterrupted.path / "adaptation"), read_weights(resumed.path / "adaptation")
    assert all(expected[name].equal(tensors[name]) for name in expected)
    assert resumed.record.notes["fit_loss"] == uninterrupted.record.notes["fit_loss"]


def test_an_outcome_depends_on_the_content_of_its_pairs(tmp_path, bases, tuned_outcomes, task_file):
    upgrade = Upgrade(*bases["bert"])
    path, old, new = tuned_outcomes["bert", "lora"] / "adaptation", tmp_path / "old", tmp_path / "new"
    write_adaptation(upgrade.old, "lora", old, rank=8)
    write_adaptation(upgrade.new, "lora", new, seed=3, rank=8)
    options = Projection((f"{old}={new}",))

    def run():
        return recycle(upgrade, path, task_file, "project", tmp_path / "out", recipe=FEW_STEPS, options=options)

    outcome = run()
    assert run().record == outcome.record

    # Outcomes of regraft 0.1 have no fingerprint of the pairs and are accepted as they are.
    record = json.loads((outcome.path / "outcome.json").read_text())
    del record["inputs"]["pairs"]
    (outcome.path / "outcome.json").write_text(json.dumps(record))
    assert run().record.inputs == record["inputs"]

    shutil.rmtree(new)
    write_adaptation(upgrade.new, "lora", new, seed=4, rank=8)
    with pytest.raises(OutcomeError, match="inputs differ in pairs"):
        run()
