"""How alike two models work inside, against naive computations and models whose likeness is known."""

import copy
import dataclasses

import pytest
import torch
from conftest import ARCHITECTURES, HEAD, LABELS, adapt, move_base, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from regraft import Base, load_adaptation
from regraft.adaptation import load_model
from regraft.diagnosis.comparison import Moments, head_divergences
from regraft.diagnosis.similarity import similarity
from regraft.errors import MismatchError, RecipeError
from regraft.model import attention, encode, predict
from regraft.model.outputs import model_inputs
from regraft.task import load_data


@pytest.fixture(scope="module")
def data(task_file):
    return load_data(task_file, 20).relabel(LABELS)


@pytest.fixture(scope="module")
def attentive(tmp_path_factory):
    """A BERT of four heads a layer that attend to different places, as trained ones do."""
    base = Base.open(write_base(tmp_path_factory.mktemp("four") / "base", num_attention_heads=4))
    model = load(adapt(base, "full", base.path.parent / "tuned"), base)
    sharpen(model)
    return base, model


def load(path, base):
    return load_model(load_adaptation(path), base, HEAD)


def sharpen(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("query.weight", "key.weight")):
                parameter.mul_(8)


def swap_heads(model, layer, one, other):
    """Exchange two heads of a BERT layer; what the model computes stays as it is."""
    block = model.bert.encoder.layer[layer].attention
    width = block.self.attention_head_size
    order = list(range(block.self.num_attention_heads))
    order[one], order[other] = other, one
    rows = torch.cat([torch.arange(head * width, (head + 1) * width) for head in order])
    with torch.no_grad():
        for linear in (block.self.query, block.self.key, block.self.value):
            linear.weight.copy_(linear.weight[rows].clone())
            linear.bias.copy_(linear.bias[rows].clone())
        block.output.dense.weight.copy_(block.output.dense.weight[:, rows].clone())


def flat(table):
    return torch.tensor(table).flatten()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6))
def test_divergence_is_scipys(seed, heads, rows, keys):
    torch.manual_seed(seed)
    first, second = (torch.randn(heads, rows, keys).mul(3).softmax(dim=-1) for _ in range(2))
    first[:, 0] = torch.nn.functional.one_hot(torch.tensor(keys - 1), keys).float()  # zeros are no trouble
    found = head_divergences(first, second)
    for i in range(heads):
        for j in range(heads):
            pairs = zip(first[i].double().numpy(), second[j].double().numpy(), strict=True)
            expected = sum(float(jensenshannon(p, q, base=2)) ** 2 for p, q in pairs)
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)
    assert head_divergences(first, first).diagonal().abs().max() == 0
    assert found.min() >= 0 and found.max() <= rows + 1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 7), st.sampled_from([0.0, 1.0, 100.0]))
def test_cka_is_the_naive_one_and_blind_to_rotation_and_scale(seed, left, right, mean):
    torch.manual_seed(seed)
    x, y = torch.randn(40, left) + mean, torch.randn(40, right) - mean
    y[:, 0] += x[:, 0]

    def streamed(a, b):
        moments = Moments()
        for start in range(0, 40, 7):
            moments.add(a[start : start + 7], b[start : start + 7])
        return moments.cka()

    a, b = ((side - side.mean(dim=0)).double() for side in (x, y))
    gram, other = a @ a.T, b @ b.T
    expected = float((gram * other).sum() / (gram.norm() * other.norm()))
    assert streamed(x, y) == pytest.approx(expected, abs=1e-4)
    turn = torch.linalg.qr(torch.randn(right, right)).Q
    assert streamed(x, 3 * y @ turn + 2) == pytest.approx(expected, abs=1e-3)
    assert streamed(x, x) == pytest.approx(1)


def test_cka_of_features_that_never_vary():
    moments, still = Moments(), torch.ones(5, 3)
    moments.add(still, torch.randn(5, 2))
    assert moments.cka() == 0
    same = Moments()
    same.add(still, still)
    assert same.cka() == 1


def test_identical_models_are_alike_in_everything(attentive, data):
    base, model = attentive
    for other in (model, copy.deepcopy(model)):
        found = similarity(model, other, base, data, texts=20)
        assert flat(found.divergence).max() == 0
        assert flat(found.cosine).min() == pytest.approx(1)
        assert found.best == ((0, 1, 2, 3),) * 2
        assert found.cka == pytest.approx([1] * 3)
        assert (found.kl, found.agreement, found.texts) == (0, 1, 20)
        assert flat(found.others).min() > 0.01
        assert found.control.name == "random weights (seed 0)"
        assert flat(found.control.divergence).min() > 0.01 and min(found.control.cka) < 0.9


