"""Training-free methods that change deltas, compared with deltas computed densely in float64."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers import (
    FEW_STEPS,
    HEAD,
    LABELS,
    LORA_RANK,
    add_noise,
    find_weights,
    have_equal_tensors,
    is_peft,
    load_tuned_model,
    read_weights,
    update_json,
    write_adaptation,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from regraft import Base, Upgrade, load_adaptation, recycle
from regraft.adaptation import fresh_model, new_config, prepare_for_tuning
from regraft.errors import RecipeError
from regraft.methods import parse_options
from regraft.methods.evidence import Evidence
from regraft.methods.masked import Masking
from regraft.methods.scaled import Scaling, _gain
from regraft.methods.trimmed import Trimming
from regraft.model import encode, predict
from regraft.model.outputs import model_inputs
from regraft.task import load_data
from regraft.task.types import Signal
from regraft.task.types.likelihood import CATEGORICAL
from regraft.weights import kind_of

LORA_SCALING = 2  # of the LoRA adapters that `adapt` writes: alpha is twice the rank


def run(method, upgrade, path, task_file, out, options=None, **arguments):
    return recycle(upgrade, path, task_file, method, out, recipe=FEW_STEPS, options=options, **arguments)


def base_tensor(base, name):
    """A tensor of a base in float64, by its name inside the body."""
    return base.checkpoint[base.body[name]].double()


def truncate(matrix, rank):
    """The best approximation of a matrix by one of a lower rank."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def trim_densely(delta, density):
    """Keep the share `density` of a delta's entries that are largest in magnitude, and zero all others."""
    magnitudes = delta.abs().flatten().sort(descending=True).values
    threshold = magnitudes[round(density * delta.numel()) - 1]
    return torch.where(delta.abs() >= threshold, delta, torch.zeros_like(delta))


def compute_deltas(upgrade, path):
    """The dense delta of an adaptation by name inside the body, and the change of the base by the same names."""
    tensors = read_weights(path)
    old = upgrade.old
    new = upgrade.new
    deltas = {}
    for name, tensor in tensors.items():
        if is_peft(path):
            if not name.endswith(".lora_A.weight"):
                continue
            body_name = name.removeprefix(f"base_model.model.{old.prefix}.").replace(".lora_A", "")
            lora_b = tensors[name.replace("lora_A", "lora_B")].double()
            deltas[body_name] = LORA_SCALING * lora_b @ tensor.double()
        elif name.startswith(old.prefix + ".") and name.removeprefix(old.prefix + ".") in old.body:
            body_name = name.removeprefix(old.prefix + ".")
            deltas[body_name] = tensor.double() - base_tensor(old, body_name)
    shifts = {name: base_tensor(new, name) - base_tensor(old, name) for name in deltas}
    return deltas, shifts


def assert_adaptation_has_deltas(upgrade, path, result_path, expected, rtol=1e-5):
    """Compare a result with expected deltas: a full fine-tune exactly, a LoRA with their truncated SVD."""
    before, after = read_weights(path), read_weights(result_path)
    assert after.keys() == before.keys()
    new = upgrade.new
    prefix = upgrade.new.prefix + "."
    deltas, shifts = compute_deltas(upgrade, path)
    for body_name, expected_delta in expected.items():
        if not shifts[body_name].any():  # a tensor that the upgrade left unchanged keeps its delta
            expected_delta = deltas[body_name]
        if is_peft(result_path):
            module = f"base_model.model.{prefix}{body_name.removesuffix('.weight')}"
            lora_b, lora_a = after[f"{module}.lora_B.weight"], after[f"{module}.lora_A.weight"]
            rank = len(before[f"{module}.lora_A.weight"])
            assert lora_b.shape[1] == lora_a.shape[0] == rank
            actual = LORA_SCALING * lora_b.double() @ lora_a.double()
            expected_tensor = truncate(expected_delta, rank)
        else:
            actual = after[prefix + body_name].double()
            expected_tensor = base_tensor(new, body_name) + expected_delta
        torch.testing.assert_close(actual, expected_tensor, rtol=rtol, atol=1e-6)
    for name in after:
        if "lora_" not in name and name.removeprefix(prefix) not in expected:
            assert torch.equal(after[name], before[name]), name
    if is_peft(result_path):
        assert_config_names_another_base(path, result_path)


