"""Low-rank approximation, sparse deltas and LoRA arithmetic, compared with numpy, closed forms and PEFT."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import RecipeError
from regraft.progress import quiet
from regraft.weights import (
    add_factors,
    compress_factors,
    delta,
    dora_weight,
    drop,
    inner_product,
    interpolate,
    lora_delta,
    low_rank,
    mask_conflicts,
    orthogonal_part,
    scaling,
    subtract_factors,
    trim,
)

SEEDS = st.integers(0, 2**31)
LENGTHS = st.integers(1, 12)
few_examples = settings(deadline=None, max_examples=60)  # fewer than hypothesis's default of 100, to save time


def draw_normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def l2_norm(tensor):
    return tensor.double().norm().item()


@few_examples
@given(SEEDS, LENGTHS, LENGTHS)
def test_full_rank_reproduces_the_delta(seed, rows, columns):
    change = draw_normal(seed, rows, columns)
    b, a = low_rank(change, rank=max(rows, columns))
    assert b.shape == (rows, min(rows, columns))
    torch.testing.assert_close(b @ a, change, atol=1e-10, rtol=1e-10)
    factors = low_rank(change.to(torch.bfloat16), rank=min(rows, columns))
    assert factors[0].dtype == factors[1].dtype == torch.float32


@few_examples
@given(SEEDS, LENGTHS, LENGTHS, st.integers(1, 12))
def test_the_error_of_low_rank_equals_the_bound_of_eckart_and_young(seed, rows, columns, rank):
    change = draw_normal(seed, rows, columns)
    singular_values = np.linalg.svd(change.numpy(), compute_uv=False)
    b, a = low_rank(change, rank=rank)
    assert l2_norm(change - b @ a) == pytest.approx(math.sqrt((singular_values[rank:] ** 2).sum()), abs=1e-9)


@few_examples
@given(SEEDS, LENGTHS, LENGTHS, st.floats(0.01, 1))
def test_energy_selects_the_smallest_sufficient_rank(seed, rows, columns, energy):
    change = draw_normal(seed, rows, columns)
    a = low_rank(change, energy=energy)[1]
    energies = np.linalg.svd(change.numpy(), compute_uv=False) ** 2
    assert energies[: len(a)].sum() >= energy * energies.sum() * (1 - 1e-9)
    assert energies[: len(a) - 1].sum() < energy * energies.sum()


@few_examples
@given(SEEDS, LENGTHS, LENGTHS, st.integers(1, 4), st.booleans())
def test_second_moments_minimise_the_error_of_the_outputs(seed, rows, columns, rank, is_diagonal):
    change = draw_normal(seed, rows, columns)
    inputs = draw_normal(seed + 1, columns, 40) * torch.logspace(-1, 1, columns)[:, None]
    moments = inputs @ inputs.T / 40
    if is_diagonal:
        moments = torch.diag(moments.diagonal())
    b, a = low_rank(change, rank, second_moment=moments.diagonal() if is_diagonal else moments)
    plain_b, plain_a = low_rank(change, rank)

    def output_error(approximation):
        error = change - approximation
        return torch.trace(error @ moments @ error.T).item()

    singular_values = np.linalg.svd((change @ torch.linalg.cholesky(moments)).numpy(), compute_uv=False)
    assert output_error(b @ a) == pytest.approx((singular_values[rank:] ** 2).sum(), abs=1e-8)
    assert output_error(b @ a) <= output_error(plain_b @ plain_a) + 1e-9


def test_no_rank_is_spent_on_inputs_that_are_always_zero():
    change = draw_normal(0, 4, 6)
    moments = torch.tensor([1.0, 0, 2, 0, 0, 0])
    b, a = low_rank(change, 2, second_moment=moments)
    torch.testing.assert_close((b @ a)[:, [0, 2]], change[:, [0, 2]], atol=1e-5, rtol=1e-5)
    b, a = low_rank(change, 6, second_moment=moments)
    torch.testing.assert_close(b @ a, change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_low_rank_refuses_options_out_of_range(options):
    with pytest.raises(RecipeError, match=r"rank|energy"):
        low_rank(torch.ones(2, 2), **options)


@few_examples
@given(SEEDS, LENGTHS, LENGTHS, st.floats(0, 1))
def test_trim_keeps_the_largest_elements(seed, rows, columns, density):
    change = draw_normal(seed, rows, columns)
    trimmed = trim(change, density)
    is_kept = trimmed != 0
    assert int(is_kept.sum()) == round(density * change.numel())
    assert torch.equal(trimmed[is_kept], change[is_kept])
    if is_kept.any() and not is_kept.all():
        assert change[is_kept].abs().min() >= change[~is_kept].abs().max()


def test_drop_keeps_the_expectation():
    change = torch.full((200_000,), 3.0)
    dropped = drop(change, 0.25, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, 12.0}
    assert dropped.mean().item() == pytest.approx(3.0, rel=0.02)
    assert torch.equal(drop(change, 1.0, torch.Generator()), change)
    for density in (0.0, -0.1, 1.1):
        with pytest.raises(RecipeError, match="density"):
            drop(change, density, torch.Generator())


@few_examples
@given(SEEDS, LENGTHS)
def test_mask_agreement_selects_the_elements_with_the_sign_of_the_shift(seed, size):
    change, shift = draw_normal(seed, size), draw_normal(seed + 1, size)
    masked = mask_conflicts(change, shift)
    assert ((masked == 0) | (masked * shift > 0)).all()
    assert torch.equal(masked + mask_conflicts(change, -shift), change)
    assert torch.equal(mask_conflicts(change, torch.zeros(size)), change)


@few_examples
@given(SEEDS, LENGTHS)
def test_orthogonal_shift_removes_the_component_along_the_shift(seed, size):
    change, shift = draw_normal(seed, size), draw_normal(seed + 1, size)
    orthogonal = orthogonal_part(change, shift)
    assert (orthogonal @ shift).item() == pytest.approx(0, abs=1e-9 * l2_norm(change) * l2_norm(shift) + 1e-12)
    assert l2_norm(orthogonal) ** 2 + l2_norm(change - orthogonal) ** 2 == pytest.approx(l2_norm(change) ** 2)
    assert torch.equal(orthogonal_part(change, torch.zeros(size)), change)
    torch.testing.assert_close(orthogonal_part(shift, shift), torch.zeros_like(shift), atol=1e-12, rtol=0)


@few_examples
@given(SEEDS, LENGTHS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.floats(-1, 2))
def test_interpolate_equals_the_formula(seed, size, dtype, t):
    first, second = draw_normal(seed, size).to(dtype), draw_normal(seed + 1, size).to(dtype)
    assert torch.equal(interpolate(first, second, 0.0), first)
    assert torch.equal(interpolate(first, second, 1.0), second)
    exact = (1 - t) * first.double() + t * second.double()
    bound = torch.finfo(dtype).eps * (exact.abs() + 1e-3 * (first.double().abs() + second.double().abs()))
    assert ((interpolate(first, second, t).double() - exact).abs() <= bound).all()
    assert torch.equal(delta(second, first), second.float() - first.float())


@few_examples
@given(SEEDS, LENGTHS, LENGTHS, st.integers(1, 5), st.integers(1, 5))
def test_operations_on_factors_equal_operations_on_their_products(seed, rows, columns, rank, second_rank):
    first = draw_normal(seed, rows, rank), draw_normal(seed + 1, rank, columns)
    second = draw_normal(seed + 2, rows, second_rank), draw_normal(seed + 3, second_rank, columns)
    first_product, second_product = (b @ a for b, a in (first, second))
    b, a = add_factors(first, second)
    torch.testing.assert_close(b @ a, first_product + second_product)
    b, a = subtract_factors(first, second)
    torch.testing.assert_close(b @ a, first_product - second_product)
    assert inner_product(first, second) == pytest.approx((first_product * second_product).sum().item(), abs=1e-9)
    assert math.sqrt(max(inner_product(first, first), 0)) == pytest.approx(l2_norm(first_product), abs=1e-7)
    b, a = compress_factors(*first, rank=min(2, rank))
    best_b, best_a = low_rank(first_product, rank=min(2, rank))
    torch.testing.assert_close(b @ a, best_b @ best_a, atol=1e-8, rtol=1e-8)


@pytest.fixture
def plain_model():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=20, **size))


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}]
)
def test_scalings_and_dora_equal_the_ones_of_peft(plain_model, options):
    from peft import LoraConfig, get_peft_model

    with quiet():
        model = get_peft_model(
            plain_model, LoraConfig(r=4, lora_alpha=6, target_modules=["query", "output.dense"], **options)
        )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * 1.3 + 0.2 * noise if "magnitude" in name else noise
    layers = [module for module in model.modules() if "default" in getattr(module, "lora_A", {})]
    assert len(layers) == 3
    for layer in layers:
        weight = layer.base_layer.weight.data
        a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        factor = scaling(4, 6, options.get("use_rslora", False))
        assert factor == layer.scaling["default"]
        if options.get("use_dora"):
            merged = dora_weight(weight, b, a, factor, layer.lora_magnitude_vector["default"].weight.data)
        else:
            merged = weight.double() + lora_delta(b, a, factor)
        layer.merge()
        torch.testing.assert_close(merged.float(), layer.base_layer.weight.data, atol=1e-5, rtol=1e-5)
