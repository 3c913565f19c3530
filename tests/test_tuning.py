"""Tuning and distillation: the order of examples, batches, losses, recipes and the selection of the best weights."""

import math

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, compute_distillation_loss, make_task_data
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft import Base, Distillation, Recipe, load_adaptation, tune
from regraft.adaptation import fresh_model, load_model
from regraft.errors import RecipeError
from regraft.model import Deployment, encode, predict
from regraft.model.outputs import Output, model_inputs
from regraft.progress import silent
from regraft.task import Split, load_data
from regraft.tuning import LEARNING_RATES, distillation_loss, plan_order, tune_model
from regraft.tuning.distill import compute_teacher_outputs

orders = st.tuples(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(0, 2**31),
)


@given(orders)
def test_order_is_made_of_passes_over_the_examples(case):
    lengths, batch_size, steps, seed = case
    order = plan_order(np.array(lengths), batch_size, steps, seed)
    assert len(order) == batch_size * steps
    counts = np.bincount(order, minlength=len(lengths))
    total = batch_size * steps
    assert counts.min() >= total // len(lengths)
    assert counts.max() <= math.ceil(total / len(lengths))
    assert (order == plan_order(np.array(lengths), batch_size, steps, seed)).all()


def test_order_depends_on_the_seed():
    lengths = np.arange(1, 101)
    first, second = (plan_order(lengths, 10, 20, seed) for seed in (20, 30))
    assert (first != second).any()


def test_passes_of_full_batches_do_not_mix():
    order = plan_order(np.arange(1, 101), 10, 30, seed=20)
    for start in (0, 100, 200):
        assert sorted(order[start : start + 100]) == list(range(100))


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(4, 32))
def test_batches_are_of_similar_length(seed, batch_size):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 129, size=1000)

    def padding(order):
        batches = lengths[order].reshape(-1, batch_size)
        return int((batches.max(axis=1, keepdims=True) - batches).sum())

    steps = 1000 // batch_size
    planned = plan_order(lengths, batch_size, steps, seed)
    assert padding(planned) < 0.5 * padding(random.permutation(1000)[: steps * batch_size])


def test_batch_order_does_not_fall_from_long_to_short():
    lengths = np.arange(1, 201)
    means = lengths[plan_order(lengths, 10, 20, seed=20)].reshape(-1, 10).mean(axis=1)
    assert (np.diff(means) > 0).any()
    assert (np.diff(means) < 0).any()


def encode_texts(base, texts, max_length):
    count = len(texts)
    split = Split("train", "memory", texts, np.arange(count) % 2, np.arange(count) + 1)
    return encode(base, make_task_data(split, max_length=max_length), split)


@pytest.fixture
def opened_bases(bases):
    return {name: Base.open(old) for name, (old, _) in bases.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "texts",
    [
        [("good film",), ("the very bad meal was cold and bitter",), ("song",)],
        [("good film", "the book"), ("a", "this scene was very dull and muddy"), ("it was the end", "fine")],
    ],
    ids=["single", "pairs"],
)
def test_batch_equals_the_tokenizers_padded_batch(opened_bases, architecture, texts):
    base = opened_bases[architecture]
    examples = encode_texts(base, texts, 64)
    indices = [2, 0, 1]
    batch = examples.batch(indices)
    base.tokenizer.padding_side = "right"
    expected = base.tokenizer(
        [texts[i][0] for i in indices],
        [texts[i][1] for i in indices] if len(texts[0]) == 2 else None,
        padding=True,
        return_tensors="pt",
    )
    assert model_inputs(batch).keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    assert batch["row"].tolist() == indices
    assert batch["targets"].tolist() == [0, 0, 1]


def test_pairs_have_token_types_if_the_tokenizer_has_them(tmp_path, bases):
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    base = Base.open(bases["bert"][0])
    inner = Tokenizer.from_str(base.tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    base.__dict__["tokenizer"] = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=64, pad_token="<pad>", model_input_names=names
    )
    batch = encode_texts(base, [("good film", "the book was fine"), ("a", "it")], 64).batch([0, 1])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [9, 5]


def test_long_texts_are_truncated(opened_bases):
    examples = encode_texts(opened_bases["bert"], [("good " * 200,), ("film",)], 32)
    assert examples.lengths.tolist() == [32, 3]
    assert encode_texts(opened_bases["roberta"], [("good " * 200,)], 512).lengths.tolist() == [64]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predict_equals_plain_forward_passes_in_the_order_of_the_examples(opened_bases, task_file, architecture):
    base = opened_bases[architecture]
    data = load_data(task_file, 20)
    model = fresh_model(base, data.head, seed=1).train()
    split = data.test.take(range(70))
    logits = predict(model, encode(base, data.with_settings(max_length=32), split), "fp32")
    assert model.training
    model.eval()
    with torch.no_grad():
        for row, (text,) in enumerate(split.texts):
            plain = model(**base.tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).logits[0]
            torch.testing.assert_close(logits[row], plain, atol=1e-5, rtol=0)


