"""Training-free methods that rework deltas, each against tensors worked out another way."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import HEAD, adapt, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from regraft import Base, Recipe, Upgrade, load_adaptation, recycle
from regraft.adaptation import attach, fresh_model, load_model, new_config
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

FEW = Recipe(steps=4, batch_size=8, learning_rate=3e-3, eval_every=2, precision="fp32")
LABELS = ("negative", "positive")
RANK = 3


def run(method, upgrade, path, task_file, out, options=None, **more):
    return recycle(upgrade, path, task_file, method, out, recipe=FEW, options=options, **more)


def deltas_of(upgrade, path):
    """What tuning changed, dense and in float64, by name inside the body; and what the upgrade changed."""
    stored, old, new = weights(path), upgrade.old, upgrade.new
    found = {}
    for name, tensor in stored.items():
        if (path / "adapter_config.json").exists():
            if not name.endswith(".lora_A.weight"):
                continue
            inner = name.removeprefix(f"base_model.model.{old.prefix}.").replace(".lora_A", "")
            found[inner] = 2 * stored[name.replace("lora_A", "lora_B")].double() @ tensor.double()
        elif name.startswith(old.prefix + ".") and name.removeprefix(old.prefix + ".") in old.body:
            inner = name.removeprefix(old.prefix + ".")
            found[inner] = tensor.double() - old.checkpoint[old.body[inner]].double()
    shifts = {n: new.checkpoint[new.body[n]].double() - old.checkpoint[old.body[n]].double() for n in found}
    return found, shifts


def check_against(upgrade, path, result, expected, rtol=1e-5):
    """Hold a result against expected deltas: the tensors themselves, or of a LoRA the SVD of its rank."""
    stored = weights(result)
    before = weights(path)
    assert stored.keys() == before.keys()
    is_lora = (result / "adapter_config.json").exists()
    new, prefix = upgrade.new, upgrade.new.prefix + "."
    deltas, shifts = deltas_of(upgrade, path)
    for inner, change in expected.items():
        if not shifts[inner].any():
            change = deltas[inner]
        if is_lora:
            module = f"base_model.model.{prefix}{inner.removesuffix('.weight')}"
            b, a = stored[f"{module}.lora_B.weight"], stored[f"{module}.lora_A.weight"]
            rank = len(before[f"{module}.lora_A.weight"])
            assert b.shape[1] == a.shape[0] == rank
            u, s, vt = torch.linalg.svd(change, full_matrices=False)
            wanted = (u[:, :rank] * s[:rank]) @ vt[:rank]
            found = 2 * b.double() @ a.double()
        else:
            wanted = new.checkpoint[new.body[inner]].double() + change
            found = stored[prefix + inner].double()
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-6)
    for name in stored:
        if "lora_" not in name and name.removeprefix(prefix) not in expected:
            assert torch.equal(stored[name], before[name]), name
    for file in ("adapter_config.json",) if is_lora else ():
        kept, found = (json.loads((p / file).read_text()) for p in (path, result))
        differing = {key for key in {*kept, *found} if kept.get(key) != found.get(key)}
        assert differing <= {"base_model_name_or_path", "revision"}
        assert found["target_modules"] == sorted(found["target_modules"])  # PEFT's order changes from run to run


METHODS = {
    "scaled": [None, Scaling(scale=0.5), Scaling(labels=32)],
    "masked": [None, Masking(labels=0)],
    "trimmed": [None, Trimming(0.3, drop=True)],
    "orthogonal": [None],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_an_upgrade_that_changed_nothing_gives_the_old_weights(tmp_path, bases, task_file, architecture, kind, method):
    old = Base.open(bases[architecture][0])
    path = adapt(old, kind, tmp_path / "old" / "adaptation")
    before = weights(path)
    for i, options in enumerate(METHODS[method]):
        out = run(method, Upgrade(old, old), path, task_file, tmp_path / str(i), options)
        after = weights(out.path / "adaptation")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(params=[("bert", "full"), ("bert", "lora"), ("llama", "full"), ("llama", "lora")], ids="-".join)
def case(request, tmp_path, bases):
    architecture, kind = request.param
    upgrade = Upgrade(*bases[architecture])
    return upgrade, adapt(upgrade.old, kind, tmp_path / "old" / "adaptation")


def test_scaled_by_a_number_adds_so_much_of_the_delta(tmp_path, case, task_file):
    upgrade, path = case
    out = run("scaled", upgrade, path, task_file, tmp_path / "out", Scaling(scale=0.5))
    check_against(upgrade, path, out.path / "adaptation", {n: 0.5 * d for n, d in deltas_of(upgrade, path)[0].items()})
    assert out.record.cost.labels == out.record.cost.steps == 0
    assert set(out.record.notes["scales"].values()) == {0.5}
    one = run("scaled", upgrade, path, task_file, tmp_path / "one", Scaling(scale=1))
    direct = run("direct", upgrade, path, task_file, tmp_path / "direct")
    plain, scaled = weights(direct.path / "adaptation"), weights(one.path / "adaptation")
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


def test_trimmed_keeps_the_largest_entries_of_each_tensor(tmp_path, case, task_file):
    upgrade, path = case
    expected = {}
    for name, delta in deltas_of(upgrade, path)[0].items():
        cut = delta.abs().flatten().sort(descending=True).values[round(0.3 * delta.numel()) - 1]
        expected[name] = torch.where(delta.abs() >= cut, delta, torch.zeros_like(delta))
    out = run("trimmed", upgrade, path, task_file, tmp_path / "out", Trimming(0.3))
    check_against(upgrade, path, out.path / "adaptation", expected, rtol=1e-4)


def test_dropping_is_seeded_and_keeps_the_expectation(tmp_path, bases, task_file):
    upgrade = Upgrade(*bases["bert"])
    path = adapt(upgrade.old, "full", tmp_path / "old" / "adaptation")
    once, again = (
        weights(
            run("trimmed", upgrade, path, task_file, tmp_path / str(i), Trimming(0.5, drop=True)).path / "adaptation"
        )
        for i in range(2)
    )
    assert all(torch.equal(once[name], again[name]) for name in once)
    deltas, _ = deltas_of(upgrade, path)
    name = "encoder.layer.1.output.dense.weight"
    ratio = (once["bert." + name].double() - upgrade.new.checkpoint[upgrade.new.body[name]].double()) / deltas[name]
    near = (ratio.abs() < 1e-3) | ((ratio - 2).abs() < 1e-2)
    assert near.float().mean() > 0.99  # all but where the delta is next to nothing
    assert 0.45 < (ratio > 1).float().mean() < 0.55
    other = weights(
        recycle(
            upgrade, path, task_file, "trimmed", tmp_path / "other", recipe=dataclasses.replace(FEW, seed=3),
            options=Trimming(0.5, drop=True),
        ).path / "adaptation"
    )  # fmt: skip
    assert not torch.equal(once["bert." + name], other["bert." + name])


def test_orthogonal_leaves_nothing_along_the_shift(tmp_path, case, task_file):
    upgrade, path = case
    deltas, shifts = deltas_of(upgrade, path)
    expected = {}
    for name, delta in deltas.items():
        shift = shifts[name]
        along = (delta * shift).sum() / shift.square().sum() if shift.any() else 0.0
        expected[name] = delta - along * shift
    out = run("orthogonal", upgrade, path, task_file, tmp_path / "out")
    check_against(upgrade, path, out.path / "adaptation", expected, rtol=1e-4)


def gradients_by_autograd(upgrade, path, task_file, labels):
    """The gradient at the new base under the old head, from one batch of all examples and without regraft's losses."""
    data = load_data(task_file, FEW.seed).relabel(LABELS)
    model = fresh_model(upgrade.new, HEAD, 0)
    stored = {n.removeprefix("base_model.model."): t for n, t in weights(path).items() if "lora_" not in n}
    heads = {n: t for n, t in stored.items() if n.removeprefix(upgrade.new.prefix + ".") not in upgrade.new.body}
    assert heads
    model.load_state_dict(heads, strict=False)
    model.eval()
    if labels:
        split = data.sample(data.train, labels, FEW.seed)
        targets = torch.as_tensor(split.labels)
    else:
        split = data.train
        tuned = load_model(load_adaptation(path), upgrade.old, HEAD)
        targets = predict(tuned, encode(upgrade.old, data, split), "fp32").softmax(dim=1)
    batch = encode(upgrade.new, data, split).batch(range(len(split)))
    logits = model(**model_inputs(batch)).logits
    torch.nn.functional.cross_entropy(logits, targets).backward()  # differs from the KL by a constant
    return {n.removeprefix(upgrade.new.prefix + "."): p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("labels", [16, 0])
def test_masked_keeps_what_goes_downhill(tmp_path, case, task_file, labels):
    upgrade, path = case
    gradients = gradients_by_autograd(upgrade, path, task_file, labels)
    out = run("masked", upgrade, path, task_file, tmp_path / "out", Masking(labels))
    deltas, _ = deltas_of(upgrade, path)
    expected = {}
    for name, delta in deltas.items():
        gradient = gradients[name] if gradients[name] is not None else torch.zeros_like(delta)
        expected[name] = torch.where(delta * gradient.double() <= 0, delta, torch.zeros_like(delta))
    if (path / "adapter_config.json").exists():
        check_against(upgrade, path, out.path / "adaptation", expected, rtol=1e-3)
    else:
        expected = {name: change for name, change in expected.items() if "key.bias" not in name}  # 0 but for rounding
        check_against(upgrade, path, out.path / "adaptation", expected)
    assert out.record.cost.labels == 2 * labels
    assert 0.3 < out.record.notes["kept"] < 0.9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 4))