def test_swapped_heads_are_found(attentive, data):
    base, model = attentive
    swapped = copy.deepcopy(model)
    swap_heads(swapped, 1, 0, 2)
    texts = encode(base, data, data.dev)
    torch.testing.assert_close(predict(model, texts, "fp32"), predict(swapped, texts, "fp32"), rtol=0, atol=1e-5)
    found = similarity(model, swapped, base, data)
    assert found.best == ((0, 1, 2, 3), (2, 1, 0, 3))
    assert found.divergence[1][0] > 0.01 and found.divergence[1][2] > 0.01
    assert max(found.divergence[0] + (found.divergence[1][1], found.divergence[1][3])) < 1e-6
    assert found.kl < 1e-6 and found.agreement == 1
    assert [(shown.layer, shown.head) in ((1, 0), (1, 2)) for shown in found.maps] == [True, False, False, True]


def test_figures_are_those_of_a_naive_loop_over_texts(attentive, data, opened, tmp_path):
    """Text by text, without padding: what batches of the longest first must come to."""
    base, model = attentive
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = similarity(model, other, base, data, texts=12)
    ids = [*range(0, 100, 9)]
    examples = encode(base, data, data.test.take(ids))
    assert found.texts == len(ids)
    diverged, rows, logits, states = torch.zeros(2, 4, 4).double(), 0, [], []
    with attention.eager_attention(model, other):
        for i in range(len(ids)):
            inputs = model_inputs(examples.batch([i]))
            with torch.no_grad():
                a, b = (m(**inputs, output_attentions=True, output_hidden_states=True) for m in (model, other))
            for layer in range(2):
                for one in range(4):
                    for two in range(4):
                        p, q = a.attentions[layer][0, one].double(), b.attentions[layer][0, two].double()
                        diverged[layer, one, two] += float((jensenshannon(p, q, base=2, axis=1) ** 2).sum())
            rows += len(examples.columns["input_ids"][i])
            logits.append((a.logits[0].double(), b.logits[0].double()))
            states.append((a.hidden_states[1][0], b.hidden_states[1][0]))
    diverged /= rows
    matched = diverged.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(torch.tensor(found.divergence).double(), matched, rtol=1e-4, atol=1e-7)
    others = (diverged.sum(dim=2) - matched) / 3
    torch.testing.assert_close(torch.tensor(found.others).double(), others, rtol=1e-4, atol=1e-7)
    p, q = (torch.stack(side).softmax(dim=1) for side in zip(*logits, strict=True))
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(dim=1).mean()), rel=1e-4)
    assert found.agreement == float((p.argmax(dim=1) == q.argmax(dim=1)).double().mean())
    moments = Moments()
    moments.add(*(torch.cat(side) for side in zip(*states, strict=True)))
    assert found.cka[1] == pytest.approx(moments.cka(), abs=1e-5)