def assert_config_names_another_base(path, result_path):
    config = json.loads((path / "adapter_config.json").read_text())
    result_config = json.loads((result_path / "adapter_config.json").read_text())
    keys = {*config, *result_config}
    differing = {key for key in keys if config.get(key) != result_config.get(key)}
    assert differing <= {"base_model_name_or_path", "revision"}
    # PEFT keeps the modules in a set, whose order differs between runs.
    assert result_config["target_modules"] == sorted(result_config["target_modules"])


OPTIONS = {
    "scaled": [None, Scaling(scale=0.5), Scaling(labels=32)],
    "masked": [None, Masking(labels=0)],
    "trimmed": [None, Trimming(0.3, drop=True)],
    "orthogonal": [None],
}


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_delta_methods_reproduce_the_old_weights_on_an_equal_base(
    tmp_path, bases, task_file, architecture, kind, method
):
    base = Base.open(bases[architecture][0])
    path = write_adaptation(base, kind, tmp_path / "old" / "adaptation")
    before = read_weights(path)
    for i, options in enumerate(OPTIONS[method]):
        outcome = run(method, Upgrade(base, base), path, task_file, tmp_path / str(i), options)
        after = read_weights(outcome.path / "adaptation")
        assert have_equal_tensors(before, after)


@pytest.fixture(params=[("bert", "full"), ("bert", "lora"), ("llama", "full"), ("llama", "lora")], ids="-".join)
def upgrade_and_path(request, tmp_path, bases):
    """An upgrade, and the path of an adaptation to its old base."""
    architecture, kind = request.param
    upgrade = Upgrade(*bases[architecture])
    return upgrade, write_adaptation(upgrade.old, kind, tmp_path / "old" / "adaptation")


def test_scaled_multiplies_the_delta_by_a_fixed_scale(tmp_path, upgrade_and_path, task_file):
    upgrade, path = upgrade_and_path
    outcome = run("scaled", upgrade, path, task_file, tmp_path / "out", Scaling(scale=0.5))
    expected = {name: 0.5 * delta for name, delta in compute_deltas(upgrade, path)[0].items()}
    assert_adaptation_has_deltas(upgrade, path, outcome.path / "adaptation", expected)
    assert outcome.record.cost.labels == outcome.record.cost.steps == 0
    assert set(outcome.record.notes["scales"].values()) == {0.5}
    unscaled = run("scaled", upgrade, path, task_file, tmp_path / "unscaled", Scaling(scale=1))
    direct = run("direct", upgrade, path, task_file, tmp_path / "direct")
    direct_tensors, unscaled_tensors = (
        read_weights(direct.path / "adaptation"),
        read_weights(unscaled.path / "adaptation"),
    )
    assert all(torch.equal(direct_tensors[name], unscaled_tensors[name]) for name in direct_tensors)


def test_trimmed_keeps_the_largest_entries_of_each_tensor(tmp_path, upgrade_and_path, task_file):
    upgrade, path = upgrade_and_path
    expected = {name: trim_densely(delta, 0.3) for name, delta in compute_deltas(upgrade, path)[0].items()}
    outcome = run("trimmed", upgrade, path, task_file, tmp_path / "out", Trimming(0.3))
    assert_adaptation_has_deltas(upgrade, path, outcome.path / "adaptation", expected, rtol=1e-4)


def test_dropping_entries_is_seeded_and_preserves_the_expectation(tmp_path, bases, task_file):
    upgrade = Upgrade(*bases["bert"])
    path = write_adaptation(upgrade.old, "full", tmp_path / "old" / "adaptation")
    options = Trimming(0.5, drop=True)
    first, repeated = (
        read_weights(run("trimmed", upgrade, path, task_file, tmp_path / name, options).path / "adaptation")
        for name in ("first", "repeated")
    )
    assert all(torch.equal(first[name], repeated[name]) for name in first)

    deltas, _ = compute_deltas(upgrade, path)
    name = "encoder.layer.1.output.dense.weight"
    ratio = (first["bert." + name].double() - base_tensor(upgrade.new, name)) / deltas[name]
    is_dropped_or_doubled = (ratio.abs() < 1e-3) | ((ratio - 2).abs() < 1e-2)
    # Where the delta is close to 0, rounding dominates the ratio.
    assert is_dropped_or_doubled.float().mean() > 0.99
    assert 0.45 < (ratio > 1).float().mean() < 0.55

    recipe = dataclasses.replace(FEW_STEPS, seed=3)
    reseeded_outcome = recycle(
        upgrade, path, task_file, "trimmed", tmp_path / "reseeded", recipe=recipe, options=options
    )
    reseeded = read_weights(reseeded_outcome.path / "adaptation")
    assert not torch.equal(first["bert." + name], reseeded["bert." + name])