def reference_loss(z_s, y, z_t, h_s, h_t, alpha, beta, temperature, reduction):
    """Compute the distillation loss element by element, with a gradient from autograd."""

    def softmax(z):
        e = torch.exp(z - z.max(dim=1, keepdim=True).values)
        return e / e.sum(dim=1, keepdim=True)

    batch, classes = z_s.shape
    ce = -sum(torch.log(softmax(z_s))[i, y[i]] for i in range(batch)) / batch
    p_t, p_s = softmax(z_t / temperature), softmax(z_s / temperature)
    kl = sum(p_t[i, c] * torch.log(p_t[i, c] / p_s[i, c]) for i in range(batch) for c in range(classes))
    kl = kl / (batch if reduction == "batchmean" else batch * classes)
    mse = ((h_s - h_t) ** 2).sum() / h_s.numel()
    return (1 - alpha) * ce + alpha * temperature**2 * kl + beta * 0.5 * mse


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    classes=st.integers(2, 6),
    layers=st.integers(1, 3),
    width=st.integers(1, 7),
    alpha=st.sampled_from([0.0, 0.7, 1.0]),
    beta=st.sampled_from([0.0, 2.0]),
    temperature=st.sampled_from([1.0, 5.0, 20.0]),
    reduction=st.sampled_from(["batchmean", "mean"]),
    seed=st.integers(0, 1000),
)
def test_distillation_loss_equals_the_formula(batch, classes, layers, width, alpha, beta, temperature, reduction, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 3

    z_t, h_t = draw(batch, classes), draw(batch, layers, width)
    z_s, h_s = draw(batch, classes).requires_grad_(), draw(batch, layers, width).requires_grad_()
    y = torch.randint(classes, (batch,), generator=generator)
    options = Distillation(alpha, beta, temperature, reduction)
    loss = compute_distillation_loss(distillation_loss, z_s, y, z_t, h_s, h_t, options)
    expected = reference_loss(z_s, y, z_t, h_s, h_t, alpha, beta, temperature, reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    gradients, expected_gradients = (
        torch.autograd.grad(value, (z_s, h_s), allow_unused=True, materialize_grads=True) for value in (loss, expected)
    )
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)


def test_known_values_of_the_distillation_loss():
    hidden = torch.zeros(1, 1, 1)
    student, teacher, label = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]]), torch.tensor([0])

    def loss(**options):
        distillation = Distillation(**{"alpha": 1.0, "beta": 0.0, "temperature": 1.0, **options})
        return compute_distillation_loss(
            distillation_loss, student, label, teacher, hidden + 3, hidden + 1, distillation
        ).item()

    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss() == pytest.approx(divergence)
    assert loss(kl_reduction="mean") == pytest.approx(divergence / 2)
    assert loss(alpha=0.0) == pytest.approx(math.log(2))
    assert loss(alpha=0.25) == pytest.approx(0.75 * math.log(2) + 0.25 * divergence)
    assert loss(beta=2.0) == pytest.approx(divergence + 4.0)  # 2 · ½ · 2²


def test_gradient_is_zero_if_the_student_equals_the_teacher():
    logits = torch.randn(4, 3, requires_grad=True)
    hidden = torch.randn(4, 2, 5, requires_grad=True)
    options = Distillation(alpha=1.0, beta=5.0, temperature=5.0)
    loss = compute_distillation_loss(
        distillation_loss, logits, torch.zeros(4, dtype=torch.long), logits.detach(), hidden, hidden.detach(), options
    )
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.abs().max() < 1e-6
    assert hidden.grad.abs().max() == 0


