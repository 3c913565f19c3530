"""The training-free methods that use activations, `ridge` and `aligned`, on cases with a known result."""

import shutil
from collections import defaultdict

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    FEW_STEPS,
    HEAD,
    compute_test_logits,
    read_weights,
    write_adaptation,
    write_base,
    write_upgrade,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from regraft import Base, Upgrade, recycle
from regraft.adaptation import fresh_model
from regraft.errors import RecipeError
from regraft.methods.aligned import Alignment
from regraft.methods.ridge import Ridge
from regraft.model import encode
from regraft.model.blockwise import BlockwiseForward
from regraft.task import load_data
from regraft.weights import match_effect, rotation

KINDS = ("full", "lora", "bottleneck")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 10))
def test_match_effect_solves_the_regularised_least_squares_problem(seed, ridge):
    """The reference appends the regularisation as rows of an ordinary least-squares problem."""
    torch.manual_seed(seed)
    old, new, delta = torch.randn(9, 4).double(), torch.randn(9, 4).double(), torch.randn(3, 4).double()
    cross_moment, second_moment = old.T @ new / 9, new.T @ new / 9
    strength = ridge * second_moment.diagonal().mean()
    rows = torch.cat([new / 3, strength.sqrt() * torch.eye(4).double()])
    targets = torch.cat([old @ delta.T / 3, strength.sqrt() * delta.T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(match_effect(delta, cross_moment, second_moment, ridge), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(match_effect(delta, cross_moment, second_moment, 1e12), delta, rtol=1e-6, atol=1e-8)
    assert torch.equal(match_effect(delta, second_moment, second_moment, ridge), delta)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8))
def test_rotation_recovers_an_orthogonal_matrix_and_keeps_inactive_features(seed, width):
    torch.manual_seed(seed)
    orthogonal = torch.linalg.qr(torch.randn(width, width).double()).Q
    old = torch.randn(40, width).double()
    new = old @ orthogonal.T
    torch.testing.assert_close(rotation(new.T @ old, 0.0), orthogonal, rtol=0, atol=1e-8)
    assert torch.equal(rotation(old.T @ old, 1.0), torch.eye(width).double())
    old[:, -1] = 0
    estimate = rotation(old.T @ old, 0.1)
    torch.testing.assert_close(estimate, torch.eye(width).double(), rtol=0, atol=1e-8)
    with pytest.raises(RecipeError, match=r"1\.5"):
        rotation(old.T @ old, 1.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blockwise_forward_records_the_activations_of_a_forward_pass(bases, task_file, architecture):
    base = Base.open(bases[architecture][0])
    data = load_data(task_file, 20)
    examples = encode(base, data, data.dev)
    model = fresh_model(base, HEAD, 0)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    blockwise = BlockwiseForward(model, examples, "fp32")
    blockwise_activations, expected_activations = defaultdict(list), defaultdict(list)

    def record_blockwise(name, batch, inputs, outputs):
        blockwise_activations[name].append((inputs, outputs))

    def record_expected(module, inputs, outputs):
        expected_activations[blockwise.names[module]].append((inputs[0], outputs))

    for _ in range(blockwise.num_parts):
        blockwise.run(layers, record_blockwise)
        blockwise.run(advance=True)
    handles = [layer.register_forward_hook(record_expected) for layer in layers]
    with torch.no_grad():
        for batch in blockwise.batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    layer_names = {blockwise.names[layer] for layer in layers}
    assert blockwise_activations.keys() == expected_activations.keys() == layer_names
    for name in layer_names:
        for batch, activations, expected in zip(
            blockwise.batches, blockwise_activations[name], expected_activations[name], strict=True
        ):
            mask = batch["attention_mask"].bool()
            if name == "score":  # the classifier of a decoder reads the last token
                positions = (torch.arange(len(mask)), mask.sum(dim=1) - 1)
            elif expected[0].dim() == 3:
                positions = mask
            else:  # a pooler or classifier reads one vector per text
                positions = slice(None)
            for tensor, expected_tensor in zip(activations, expected, strict=True):
                torch.testing.assert_close(tensor.float(), expected_tensor[positions], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_upgrade_to_the_same_base_leaves_the_weights_unchanged(tmp_path, bases, task_file, architecture, kind):
    old = Base.open(bases[architecture][0])
    path = write_adaptation(old, kind, tmp_path / "old" / "adaptation")
    weights = read_weights(path)
    for method, tolerance in (("ridge", 0), ("aligned", 1e-5)):
        outcome = recycle(Upgrade(old, old), path, task_file, method, tmp_path / method, recipe=FEW_STEPS)
        recycled_weights = read_weights(outcome.path / "adaptation")
        assert weights.keys() == recycled_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(recycled_weights[name], weight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_ridge_and_aligned_approach_direct_under_strong_regularisation(tmp_path, bases, task_file, kind):
    upgrade = Upgrade(*bases["bert"])
    path = write_adaptation(upgrade.old, kind, tmp_path / "old" / "adaptation")
    direct = recycle(upgrade, path, task_file, "direct", tmp_path / "direct", recipe=FEW_STEPS)
    direct_weights = read_weights(direct.path / "adaptation")
    for method, options in (("ridge", Ridge(ridge=1e9)), ("aligned", Alignment(shrink=1))):
        outcome = recycle(upgrade, path, task_file, method, tmp_path / method, recipe=FEW_STEPS, options=options)
        recycled_weights = read_weights(outcome.path / "adaptation")
        for name, weight in direct_weights.items():
            torch.testing.assert_close(recycled_weights[name], weight, rtol=0, atol=1e-6)
        assert outcome.record.cost.steps == outcome.record.cost.labels == 0


@pytest.mark.parametrize("kind", KINDS)
def test_ridge_is_closer_to_the_old_logits_than_direct_on_a_distant_base(tmp_path, bases, task_file, kind):
    old = Base.open(bases["bert"][0])
    new = Base.open(write_upgrade(old.path, tmp_path / "new", 0.2))
    path = write_adaptation(old, kind, tmp_path / "old" / "adaptation")
    expected = compute_test_logits(path, old, task_file)
    upgrade, errors = Upgrade(old, new), {}
    for method, options in (("direct", None), ("ridge", Ridge(ridge=0.1))):
        outcome = recycle(upgrade, path, task_file, method, tmp_path / method, recipe=FEW_STEPS, options=options)
        errors[method] = float((compute_test_logits(outcome.path / "adaptation", new, task_file) - expected).norm())
    assert errors["ridge"] < 0.7 * errors["direct"]


def permute_bert(base, folder, seed=5):
    """Write a base that computes the same function with its hidden units and inner neurons permuted."""
    shutil.copytree(base.path, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(32, generator=generator)
    for name, tensor in tensors.items():
        if "position_ids" in name:
            continue
        is_matrix = tensor.dim() == 2
        if "layer." in name:
            layer_generator = torch.Generator().manual_seed(seed + int(name.split(".")[3]))
            inner = torch.randperm(64, generator=layer_generator)
        permuted = tensor
        if "embeddings" in name:
            permuted = tensor[..., hidden]
        elif "attention.self" in name:
            permuted = tensor[:, hidden] if is_matrix else tensor
        elif "attention.output.dense" in name:
            permuted = tensor[hidden]
        elif "intermediate" in name:
            permuted = tensor[inner][:, hidden] if is_matrix else tensor[inner]
        elif "output.dense" in name:
            permuted = tensor[hidden][:, inner] if is_matrix else tensor[hidden]
        elif "LayerNorm" in name and name.startswith("bert."):
            permuted = tensor[hidden]
        elif name == "cls.predictions.transform.dense.weight":
            permuted = tensor[:, hidden]
        tensors[name] = permuted.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Base.open(folder)


def rotate_llama(base, folder, seed=5):
    """Write a base that computes the same function with its residual stream rotated.

    The function stays the same because the gains of the norms are 1.
    """
    shutil.copytree(base.path, folder)
    tensors = load_file(folder / "model.safetensors")
    orthogonal = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).double()).Q
    for name, tensor in tensors.items():
        rotated = tensor.double()
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            rotated = orthogonal @ rotated
        else:
            rotated = rotated @ orthogonal.T
        tensors[name] = rotated.to(tensor.dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Base.open(folder)


@pytest.mark.parametrize(
    ("architecture", "kind"), [("bert", "full"), ("bert", "lora"), ("bert", "bottleneck"), ("llama", "lora")]
)
def test_aligned_recovers_the_tuned_function_on_a_permuted_or_rotated_base(tmp_path, task_file, architecture, kind):
    folder = write_base(tmp_path / "base", architecture, initializer_range=0.3)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(7)
    for name, tensor in tensors.items():
        if name.endswith("bias"):  # biases of zero would leave the features without full rank
            tensors[name] = tensor + 0.1 * torch.randn(tensor.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    old = Base.open(folder)
    transform_base = permute_bert if architecture == "bert" else rotate_llama
    new = transform_base(old, tmp_path / "new")
    path = write_adaptation(old, kind, tmp_path / "old" / "adaptation")
    expected = compute_test_logits(path, old, task_file)
    upgrade, errors = Upgrade(old, new), {}
    for method, options in (("direct", None), ("aligned", Alignment(shrink=0.0))):
        outcome = recycle(upgrade, path, task_file, method, tmp_path / method, recipe=FEW_STEPS, options=options)
        logits = compute_test_logits(outcome.path / "adaptation", new, task_file)
        errors[method] = float((logits - expected).abs().max())
    assert errors["aligned"] < 1e-3 < 0.05 < errors["direct"]


@pytest.mark.parametrize("method", ["ridge", "aligned"])
@pytest.mark.parametrize("kind", ["prefix", "dora", "ia3"])
def test_kinds_that_change_no_linear_layer_are_refused(tmp_path, bases, task_file, method, kind):
    upgrade = Upgrade(*bases["bert"])
    path = write_adaptation(upgrade.old, kind, tmp_path / "old" / "adaptation")
    with pytest.raises(RecipeError, match=f"this method supports .*, not {kind}"):
        recycle(upgrade, path, task_file, method, tmp_path / "out", recipe=FEW_STEPS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options_class", "values"),
    [(Ridge, {"ridge": 0}), (Ridge, {"texts": 0}), (Alignment, {"shrink": 2}), (Alignment, {"texts": 0})],
)
def test_options_of_ridge_and_aligned_out_of_range_are_refused(options_class, values):
    with pytest.raises(RecipeError):
        options_class(**values)