def test_orthogonal_removes_the_component_along_the_shift(tmp_path, upgrade_and_path, task_file):
    upgrade, path = upgrade_and_path
    deltas, shifts = compute_deltas(upgrade, path)
    expected = {}
    for name, delta in deltas.items():
        shift = shifts[name]
        coefficient = (delta * shift).sum() / shift.square().sum() if shift.any() else 0.0
        expected[name] = delta - coefficient * shift
    outcome = run("orthogonal", upgrade, path, task_file, tmp_path / "out")
    assert_adaptation_has_deltas(upgrade, path, outcome.path / "adaptation", expected, rtol=1e-4)


def gradients_by_autograd(upgrade, path, task_file, num_labels):
    """The gradients at the new base under the old head, from one batch and without regraft's losses."""
    data = load_data(task_file, FEW_STEPS.seed).relabel(LABELS)
    model = fresh_model(upgrade.new, HEAD, 0)
    prefix = upgrade.new.prefix + "."
    tensors = {
        name.removeprefix("base_model.model."): t for name, t in read_weights(path).items() if "lora_" not in name
    }
    head_tensors = {name: t for name, t in tensors.items() if name.removeprefix(prefix) not in upgrade.new.body}
    assert head_tensors
    model.load_state_dict(head_tensors, strict=False)
    model.eval()
    if num_labels:
        split = data.sample(data.train, num_labels, FEW_STEPS.seed)
        targets = torch.as_tensor(split.labels)
    else:
        split = data.train
        tuned_model = load_tuned_model(path, upgrade.old)
        targets = predict(tuned_model, encode(upgrade.old, data, split), "fp32").softmax(dim=1)
    batch = encode(upgrade.new, data, split).batch(range(len(split)))
    logits = model(**model_inputs(batch)).logits
    # For soft targets, the cross-entropy differs from the KL divergence by a constant only.
    torch.nn.functional.cross_entropy(logits, targets).backward()
    return {name.removeprefix(prefix): parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("num_labels", [16, 0])
def test_masked_keeps_the_entries_that_lower_the_loss(tmp_path, upgrade_and_path, task_file, num_labels):
    upgrade, path = upgrade_and_path
    gradients = gradients_by_autograd(upgrade, path, task_file, num_labels)
    outcome = run("masked", upgrade, path, task_file, tmp_path / "out", Masking(num_labels))
    deltas, _ = compute_deltas(upgrade, path)
    expected = {}
    for name, delta in deltas.items():
        gradient = gradients[name] if gradients[name] is not None else torch.zeros_like(delta)
        expected[name] = torch.where(delta * gradient.double() <= 0, delta, torch.zeros_like(delta))
    if is_peft(path):
        assert_adaptation_has_deltas(upgrade, path, outcome.path / "adaptation", expected, rtol=1e-3)
    else:
        # The gradient of a key's bias is 0 up to rounding, so its sign is arbitrary.
        expected = {name: delta for name, delta in expected.items() if "key.bias" not in name}
        assert_adaptation_has_deltas(upgrade, path, outcome.path / "adaptation", expected)
    assert outcome.record.cost.labels == 2 * num_labels
    assert 0.3 < outcome.record.notes["kept"] < 0.9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 4))