def test_evidence_measures_cross_entropy_and_divergence(seed, count, classes):
    torch.manual_seed(seed)
    logits, truth = torch.randn(count, classes), torch.randint(classes, (count,))
    expected = torch.nn.functional.cross_entropy(logits, truth, reduction="none")
    torch.testing.assert_close(Evidence(None, CATEGORICAL).losses(logits, truth), expected)
    teacher = torch.randn(count, classes)
    old = teacher.softmax(dim=1)
    expected = (old * (old.log() - logits.log_softmax(dim=1))).sum(dim=1)
    by_teacher, by_itself = (Evidence(None, CATEGORICAL, Signal(rows)) for rows in (teacher, logits))
    torch.testing.assert_close(by_teacher.losses(logits, truth), expected, rtol=1e-4, atol=1e-5)
    assert by_itself.losses(logits, truth).abs().max() < 1e-5


def test_a_gain_is_measured_in_standard_errors():
    torch.manual_seed(0)
    before, noise = torch.rand(64).double(), torch.randn(64).double()
    noise = (noise - noise.mean()) / noise.std()
    assert _gain(before, before) == 0
    for errors in (-2.0, 0.5, 3.0):
        assert abs(_gain(before, before - noise - errors / 8) - errors) < 1e-9
    assert _gain(torch.ones(8), torch.zeros(8)) == -_gain(torch.zeros(8), torch.ones(8)) == float("inf")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("labels", [32, 0])
