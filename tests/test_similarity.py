"""The similarity of two models, against naive computations and for models of known similarity."""

import copy
import dataclasses
import itertools

import pytest
import torch
from helpers import ARCHITECTURES, add_noise, load_tuned_model, write_adaptation, write_base, write_upgrade
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from regraft import Base, load_adaptation
from regraft.diagnosis.comparison import Moments, head_divergences
from regraft.diagnosis.similarity import similarity
from regraft.errors import MismatchError, RecipeError
from regraft.model import attention, encode, predict
from regraft.model.outputs import model_inputs


@pytest.fixture(scope="module")
def attentive_bert(tmp_path_factory):
    """A base and its BERT with four heads per layer that attend to different tokens, as trained heads do."""
    base = Base.open(write_base(tmp_path_factory.mktemp("four") / "base", num_attention_heads=4))
    model = load_tuned_model(write_adaptation(base, "full", base.path.parent / "tuned"), base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query.weight", "key.weight")):
                parameter.mul_(8)
    return base, model


def swap_heads(model, layer, a, b):
    """Swap two heads of a BERT layer, which does not change the model's outputs."""
    block = model.bert.encoder.layer[layer].attention
    width = block.self.attention_head_size
    order = list(range(block.self.num_attention_heads))
    order[a], order[b] = b, a
    rows = torch.cat([torch.arange(head * width, (head + 1) * width) for head in order])
    with torch.no_grad():
        for linear in (block.self.query, block.self.key, block.self.value):
            linear.weight.copy_(linear.weight[rows].clone())
            linear.bias.copy_(linear.bias[rows].clone())
        block.output.dense.weight.copy_(block.output.dense.weight[:, rows].clone())


def flatten(table):
    return torch.tensor(table).flatten()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6))
def test_divergence_equals_that_of_scipy(seed, heads, rows, keys):
    torch.manual_seed(seed)
    first, second = (torch.randn(heads, rows, keys).mul(3).softmax(dim=-1) for _ in range(2))
    first[:, 0] = torch.nn.functional.one_hot(torch.tensor(keys - 1), keys).float()  # zeros are allowed
    divergences = head_divergences(first, second)
    for i in range(heads):
        for j in range(heads):
            pairs = zip(first[i].double().numpy(), second[j].double().numpy(), strict=True)
            expected = sum(float(jensenshannon(p, q, base=2)) ** 2 for p, q in pairs)
            assert float(divergences[i, j]) == pytest.approx(expected, abs=1e-6)
    assert head_divergences(first, first).diagonal().abs().max() == 0
    assert divergences.min() >= 0 and divergences.max() <= rows + 1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 7), st.sampled_from([0.0, 1.0, 100.0]))
def test_cka_equals_its_definition_and_ignores_rotation_and_scale(seed, x_width, y_width, mean):
    torch.manual_seed(seed)
    x, y = torch.randn(40, x_width) + mean, torch.randn(40, y_width) - mean
    y[:, 0] += x[:, 0]

    def compute_in_batches(x, y):
        moments = Moments()
        for start in range(0, 40, 7):
            moments.add(x[start : start + 7], y[start : start + 7])
        return moments.cka()

    x_centred, y_centred = ((features - features.mean(dim=0)).double() for features in (x, y))
    x_gram, y_gram = x_centred @ x_centred.T, y_centred @ y_centred.T
    expected = float((x_gram * y_gram).sum() / (x_gram.norm() * y_gram.norm()))
    assert compute_in_batches(x, y) == pytest.approx(expected, abs=1e-4)
    rotation = torch.linalg.qr(torch.randn(y_width, y_width)).Q
    assert compute_in_batches(x, 3 * y @ rotation + 2) == pytest.approx(expected, abs=1e-3)
    assert compute_in_batches(x, x) == pytest.approx(1)


def test_cka_of_constant_features_is_1_with_constant_ones_and_0_with_varying_ones():
    constant = torch.ones(5, 3)
    moments = Moments()
    moments.add(constant, torch.randn(5, 2))
    assert moments.cka() == 0
    moments = Moments()
    moments.add(constant, constant)
    assert moments.cka() == 1


def test_identical_models_are_similar_by_every_measure(attentive_bert, data):
    base, model = attentive_bert
    for identical in (model, copy.deepcopy(model)):
        result = similarity(model, identical, base, data, texts=20)
        assert flatten(result.divergence).max() == 0
        assert flatten(result.cosine).min() == pytest.approx(1)
        assert result.best == ((0, 1, 2, 3),) * 2
        assert result.cka == pytest.approx([1] * 3)
        assert (result.kl, result.agreement, result.texts) == (0, 1, 20)
        assert flatten(result.others).min() > 0.01
        assert result.control.name == "random weights (seed 0)"
        assert flatten(result.control.divergence).min() > 0.01 and min(result.control.cka) < 0.9