def test_evidence_measures_cross_entropy_and_divergence(seed, count, num_classes):
    torch.manual_seed(seed)
    logits = torch.randn(count, num_classes)
    labels = torch.randint(num_classes, (count,))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(Evidence(None, CATEGORICAL).losses(logits, labels), expected)
    teacher_logits = torch.randn(count, num_classes)
    teacher = teacher_logits.softmax(dim=1)
    expected = (teacher * (teacher.log() - logits.log_softmax(dim=1))).sum(dim=1)
    losses = Evidence(None, CATEGORICAL, Signal(teacher_logits)).losses(logits, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    losses_at_teacher = Evidence(None, CATEGORICAL, Signal(logits)).losses(logits, labels)
    assert losses_at_teacher.abs().max() < 1e-5


def test_a_gain_is_measured_in_standard_errors():
    torch.manual_seed(0)
    losses, noise = torch.rand(64).double(), torch.randn(64).double()
    noise = (noise - noise.mean()) / noise.std()
    assert _gain(losses, losses) == 0
    for standard_errors in (-2.0, 0.5, 3.0):
        assert abs(_gain(losses, losses - noise - standard_errors / 8) - standard_errors) < 1e-9
    assert _gain(torch.ones(8), torch.zeros(8)) == -_gain(torch.zeros(8), torch.ones(8)) == float("inf")


def write_shrunk_adaptation(source, base, folder, factor):
    """Copy an adaptation with its delta multiplied by a factor."""
    shutil.copytree(source, folder)
    tensors = read_weights(source)
    for name, tensor in tensors.items():
        body_name = name.removeprefix(base.prefix + ".")
        if name.endswith("lora_B.weight"):
            tensors[name] = factor * tensor
        elif body_name in base.body and body_name != name:
            original = base.checkpoint[base.body[body_name]]
            tensors[name] = original + factor * (tensor - original)
    save_file(tensors, find_weights(folder), metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("num_labels", [32, 0])
def test_scaled_enlarges_a_shrunk_delta_if_it_has_labels(tmp_path, bases, tuned_outcomes, task_file, kind, num_labels):
    """Labels show that the delta is too small; the outputs of the shrunk adaptation itself cannot."""
    upgrade = Upgrade(*bases["bert"])
    source = tuned_outcomes["bert", kind] / "adaptation"
    path = write_shrunk_adaptation(source, upgrade.old, tmp_path / "shrunk" / "adaptation", 0.4)
    options = Scaling(labels=num_labels, grouped=False)
    outcome = run("scaled", upgrade, path, task_file, tmp_path / "out", options)
    (scale,) = set(outcome.record.notes["scales"].values())
    assert outcome.record.cost.labels == 2 * num_labels
    if num_labels:
        assert scale >= 1.25
        initial_loss, final_loss = outcome.record.notes["loss"]
        assert final_loss < initial_loss
        expected = {name: scale * delta for name, delta in compute_deltas(upgrade, path)[0].items()}
        assert_adaptation_has_deltas(upgrade, path, outcome.path / "adaptation", expected)
    else:
        assert scale == 1


def test_scaled_by_group_shrinks_a_group_of_noise(tmp_path, bases, tuned_outcomes, task_file):
    upgrade = Upgrade(*bases["bert"])
    path = tmp_path / "noisy" / "adaptation"
    shutil.copytree(tuned_outcomes["bert", "full"] / "adaptation", path)
    tensors = read_weights(path)
    torch.manual_seed(4)
    for name, tensor in tensors.items():
        if ".layer." in name and kind_of(name) == "feed-forward" and tensor.dim() == 2:
            tensors[name] = tensor + 0.2 * torch.randn_like(tensor)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    outcome = run("scaled", upgrade, path, task_file, tmp_path / "out", Scaling(labels=64))
    scales = outcome.record.notes["scales"]
    # There is no scale for norms, as the upgrade left them all unchanged.
    assert list(scales) == ["embedding", "attention", "feed-forward"]
    assert scales["feed-forward"] < 1 < scales["embedding"]
    deltas, _ = compute_deltas(upgrade, path)
    expected = {name: scales.get(kind_of(name), 1.0) * delta for name, delta in deltas.items()}
    assert_adaptation_has_deltas(upgrade, path, outcome.path / "adaptation", expected)


def test_modules_with_different_lora_scalings_are_projected_alike(tmp_path, bases, task_file):
    """The scaling is alpha / √rank in rsLoRA, and an alpha pattern changes it for some modules."""
    upgrade = Upgrade(*bases["bert"])
    path = write_adaptation(upgrade.old, "rslora", tmp_path / "rslora" / "adaptation")
    update_json(path / "adapter_config.json", alpha_pattern={"intermediate.dense": 9})
    before = read_weights(path)
    after = read_weights(run("orthogonal", upgrade, path, task_file, tmp_path / "out").path / "adaptation")
    for a_name in before:
        if not a_name.endswith("lora_A.weight"):
            continue
        b_name = a_name.replace("lora_A", "lora_B")
        scaling = (9 if "intermediate" in a_name else 2 * LORA_RANK) / LORA_RANK**0.5
        body_name = a_name.removeprefix("base_model.model.bert.").replace(".lora_A", "")
        shift = base_tensor(upgrade.new, body_name) - base_tensor(upgrade.old, body_name)
        delta = scaling * before[b_name].double() @ before[a_name].double()
        expected = delta - (delta * shift).sum() / shift.square().sum() * shift
        actual = scaling * after[b_name].double() @ after[a_name].double()
        torch.testing.assert_close(actual, truncate(expected, LORA_RANK), rtol=1e-5, atol=1e-6)


def test_a_pissa_adapter_is_trimmed_as_the_change_since_its_initialisation(tmp_path, bases, task_file):
    upgrade = Upgrade(*bases["bert"])
    config = new_config("pissa", upgrade.old, HEAD, rank=LORA_RANK)
    model = prepare_for_tuning(fresh_model(upgrade.old, HEAD, 1), upgrade.old, HEAD, config, 1)
    model.save_pretrained(str(tmp_path / "initial"), save_embedding_layers=False)
    add_noise(model, 0.05)
    path = tmp_path / "old" / "adaptation"
    # PEFT's own format of PiSSA: the initial factors are subtracted from the base, not stored with the adapter.
    model.save_pretrained(str(path), save_embedding_layers=False)
    assert load_adaptation(path).changed_base
    outcome = run("trimmed", upgrade, path, task_file, tmp_path / "out", Trimming(0.5))
    after, before, initial = (
        read_weights(outcome.path / "adaptation"),
        read_weights(path),
        read_weights(tmp_path / "initial"),
    )
    for a_name in before:
        if a_name.endswith("lora_A.weight"):
            b_name = a_name.replace("lora_A", "lora_B")
            delta = before[b_name].double() @ before[a_name].double()
            delta -= initial[b_name].double() @ initial[a_name].double()
            expected = truncate(trim_densely(delta, 0.5), 2 * LORA_RANK)
            actual = after[b_name].double() @ after[a_name].double()
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


UNSUPPORTED = [
    (method, kind)
    for method in ("scaled", "masked", "trimmed", "orthogonal")
    for kind in ("prefix", "dora", "ia3", "bottleneck")
    if (method, kind) != ("scaled", "bottleneck")
]


@pytest.mark.parametrize(("method", "kind"), UNSUPPORTED)
def test_kinds_without_a_weight_delta_are_refused(tmp_path, bases, task_file, method, kind):
    upgrade = Upgrade(*bases["bert"])
    path = write_adaptation(upgrade.old, kind, tmp_path / "old" / "adaptation")
    with pytest.raises(RecipeError, match=rf"supports .*, not {kind}"):
        run(method, upgrade, path, task_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bottlenecks_are_scaled_at_their_second_layer(tmp_path, bases, task_file):
    upgrade = Upgrade(*bases["bert"])
    path = write_adaptation(upgrade.old, "bottleneck", tmp_path / "old" / "adaptation")
    outcome = run("scaled", upgrade, path, task_file, tmp_path / "out", Scaling(scale=0.5))
    before, after = read_weights(path), read_weights(outcome.path / "adaptation")
    for name in before:
        assert torch.equal(after[name], before[name] * (0.5 if ".up." in name else 1)), name


def test_methods_that_measure_losses_refuse_a_fresh_head(tmp_path, bases, task_file):
    upgrade = Upgrade(*bases["bert"])
    path = write_adaptation(upgrade.old, "full", tmp_path / "old" / "adaptation")
    for method in ("scaled", "masked"):
        with pytest.raises(RecipeError, match="head must be copy"):
            run(method, upgrade, path, task_file, tmp_path / method, head="fresh")
    trimmed = run("trimmed", upgrade, path, task_file, tmp_path / "trimmed", head="fresh")
    direct = run("direct", upgrade, path, task_file, tmp_path / "direct", head="fresh")
    heads = [read_weights(outcome.path / "adaptation")["classifier.weight"] for outcome in (trimmed, direct)]
    assert torch.equal(*heads)


@pytest.mark.parametrize(
    ("options_type", "values"),
    [
        (Scaling, {"scale": float("nan")}),
        (Scaling, {"scale": "much"}),
        (Scaling, {"labels": -1}),
        (Scaling, {"confidence": 2}),
        (Masking, {"labels": -1}),
        (Trimming, {"density": 0}),
        (Trimming, {"density": 1.5}),
    ],
)
def test_invalid_options_of_delta_methods_are_refused(options_type, values):
    with pytest.raises(RecipeError):
        options_type(**values)


def test_options_of_delta_methods_are_parsed():
    assert parse_options("scaled", ["scale=0.5", "grouped=false"]) == Scaling(scale=0.5, grouped=False)
    assert parse_options("trimmed", ["density=0.25", "drop=true"]) == Trimming(0.25, drop=True)