@pytest.mark.parametrize(
    "options", [{"alpha": 1.1}, {"alpha": -0.1}, {"beta": -1}, {"temperature": 0}, {"kl_reduction": "sum"}]
)
def test_distillation_options_out_of_range_are_refused(options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        Distillation(**options)


def test_row_states_are_hidden_states_at_the_heads_token():
    layers = tuple(torch.randn(3, 5, 4) for _ in range(4))
    states = Output(torch.zeros(3, 2), torch.arange(3), torch.tensor([2, 4, 0]), layers).row_states()
    assert states.shape == (3, 3, 4)  # embeddings and all layers but the last
    for layer in range(3):
        assert torch.equal(
            states[:, layer], torch.stack([layers[layer][0, 2], layers[layer][1, 4], layers[layer][2, 0]])
        )


@pytest.mark.parametrize("architecture", ["roberta", "llama"])
def test_teacher_runs_each_used_example_once(opened_bases, tuned_outcomes, task_file, tmp_path, architecture):
    base = opened_bases[architecture]
    data = load_data(task_file, 20)
    teacher = load_model(load_adaptation(tuned_outcomes[architecture, "full"]), base, data.head)
    data = data.with_settings(max_length=32)
    examples = encode(base, data, data.train)
    order = np.array([5, 3, 5, 200, 3, 77])
    batch_sizes = []
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    def compute():
        deployment = Deployment(teacher, base, data, "fp32")
        outputs = compute_teacher_outputs(
            deployment, data.train, order, Distillation(beta=1.0, temperature=5.0), tmp_path
        )
        return outputs.signal.logits, outputs.hidden

    logits, hidden = compute()
    assert sum(batch_sizes) == 4
    cached_logits, cached_hidden = compute()
    assert sum(batch_sizes) == 4
    assert torch.equal(cached_logits, logits)
    assert torch.equal(cached_hidden, hidden)
    with torch.no_grad():
        for i in set(order.tolist()):
            ids = torch.tensor([examples.columns["input_ids"][i]])
            plain = teacher(input_ids=ids, output_hidden_states=True)
            position = -1 if base.is_decoder else 0
            states = torch.stack([layer[0, position] for layer in plain.hidden_states[:-1]])
            torch.testing.assert_close(logits[i], plain.logits[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(hidden[i].float(), states, atol=1e-2, rtol=1e-2)  # stored in bfloat16
    unused = sorted(set(range(len(examples))) - set(order.tolist()))
    assert logits[unused].abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("epochs", 0),
        ("epochs", -1),
        ("batch_size", 0),
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("eval_every", 0),
        ("save_every", 0),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("precision", "fp16"),
    ],
)
def test_recipe_values_out_of_range_are_refused(name, value):
    with pytest.raises(RecipeError, match=name):
        Recipe(**{name: value})


@given(st.integers(5, 10**6))
def test_number_of_evaluations_is_five_to_twelve(steps):
    resolved = Recipe(steps=steps).resolve(1000, 1e-3)
    assert 5 <= math.ceil(steps / resolved.eval_every) <= 12  # the last step is always evaluated
    assert resolved.eval_every == Recipe(steps=steps, seed=7).resolve(5, 1e-5).eval_every


def test_resolve_sets_missing_values_only():
    resolved = Recipe(epochs=3, batch_size=16).resolve(3200, LEARNING_RATES["lora"])
    assert (resolved.steps, resolved.learning_rate) == (600, 5e-4)
    assert resolved.precision in ("bf16", "fp32")
    assert Recipe(epochs=0.5).resolve(32000, LEARNING_RATES["full"]).steps == 1000
    complete = Recipe(steps=7, learning_rate=0.25, eval_every=100, precision="bf16").resolve(320, 1.0)
    assert (complete.steps, complete.learning_rate, complete.eval_every, complete.precision) == (7, 0.25, 7, "bf16")
    assert Recipe(epochs=0.001).resolve(3, 1.0).steps >= 1
    assert LEARNING_RATES["full"] == 5e-5


def test_nan_loss_is_an_error_that_names_the_step(opened_bases, task_file, tmp_path):
    base = opened_bases["bert"]
    data = load_data(task_file, 20)
    model = fresh_model(base, data.head, seed=1)
    recipe = Recipe(steps=30, eval_every=10, learning_rate=1e-3, precision="fp32").resolve(len(data.train), 1.0)
    with torch.no_grad():
        model.classifier.weight[0, 0] = math.nan
    with pytest.raises(RecipeError, match=r"held-out loss became nan at step 0\. Lower the learning rate \(0\.001\)"):
        tune_model(model, base, data, recipe, tmp_path, silent)


def test_divergence_after_the_last_logged_loss_publishes_nothing(bases, task_file, tmp_path):
    recipe = Recipe(steps=13, eval_every=13, warmup=0.95, batch_size=8, learning_rate=1500.0, precision="fp32", seed=23)
    with pytest.raises(RecipeError, match=r"became nan at step 1\d\. Lower the learning rate \(1500\.0\)"):
        tune(bases["bert"][0], task_file, tmp_path / "out", recipe=recipe)
    assert not list(tmp_path.iterdir())


def test_model_ends_with_its_best_weights(opened_bases, task_file, tmp_path):
    base = opened_bases["bert"]
    data = load_data(task_file, 20)
    recipe = Recipe(steps=30, eval_every=3, learning_rate=0.02, precision="fp32").resolve(len(data.train), 1.0)
    model = fresh_model(base, data.head, seed=1)
    curve = tune_model(model, base, data, recipe, tmp_path, silent)
    predicted = predict(model, encode(base, data.with_settings(max_length=32), data.dev), "fp32").argmax(dim=1).numpy()
    assert (predicted == data.dev.labels).mean() == pytest.approx(max(point["score"] for point in curve))
    assert [point["step"] for point in curve] == list(range(0, 31, 3))