def test_swapped_heads_are_found(attentive_bert, data):
    base, model = attentive_bert
    swapped = copy.deepcopy(model)
    swap_heads(swapped, 1, 0, 2)
    texts = encode(base, data, data.dev)
    torch.testing.assert_close(predict(model, texts, "fp32"), predict(swapped, texts, "fp32"), rtol=0, atol=1e-5)
    result = similarity(model, swapped, base, data)
    assert result.best == ((0, 1, 2, 3), (2, 1, 0, 3))
    assert result.divergence[1][0] > 0.01 and result.divergence[1][2] > 0.01
    assert max(result.divergence[0] + (result.divergence[1][1], result.divergence[1][3])) < 1e-6
    assert result.kl < 1e-6 and result.agreement == 1
    assert [(shown.layer, shown.head) in ((1, 0), (1, 2)) for shown in result.maps] == [True, False, False, True]


def test_figures_equal_those_of_a_naive_loop_over_texts(attentive_bert, data):
    base, model = attentive_bert
    perturbed = add_noise(copy.deepcopy(model), 0.05, seed=1)
    result = similarity(model, perturbed, base, data, texts=12)
    indices = [*range(0, 100, 9)]
    examples = encode(base, data, data.test.take(indices))
    assert result.texts == len(indices)
    divergences = torch.zeros(2, 4, 4).double()
    num_tokens = 0
    logits = []
    states = []
    with attention.eager_attention(model, perturbed):
        for i in range(len(indices)):  # without padding
            inputs = model_inputs(examples.batch([i]))
            with torch.no_grad():
                a, b = (m(**inputs, output_attentions=True, output_hidden_states=True) for m in (model, perturbed))
            for layer, j, k in itertools.product(range(2), range(4), range(4)):
                p, q = a.attentions[layer][0, j].double(), b.attentions[layer][0, k].double()
                divergences[layer, j, k] += float((jensenshannon(p, q, base=2, axis=1) ** 2).sum())
            num_tokens += len(examples.columns["input_ids"][i])
            logits.append((a.logits[0].double(), b.logits[0].double()))
            states.append((a.hidden_states[1][0], b.hidden_states[1][0]))
    divergences /= num_tokens
    matched = divergences.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(torch.tensor(result.divergence).double(), matched, rtol=1e-4, atol=1e-7)
    expected = (divergences.sum(dim=2) - matched) / 3
    torch.testing.assert_close(torch.tensor(result.others).double(), expected, rtol=1e-4, atol=1e-7)
    p, q = (torch.stack(model_logits).softmax(dim=1) for model_logits in zip(*logits, strict=True))
    assert result.kl == pytest.approx(float((p * (p / q).log()).sum(dim=1).mean()), rel=1e-4)
    assert result.agreement == float((p.argmax(dim=1) == q.argmax(dim=1)).double().mean())
    moments = Moments()
    moments.add(*(torch.cat(model_states) for model_states in zip(*states, strict=True)))
    assert result.cka[1] == pytest.approx(moments.cka(), abs=1e-5)


