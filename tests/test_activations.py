"""Training-free methods that look at activations: `ridge` and `aligned`, against what they must give."""

import shutil

import pytest
import torch
from conftest import HEAD, LABELS, adapt, move_base, weights, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from regraft import Base, Recipe, Upgrade, load_adaptation, recycle
from regraft.adaptation import fresh_model, load_model
from regraft.errors import RecipeError
from regraft.methods.aligned import Alignment
from regraft.methods.ridge import Ridge
from regraft.model import encode, predict
from regraft.model.blockwise import BlockwiseForward
from regraft.task import load_data
from regraft.weights import match_effect, rotation

FEW = Recipe(steps=4, batch_size=8, learning_rate=3e-3, eval_every=2, precision="fp32")
KINDS = ("full", "lora", "bottleneck")
ARCHITECTURES = ("bert", "roberta", "distilbert", "llama")


def logits_of(path, base, task_file):
    data = load_data(task_file, 20).relabel(LABELS)
    return predict(load_model(load_adaptation(path), base, HEAD), encode(base, data, data.test), "fp32")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 10))
def test_match_effect_is_the_least_squares_with_a_prior(seed, ridge):
    """The same by stacking the prior as rows of a plain least-squares problem."""
    torch.manual_seed(seed)
    old, new, delta = torch.randn(9, 4).double(), torch.randn(9, 4).double(), torch.randn(3, 4).double()
    cross, second = old.T @ new / 9, new.T @ new / 9
    strength = ridge * second.diagonal().mean()
    rows = torch.cat([new / 3, strength.sqrt() * torch.eye(4).double()])
    wanted = torch.cat([old @ delta.T / 3, strength.sqrt() * delta.T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(match_effect(delta, cross, second, ridge), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(match_effect(delta, cross, second, 1e12), delta, rtol=1e-6, atol=1e-8)
    assert torch.equal(match_effect(delta, second, second, ridge), delta)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8))
def test_rotation_is_found_and_left_alone_where_nothing_is_seen(seed, width):
    torch.manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width).double()).Q
    old = torch.randn(40, width).double()
    torch.testing.assert_close(rotation((old @ turn.T).T @ old, 0.0), turn, rtol=0, atol=1e-8)
    assert torch.equal(rotation(old.T @ old, 1.0), torch.eye(width).double())
    old[:, -1] = 0
    found = rotation(old.T @ old, 0.1)
    torch.testing.assert_close(found, torch.eye(width).double(), rtol=0, atol=1e-8)
    with pytest.raises(RecipeError, match=r"1\.5"):
        rotation(old.T @ old, 1.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_walk_sees_what_a_forward_pass_sees(bases, task_file, architecture):
    base = Base.open(bases[architecture][0])
    data = load_data(task_file, 20)
    examples = encode(base, data, data.dev)
    model = fresh_model(base, HEAD, 0)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    walk, seen = BlockwiseForward(model, examples, "fp32"), {}
    for _ in range(walk.parts):
        walk.run(linear, lambda name, batch, fed, given: seen.setdefault(name, []).append((fed, given)))
        walk.run(advance=True)
    whole = {}
    handles = [
        m.register_forward_hook(lambda m, a, o: whole.setdefault(walk.names[m], []).append((a[0], o))) for m in linear
    ]
    with torch.no_grad():
        for batch in walk.batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    assert seen.keys() == whole.keys() == {walk.names[m] for m in linear}
    for name, parts in seen.items():
        assert len(parts) == len(walk.batches)
        for (fed, out), (all_fed, all_given), batch in zip(parts, whole[name], walk.batches, strict=True):
            mask = batch["attention_mask"].bool()
            if name == "score":
                rows = torch.arange(len(mask)), mask.sum(dim=1) - 1
            else:
                rows = mask if all_fed.dim() == 3 else slice(None)
            torch.testing.assert_close(fed.float(), all_fed[rows], rtol=0, atol=1e-6)
            torch.testing.assert_close(out.float(), all_given[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_upgrade_that_changed_nothing_gives_the_old_weights(tmp_path, bases, task_file, architecture, kind):
    old = Base.open(bases[architecture][0])
    path = adapt(old, kind, tmp_path / "old" / "adaptation")
    before = weights(path)
    for method in ("ridge", "aligned"):
        out = recycle(Upgrade(old, old), path, task_file, method, tmp_path / method, recipe=FEW)
        after = weights(out.path / "adaptation")
        assert before.keys() == after.keys()
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5 if method == "aligned" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strong_ridge_and_a_full_shrinkage_are_direct(tmp_path, bases, task_file, kind):
    upgrade = Upgrade(*bases["bert"])
    path = adapt(upgrade.old, kind, tmp_path / "old" / "adaptation")
    direct = weights(recycle(upgrade, path, task_file, "direct", tmp_path / "d", recipe=FEW).path / "adaptation")
    for method, options in (("ridge", Ridge(ridge=1e9)), ("aligned", Alignment(shrink=1))):
        out = recycle(upgrade, path, task_file, method, tmp_path / method, recipe=FEW, options=options)
        found = weights(out.path / "adaptation")
        for name, tensor in direct.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        assert out.record.cost.steps == out.record.cost.labels == 0


@pytest.mark.parametrize("kind", KINDS)
def test_ridge_brings_the_effect_of_a_moved_base_back(tmp_path, bases, task_file, kind):
    """On a base moved far the outputs come nearer to the old tuned model's than with direct."""
    old = Base.open(bases["bert"][0])
    new = Base.open(move_base(old.path, tmp_path / "new", 0.2))
    path = adapt(old, kind, tmp_path / "old" / "adaptation")
    wanted = logits_of(path, old, task_file)
    error = {}
    for method, options in (("direct", None), ("ridge", Ridge(ridge=0.1))):
        out = recycle(Upgrade(old, new), path, task_file, method, tmp_path / method, recipe=FEW, options=options)
        error[method] = float((logits_of(out.path / "adaptation", new, task_file) - wanted).norm())
    assert error["ridge"] < 0.7 * error["direct"]


def permute_bert(base, folder, seed=5):
    """The same function with hidden units and inner neurons in another order: a re-trained base in the extreme."""
    shutil.copytree(base.path, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(32, generator=generator)
    for name, tensor in tensors.items():
        if "position_ids" in name:
            continue
        inner = (
            torch.randperm(64, generator=torch.Generator().manual_seed(seed + int(name.split(".")[3])))
            if "layer." in name
            else None
        )
        value = tensor
        if "embeddings" in name:
            value = value[..., hidden]
        elif "attention.self" in name:
            value = value[:, hidden] if value.dim() == 2 else value
        elif "attention.output.dense" in name:
            value = value[hidden]
        elif "intermediate" in name:
            value = value[inner][:, hidden] if value.dim() == 2 else value[inner]
        elif "output.dense" in name:
            value = value[hidden][:, inner] if value.dim() == 2 else value[hidden]
        elif "LayerNorm" in name and name.startswith("bert."):
            value = value[hidden]
        elif name == "cls.predictions.transform.dense.weight":
            value = value[:, hidden]
        tensors[name] = value.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Base.open(folder)


def rotate_llama(base, folder, seed=5):
    """The same function with the residual stream rotated: exact where the norms' gains are 1."""
    shutil.copytree(base.path, folder)
    tensors = load_file(folder / "model.safetensors")
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).double()).Q
    for name, tensor in tensors.items():
        wide = tensor.double()
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            wide = turn @ wide
        else:
            wide = wide @ turn.T
        tensors[name] = wide.to(tensor.dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Base.open(folder)


@pytest.mark.parametrize(
    ("architecture", "kind"), [("bert", "full"), ("bert", "lora"), ("bert", "bottleneck"), ("llama", "lora")]
)
def test_aligned_recovers_the_tuned_function_on_a_turned_base(tmp_path, task_file, architecture, kind):
    folder = write_base(tmp_path / "base", architecture, initializer_range=0.3)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(7)
    for name, tensor in tensors.items():  # features of full rank, as trained models have them
        tensors[name] = tensor + 0.1 * torch.randn(tensor.shape) if name.endswith("bias") else tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    old = Base.open(folder)
    new = (permute_bert if architecture == "bert" else rotate_llama)(old, tmp_path / "new")
    path = adapt(old, kind, tmp_path / "old" / "adaptation")
    wanted = logits_of(path, old, task_file)
    error = {}
    for method, options in (("direct", None), ("aligned", Alignment(shrink=0.0))):
        out = recycle(Upgrade(old, new), path, task_file, method, tmp_path / method, recipe=FEW, options=options)
        error[method] = float((logits_of(out.path / "adaptation", new, task_file) - wanted).abs().max())
    assert error["aligned"] < 1e-3 < 0.05 < error["direct"]


@pytest.mark.parametrize("method", ["ridge", "aligned"])
@pytest.mark.parametrize("kind", ["prefix", "dora", "ia3"])
def test_kinds_that_change_no_linear_layer_are_refused(tmp_path, bases, task_file, method, kind):
    upgrade = Upgrade(*bases["bert"])
    path = adapt(upgrade.old, kind, tmp_path / "old" / "adaptation")
    with pytest.raises(RecipeError, match=rf"a {kind} it cannot carry"):
        recycle(upgrade, path, task_file, method, tmp_path / "out", recipe=FEW)
    assert not (tmp_path / "out").exists()


def test_options_out_of_range():
    for make in (
        lambda: Ridge(ridge=0),
        lambda: Ridge(texts=0),
        lambda: Alignment(shrink=2),
        lambda: Alignment(texts=0),
    ):
        with pytest.raises(RecipeError):
            make()