def test_scaled_finds_the_scale_that_was_lost(tmp_path, bases, tuned, task_file, kind, labels):
    """A delta made smaller after tuning is made larger by labels; its own outputs do not tell."""
    upgrade = Upgrade(*bases["bert"])
    source = tuned["bert", kind]
    path = shrunk(source / "adaptation", upgrade.old, tmp_path / "less" / "adaptation", 0.4)
    out = run("scaled", upgrade, path, task_file, tmp_path / "out", Scaling(labels=labels, grouped=False))
    (scale,) = set(out.record.notes["scales"].values())
    assert out.record.cost.labels == 2 * labels
    if labels:
        assert scale >= 1.25
        first, last = out.record.notes["loss"]
        assert last < first
        expected = {name: scale * delta for name, delta in deltas_of(upgrade, path)[0].items()}
        check_against(upgrade, path, out.path / "adaptation", expected)
    else:
        assert scale == 1


def shrunk(source, base, folder, factor):
    """The same adaptation with its delta made smaller."""
    shutil.copytree(source, folder)
    tensors = weights(source)
    for name, tensor in tensors.items():
        inner = name.removeprefix(base.prefix + ".")
        if name.endswith("lora_B.weight"):
            tensors[name] = factor * tensor
        elif inner in base.body and inner != name:
            before = base.checkpoint[base.body[inner]]
            tensors[name] = before + factor * (tensor - before)
    file = "adapter_model" if (source / "adapter_config.json").exists() else "model"
    save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
    return folder


def test_scaled_by_group_turns_down_the_group_that_is_noise(tmp_path, bases, tuned, task_file):
    upgrade = Upgrade(*bases["bert"])
    path = tmp_path / "noisy" / "adaptation"
    shutil.copytree(tuned["bert", "full"] / "adaptation", path)
    tensors = weights(path)
    torch.manual_seed(4)
    for name, tensor in tensors.items():
        if ".layer." in name and kind_of(name) == "feed-forward" and tensor.dim() == 2:
            tensors[name] = tensor + 0.2 * torch.randn_like(tensor)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    out = run("scaled", upgrade, path, task_file, tmp_path / "out", Scaling(labels=64))
    scales = out.record.notes["scales"]
    assert list(scales) == ["embedding", "attention", "feed-forward"]  # the upgrade left all norms as they were
    assert scales["feed-forward"] < 1 < scales["embedding"]
    deltas, _ = deltas_of(upgrade, path)
    check_against(
        upgrade, path, out.path / "adaptation", {n: scales.get(kind_of(n), 1.0) * d for n, d in deltas.items()}
    )