def test_similarity_does_not_depend_on_the_batch_size(attentive_bert, data, monkeypatch):
    base, model = attentive_bert
    swapped = copy.deepcopy(model)
    swap_heads(swapped, 0, 1, 3)
    one_batch = similarity(model, swapped, base, data, texts=30)
    updates = []
    monkeypatch.setattr(attention, "MAX_ATTENTION_ELEMENTS", 10_000)
    many_batches = similarity(model, swapped, base, data, texts=30, progress=lambda *update: updates.append(update[:3]))
    assert len(updates) > 3 and updates[-1] == ("similarity", 30, 30)
    for name in ("divergence", "cosine", "others"):
        actual, expected = (flatten(getattr(result, name)) for result in (one_batch, many_batches))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert one_batch.best == many_batches.best and one_batch.cka == pytest.approx(many_batches.cka, abs=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_upgrade_is_more_similar_than_random_weights(opened_bases, data, tmp_path, architecture, kind):
    old, new = opened_bases[architecture]
    first, second = (
        load_tuned_model(write_adaptation(base, kind, tmp_path / name), base)
        for base, name in ((old, "old"), (new, "new"))
    )
    before = attention.unwrap_model(first).config._attn_implementation
    result = similarity(first, second, old, data, texts=10, maps=3)
    assert attention.unwrap_model(first).config._attn_implementation == before != "eager"
    assert (flatten(result.divergence) < flatten(result.control.divergence)).all()
    assert (torch.tensor(result.cka) > torch.tensor(result.control.cka)).all()
    assert flatten(result.divergence).min() > 0 and flatten(result.cosine).min() > 0.9
    assert torch.tensor(result.divergence).shape == (2, 2) and len(result.cka) == 3 and len(result.maps) == 3
    shown = result.maps[0]
    assert shown.divergence == flatten(result.divergence).max()
    for attention_map in map(torch.tensor, (shown.old, shown.new)):
        assert attention_map.shape == (len(shown.tokens),) * 2
        torch.testing.assert_close(attention_map.sum(dim=1), torch.ones(len(shown.tokens)), rtol=0, atol=1e-3)
    if architecture == "llama":
        assert torch.tensor(shown.old).triu(1).abs().max() == 0


def test_query_heads_that_share_keys_are_compared(data, tmp_path):
    base = Base.open(write_base(tmp_path / "old", "llama", num_attention_heads=4, num_key_value_heads=2))
    new = Base.open(write_upgrade(base.path, tmp_path / "new", 0.02))
    first, second = (
        load_tuned_model(write_adaptation(tuned_base, "full", tmp_path / folder), tuned_base)
        for tuned_base, folder in ((base, "old-tuned"), (new, "new-tuned"))
    )
    result = similarity(first, second, base, data, texts=10)
    assert torch.tensor(result.divergence).shape == (2, 4)
    assert (flatten(result.divergence) < flatten(result.control.divergence)).all()


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("bert", "prefix"), ("roberta", "prompt"), ("roberta", "prefix"), ("llama", "prefix"), ("bert", "bottleneck")],
)
def test_adapters_with_virtual_tokens_and_bottlenecks_are_compared(opened_bases, data, tmp_path, architecture, kind):
    old, new = opened_bases[architecture]
    path = write_adaptation(old, kind, tmp_path / "old")
    data = data.with_virtual_tokens(load_adaptation(path).num_virtual_tokens, old.max_input_length)
    first, second = load_tuned_model(path, old), load_tuned_model(path, new)
    identical = similarity(first, load_tuned_model(path, old), old, data, texts=10)
    assert flatten(identical.divergence).max() == 0 and identical.kl == 0
    result = similarity(first, second, old, data, texts=10)
    assert 0 < flatten(result.divergence).mean() < flatten(result.control.divergence).mean()
    assert torch.tensor(result.maps[0].old).shape == (len(result.maps[0].tokens),) * 2


def test_a_control_can_be_passed(attentive_bert, data):
    base, model = attentive_bert
    result = similarity(model, model, base, data, control=model, control_name="another seed", texts=5)
    assert result.control.name == "another seed"
    assert flatten(result.control.divergence).max() == 0 and result.control.cka == pytest.approx([1] * 3)


def test_models_that_cannot_be_compared_are_refused(attentive_bert, opened_bases, data, tmp_path):
    base, model = attentive_bert
    bert = opened_bases["bert"][0]
    two_heads = load_tuned_model(write_adaptation(bert, "full", tmp_path / "two"), bert)
    with pytest.raises(MismatchError, match=r"layer 0: heads, .* \(4, .* \(2, .*one architecture"):
        similarity(model, two_heads, base, data, control=model)
    deeper = Base.open(write_base(tmp_path / "deep", num_attention_heads=4, num_hidden_layers=3))
    with pytest.raises(MismatchError, match="2 attention layers, the other 3"):
        similarity(model, load_tuned_model(write_adaptation(deeper, "full", tmp_path / "three"), deeper), base, data)
    with pytest.raises(RecipeError, match="found 0 and 4"):
        similarity(model, model, base, data, texts=0)


def test_a_model_without_attention_maps_is_refused(attentive_bert, data, monkeypatch):
    base, model = attentive_bert
    fused = copy.deepcopy(model).train()
    was_training = model.training
    monkeypatch.setattr(type(fused), "set_attn_implementation", lambda *_: None)  # fused attention stays
    with pytest.raises(MismatchError, match="BertForSequenceClassification gives no attention maps"):
        similarity(fused, model, base, data)
    assert fused.training and model.training == was_training


def test_similarity_is_deterministic_and_reads_no_labels(attentive_bert, data):
    base, model = attentive_bert
    torch.manual_seed(5)
    result = similarity(model, model, base, data, texts=8)
    random_number = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), random_number)  # the caller's random state is unchanged
    unlabelled = dataclasses.replace(data, labelled=False, test=None, dev=data.test)
    assert similarity(model, model, base, unlabelled, texts=8) == result