def test_the_size_of_batches_changes_nothing(attentive, data, monkeypatch):
    base, model = attentive
    other = copy.deepcopy(model)
    swap_heads(other, 0, 1, 3)
    whole = similarity(model, other, base, data, texts=30)
    told = []
    monkeypatch.setattr(attention, "CELLS", 10_000)
    parts = similarity(model, other, base, data, texts=30, progress=lambda *given: told.append(given[:3]))
    assert len(told) > 3 and told[-1] == ("similarity", 30, 30)
    for name in ("divergence", "cosine", "others"):
        torch.testing.assert_close(flat(getattr(whole, name)), flat(getattr(parts, name)), rtol=1e-4, atol=1e-6)
    assert whole.best == parts.best and whole.cka == pytest.approx(parts.cka, abs=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_upgrade_is_nearer_than_a_stranger(opened, data, tmp_path, architecture, kind):
    old, new = opened[architecture]
    first, second = (load(adapt(base, kind, tmp_path / name), base) for base, name in ((old, "old"), (new, "new")))
    before = attention.unwrap_model(first).config._attn_implementation
    found = similarity(first, second, old, data, texts=10, maps=3)
    assert attention.unwrap_model(first).config._attn_implementation == before != "eager"
    assert (flat(found.divergence) < flat(found.control.divergence)).all()
    assert (torch.tensor(found.cka) > torch.tensor(found.control.cka)).all()
    assert flat(found.divergence).min() > 0 and flat(found.cosine).min() > 0.9
    assert torch.tensor(found.divergence).shape == (2, 2) and len(found.cka) == 3 and len(found.maps) == 3
    shown = found.maps[0]
    assert shown.divergence == flat(found.divergence).max()
    for rows in (shown.old, shown.new):
        assert torch.tensor(rows).shape == (len(shown.tokens),) * 2
        torch.testing.assert_close(torch.tensor(rows).sum(dim=1), torch.ones(len(rows)), rtol=0, atol=1e-3)
    if architecture == "llama":
        assert torch.tensor(shown.old).triu(1).abs().max() == 0


def test_query_heads_that_share_keys(data, tmp_path):
    base = Base.open(write_base(tmp_path / "old", "llama", num_attention_heads=4, num_key_value_heads=2))
    new = Base.open(move_base(base.path, tmp_path / "new", 0.02))
    first, second = (load(adapt(b, "full", tmp_path / f"tuned-{i}"), b) for i, b in enumerate((base, new)))
    found = similarity(first, second, base, data, texts=10)
    assert torch.tensor(found.divergence).shape == (2, 4)
    assert (flat(found.divergence) < flat(found.control.divergence)).all()


@pytest.mark.parametrize(
    ("architecture", "kind"), [("bert", "prefix"), ("roberta", "prompt"), ("llama", "prefix"), ("bert", "bottleneck")]
)
def test_virtual_tokens_and_bottlenecks(opened, data, tmp_path, architecture, kind):
    old, new = opened[architecture]
    path = adapt(old, kind, tmp_path / "old")
    data = data.with_virtual_tokens(load_adaptation(path).virtual_tokens, old.longest)
    first, second = load(path, old), load(path, new)
    same = similarity(first, load(path, old), old, data, texts=10)
    assert flat(same.divergence).max() == 0 and same.kl == 0
    found = similarity(first, second, old, data, texts=10)
    assert 0 < flat(found.divergence).mean() < flat(found.control.divergence).mean()
    assert torch.tensor(found.maps[0].old).shape == (len(found.maps[0].tokens),) * 2


def test_a_control_may_be_given(attentive, data):
    base, model = attentive
    found = similarity(model, model, base, data, control=model, control_name="another seed", texts=5)
    assert found.control.name == "another seed"
    assert flat(found.control.divergence).max() == 0 and found.control.cka == pytest.approx([1] * 3)


def test_what_cannot_be_compared_is_refused(attentive, opened, data, tmp_path):
    base, model = attentive
    bert = opened["bert"][0]
    two_heads = load(adapt(bert, "full", tmp_path / "two"), bert)
    with pytest.raises(MismatchError, match=r"layer 0: heads, .* \(4, .* \(2, .*one architecture"):
        similarity(model, two_heads, base, data, control=model)
    deeper = Base.open(write_base(tmp_path / "deep", num_attention_heads=4, num_hidden_layers=3))
    with pytest.raises(MismatchError, match="2 layers that attend, the other 3"):
        similarity(model, load(adapt(deeper, "full", tmp_path / "three"), deeper), base, data)
    with pytest.raises(RecipeError, match="found 0 and 4"):
        similarity(model, model, base, data, texts=0)


def test_a_model_without_attention_maps_is_refused(attentive, data, monkeypatch):
    base, model = attentive
    silent_one, was_training = copy.deepcopy(model).train(), model.training
    monkeypatch.setattr(type(silent_one), "set_attn_implementation", lambda *_: None)  # it stays with fused attention
    with pytest.raises(MismatchError, match="BertForSequenceClassification gives no attention maps"):
        similarity(silent_one, model, base, data)
    assert silent_one.training and model.training == was_training


def test_it_is_the_same_every_time_and_reads_no_labels(attentive, data):
    base, model = attentive
    torch.manual_seed(5)
    one = similarity(model, model, base, data, texts=8)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # the caller's own random numbers are left alone
    unlabelled = dataclasses.replace(data, labelled=False, test=None, dev=data.test)
    assert similarity(model, model, base, unlabelled, texts=8) == one