def test_the_scaling_of_each_module_is_its_own(tmp_path, bases, task_file):
    """rsLoRA's factor, and an alpha of some modules: the same adapter as with all factors at 1."""
    upgrade = Upgrade(*bases["bert"])
    path = adapt(upgrade.old, "rslora", tmp_path / "rs" / "adaptation")
    config = json.loads((path / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"intermediate.dense": 9}
    (path / "adapter_config.json").write_text(json.dumps(config))
    before = weights(path)
    after = weights(run("orthogonal", upgrade, path, task_file, tmp_path / "out").path / "adaptation")
    for name in before:
        if not name.endswith("lora_A.weight"):
            continue
        factor = (9 if "intermediate" in name else 2 * RANK) / RANK**0.5
        module = name.removeprefix("base_model.model.bert.").replace(".lora_A", "")
        shift = (
            upgrade.new.checkpoint[upgrade.new.body[module]] - upgrade.old.checkpoint[upgrade.old.body[module]]
        ).double()
        dense = factor * before[name.replace("lora_A", "lora_B")].double() @ before[name].double()
        change = dense - (dense * shift).sum() / shift.square().sum() * shift
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        found = factor * after[name.replace("lora_A", "lora_B")].double() @ after[name].double()
        torch.testing.assert_close(found, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], rtol=1e-5, atol=1e-6)


def test_a_lora_that_began_in_its_base_is_reworked_as_a_plain_one(tmp_path, bases, task_file, quick):
    upgrade = Upgrade(*bases["bert"])
    model = attach(
        fresh_model(upgrade.old, HEAD, 1), upgrade.old, HEAD, new_config("pissa", upgrade.old, HEAD, rank=RANK), 1
    )
    model.save_pretrained(str(tmp_path / "start"), save_embedding_layers=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path / "old" / "adaptation"
    model.save_pretrained(str(path), save_embedding_layers=False)  # as PEFT leaves it, with its start in its base
    assert load_adaptation(path).changed_base
    out = run("trimmed", upgrade, path, task_file, tmp_path / "out", Trimming(0.5))
    after, before, start = weights(out.path / "adaptation"), weights(path), weights(tmp_path / "start")
    for name in before:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            dense = before[other].double() @ before[name].double() - start[other].double() @ start[name].double()
            cut = dense.abs().flatten().sort(descending=True).values[round(0.5 * dense.numel()) - 1]
            u, s, vt = torch.linalg.svd(torch.where(dense.abs() >= cut, dense, 0.0), full_matrices=False)
            wanted = (u[:, : 2 * RANK] * s[: 2 * RANK]) @ vt[: 2 * RANK]
            torch.testing.assert_close(after[other].double() @ after[name].double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["scaled", "masked", "trimmed", "orthogonal"])
@pytest.mark.parametrize("kind", ["prefix", "dora", "ia3", "bottleneck"])
def test_kinds_that_are_no_change_of_weights_are_refused(tmp_path, bases, task_file, method, kind):
    if (method, kind) == ("scaled", "bottleneck"):
        return
    upgrade = Upgrade(*bases["bert"])
    path = adapt(upgrade.old, kind, tmp_path / "old" / "adaptation")
    with pytest.raises(RecipeError, match=rf"this method supports .*, not {kind}"):
        run(method, upgrade, path, task_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bottlenecks_are_scaled_at_their_second_layer(tmp_path, bases, task_file):
    upgrade = Upgrade(*bases["bert"])
    path = adapt(upgrade.old, "bottleneck", tmp_path / "old" / "adaptation")
    out = run("scaled", upgrade, path, task_file, tmp_path / "out", Scaling(scale=0.5))
    before, after = weights(path), weights(out.path / "adaptation")
    for name in before:
        assert torch.equal(after[name], before[name] * (0.5 if ".up." in name else 1)), name


def test_a_fresh_head_is_no_judge(tmp_path, bases, task_file):
    upgrade = Upgrade(*bases["bert"])
    path = adapt(upgrade.old, "full", tmp_path / "old" / "adaptation")
    for method in ("scaled", "masked"):
        with pytest.raises(RecipeError, match="head must be copy"):
            run(method, upgrade, path, task_file, tmp_path / method, head="fresh")
    trimmed = run("trimmed", upgrade, path, task_file, tmp_path / "trimmed", head="fresh")
    direct = run("direct", upgrade, path, task_file, tmp_path / "direct", head="fresh")
    one, other = (weights(outcome.path / "adaptation")["classifier.weight"] for outcome in (trimmed, direct))
    assert torch.equal(one, other)


def test_options_out_of_range():
    for make in (
        lambda: Scaling(scale=float("nan")),
        lambda: Scaling(scale="much"),
        lambda: Scaling(labels=-1),
        lambda: Scaling(confidence=2),
        lambda: Masking(labels=-1),
        lambda: Trimming(density=0),
        lambda: Trimming(density=1.5),
    ):
        with pytest.raises(RecipeError):
            make()
    assert parse_options("scaled", ["scale=0.5", "grouped=false"]) == Scaling(scale=0.5, grouped=False)
    assert parse_options("trimmed", ["density=0.25", "drop=true"]) == Trimming(0.25, drop=True)
