"""Methods that train: their losses, the resumption of interrupted runs, and the recorded cost."""

import dataclasses
import itertools
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers import (
    NINE_STEPS,
    InterruptedRunError,
    add_noise,
    compute_distillation_loss,
    have_equal_tensors,
    interrupt_at,
    make_adapted_model,
    read_csv,
    read_weights,
    update_json,
    write_adaptation,
    write_table,
    write_upgrade,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from regraft import Distillation, Recipe, Upgrade, load_adaptation, recycle, tune
from regraft.adaptation import fresh_model, load_model, save_model, write_graft
from regraft.errors import DataError, MismatchError, OutcomeError, RecipeError
from regraft.methods.label_free import LabelFree
from regraft.model import Deployment, encode
from regraft.progress import silent
from regraft.recipe import decay_factor
from regraft.task import Head, TextRegression, load_data
from regraft.task.types import Signal
from regraft.task.types.likelihood import CATEGORICAL
from regraft.tuning import Anchoring, Interpolation, distillation_loss, plan_order
from regraft.tuning.anchor import anchored_objective, fisher_information
from regraft.tuning.distill import compute_teacher_outputs, distillation_objective, teacher_loss
from regraft.tuning.interpolate import blend, draw_points, interpolation_objective
from regraft.tuning.trainer import train
from regraft.tuning.tune import label_objective

OPTIONS = {
    "anchored": Anchoring(strength=0.1, weighting="fisher"),
    "interpolation": Interpolation(points=(0.3,), drawn=1, decay="cosine"),
    "label-free": LabelFree(),
    "init+distill": Distillation(flip_weight=1.0, decay="linear"),
}
LABEL_OBJECTIVE = label_objective(CATEGORICAL)


@pytest.fixture(scope="module")
def adaptations(tmp_path_factory, opened_bases, tuned_outcomes, data):
    """The adaptations of `tuned`, and adapters of more kinds with all trainable parameters changed."""
    folder = tmp_path_factory.mktemp("adaptations")
    kinds = [(name, kind) for name in ("bert", "llama") for kind in ("full", "lora")]
    adaptations = {key: tuned_outcomes[key] for key in kinds}
    for name, kind in (("bert", "bottleneck"), ("llama", "bottleneck"), ("bert", "pissa")):
        adaptations[name, kind] = folder / f"{name}-{kind}"
        write_adaptation(opened_bases[name][0], kind, adaptations[name, kind] / "adaptation", labels=data.labels)
    return adaptations


def have_equal_weights(*outcomes):
    return have_equal_tensors(*(read_weights(outcome.path / "adaptation") for outcome in outcomes))


FAST_CELLS = [("bert", "full"), ("llama", "lora")]
SLOW_CELLS = [("bert", "lora"), ("bert", "bottleneck"), ("bert", "pissa"), ("llama", "full"), ("llama", "bottleneck")]
INTERRUPTED_CELLS = [
    *(pytest.param(*cell, method) for cell in FAST_CELLS for method in OPTIONS),
    *(  # every second cell, so that each kind and each method is tested; `make contract` runs all
        pytest.param(*cell, method, marks=[pytest.mark.slow, *[pytest.mark.contract] * ((row + column) % 2)])
        for row, cell in enumerate(SLOW_CELLS)
        for column, method in enumerate(OPTIONS)
    ),
]


@pytest.mark.parametrize(("architecture", "kind", "method"), INTERRUPTED_CELLS)
def test_an_interrupted_run_resumes_to_the_same_weights(
    tmp_path, opened_bases, adaptations, task_file, architecture, kind, method
):
    upgrade = Upgrade(*opened_bases[architecture])
    source = adaptations[architecture, kind]
    arguments = {"recipe": dataclasses.replace(NINE_STEPS, average=0.3), "options": OPTIONS[method]}
    uninterrupted = recycle(upgrade, source, task_file, method, tmp_path / "uninterrupted", **arguments)
    out = tmp_path / "resumed"
    for step in (4, 8):
        with pytest.raises(InterruptedRunError):
            recycle(upgrade, source, task_file, method, out, **arguments, progress=interrupt_at("tune", step))
    resumed = recycle(upgrade, source, task_file, method, out, **arguments)
    assert have_equal_weights(uninterrupted, resumed)
    assert [point["loss"] for point in uninterrupted.curve] == [point["loss"] for point in resumed.curve]
    cost = uninterrupted.record.cost
    assert (cost.steps, cost.labels) == (9, 0 if method == "label-free" else 72)
    assert cost.seconds > 0
    if method != "label-free":
        direct = recycle(upgrade, source, task_file, "direct", tmp_path / "direct", recipe=NINE_STEPS)
        direct_weights, weights = (read_weights(outcome.path / "adaptation") for outcome in (direct, uninterrupted))
        assert direct_weights.keys() == weights.keys()
        assert uninterrupted.curve[0]["score"] == direct.scores["dev"]


@pytest.fixture(scope="module")
def regression(tmp_path_factory, task_file, opened_bases, quick_recipe):
    """A task of numbers far from 0, higher by 600 for positive sentences, and a full model tuned on it."""
    folder = tmp_path_factory.mktemp("regression")
    rng = np.random.default_rng(0)
    for split in ("train", "dev", "test"):
        rows = read_csv(task_file.with_name(f"{split}.csv"))
        numbers = [12_345 + 300 * (1 if row["label"] == "positive" else -1) + rng.normal(0, 50) for row in rows]
        numbered = [{"text": row["text"], "number": number} for row, number in zip(rows, numbers, strict=True)]
        write_table(folder / f"{split}.csv", numbered)
    (folder / "task.yaml").write_text(
        "type: text-regression\nname: prices\ntrain: train.csv\ndev: dev.csv\ntest: test.csv\ntext: text\n"
        "label: number\ntolerance: 150\nmetric: rmse\nmax_length: 32\n"
    )
    return folder / "task.yaml", tune(
        opened_bases["bert"][0], folder / "task.yaml", folder / "tuned", recipe=quick_recipe
    )


@pytest.mark.parametrize("method", OPTIONS)
def test_a_regression_is_recycled_in_the_units_of_its_targets(tmp_path, opened_bases, regression, method):
    task, source = regression
    assert source.scores["test"] < 120
    upgrade = Upgrade(*opened_bases["bert"])
    arguments = {"recipe": NINE_STEPS, "options": OPTIONS[method]}
    direct = recycle(upgrade, source.path, task, "direct", tmp_path / "direct", recipe=NINE_STEPS)
    whole = recycle(upgrade, source.path, task, method, tmp_path / "whole", **arguments)
    with pytest.raises(InterruptedRunError):
        recycle(upgrade, source.path, task, method, tmp_path / "resumed", **arguments, progress=interrupt_at("tune", 5))
    resumed = recycle(upgrade, source.path, task, method, tmp_path / "resumed", **arguments)
    assert have_equal_weights(whole, resumed)
    assert whole.scores["test"] < 120
    if method == "label-free":
        assert 0.9 < whole.curve[0]["score"] <= 1
    else:
        assert whole.curve[0]["score"] == pytest.approx(direct.scores["dev"], rel=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(whole.path / "adaptation").eval()
    tokenizer = AutoTokenizer.from_pretrained(whole.path / "adaptation")
    batch = tokenizer(load_data(task, 20).test.inputs[0][0], return_tensors="pt", truncation=True, max_length=32)
    assert model(**batch).logits.item() == pytest.approx(whole.predictions("test")[0], abs=0.1)
    fresh = recycle(upgrade, source.path, task, "direct", tmp_path / "fresh", recipe=NINE_STEPS, head="fresh")
    assert fresh.scores["test"] < 1_000  # near the mean, not near 0


def test_a_model_of_one_output_is_a_regression(tmp_path, opened_bases, regression, task_file):
    """As in transformers, if its config names no problem type."""
    task, source = regression
    upgrade = Upgrade(*opened_bases["bert"])
    shutil.copytree(source.path / "adaptation", tmp_path / "made")
    (tmp_path / "made" / "lineage.json").unlink()
    update_json(tmp_path / "made" / "config.json", problem_type=None)
    outcome = recycle(upgrade, tmp_path / "made", task, "direct", tmp_path / "direct", recipe=NINE_STEPS)
    assert outcome.scores["test"] < 120
    with pytest.raises(MismatchError, match=r"tuned for text-regression.* or correct problem_type \(None\)"):
        recycle(upgrade, tmp_path / "made", task_file, "direct", tmp_path / "refused", recipe=NINE_STEPS)
    adapter = tmp_path / "adapter"
    head = Head(TextRegression, ())
    model, start = make_adapted_model(upgrade.old, "lora", head)
    save_model(model, upgrade.old, head, adapter, start)
    (adapter / "lineage.json").unlink()
    recycle(upgrade, adapter, task, "direct", tmp_path / "adapted", recipe=NINE_STEPS)
    with pytest.raises(MismatchError, match=r"its head has 1 output, the task has 2 labels .* of type text-regression"):
        recycle(upgrade, adapter, task_file, "direct", tmp_path / "refused", recipe=NINE_STEPS)


def explicit_teacher_loss(logits, labels, teacher_logits, hidden, teacher_hidden, options):
    """The teacher's loss with flip weights, written out as loops over examples and classes."""
    batch, num_classes = logits.shape
    is_right = [int(teacher_logits[i].argmax()) == int(labels[i]) for i in range(batch)]
    unnormalised = [1 + options.flip_weight if is_right[i] else 1.0 for i in range(batch)]
    weight = [value * batch / sum(unnormalised) for value in unnormalised]
    assert sum(weight) == pytest.approx(batch)
    kl = mse = 0.0
    for i in range(batch):
        p_teacher = torch.exp(teacher_logits[i] / options.temperature)
        p_student = torch.exp(logits[i] / options.temperature)
        p_teacher, p_student = p_teacher / p_teacher.sum(), p_student / p_student.sum()
        kl = kl + weight[i] * sum(p_teacher[c] * torch.log(p_teacher[c] / p_student[c]) for c in range(num_classes))
        mse = mse + weight[i] * ((hidden[i] - teacher_hidden[i]) ** 2).sum() / hidden.numel()
    kl = kl / (batch if options.kl_reduction == "batchmean" else batch * num_classes)
    return options.alpha * options.temperature**2 * kl + options.beta * 0.5 * mse


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 6),
    num_classes=st.integers(2, 5),
    alpha=st.sampled_from([0.3, 1.0]),
    beta=st.sampled_from([0.0, 2.0]),
    temperature=st.sampled_from([1.0, 5.0]),
    reduction=st.sampled_from(["batchmean", "mean"]),
    flip_weight=st.sampled_from([0.0, 0.5, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_the_teachers_loss_equals_the_formula(
    batch, num_classes, alpha, beta, temperature, reduction, flip_weight, seed
):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_logits, teacher_hidden = randn(batch, num_classes), randn(batch, 2, 3)
    student_logits, student_hidden = randn(batch, num_classes), randn(batch, 2, 3)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    options = Distillation(alpha, beta, temperature, reduction, flip_weight)

    def loss_and_gradients(loss_function):
        logits, hidden = student_logits.clone().requires_grad_(), student_hidden.clone().requires_grad_()
        loss = loss_function(logits, labels, teacher_logits, hidden, teacher_hidden, options)
        gradients = torch.autograd.grad(loss, (logits, hidden), allow_unused=True, materialize_grads=True)
        return loss.detach(), *gradients

    actual, expected = (
        loss_and_gradients(partial(compute_distillation_loss, teacher_loss)),
        loss_and_gradients(explicit_teacher_loss),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_flip_weights_do_not_change_the_loss_of_true_labels():
    logits = torch.randn(6, 3)
    labels = torch.randint(3, (6,))
    teacher_logits = torch.randn(6, 3)
    hidden = torch.zeros(6, 1, 1)
    unweighted, weighted = (
        compute_distillation_loss(
            distillation_loss,
            logits,
            labels,
            teacher_logits,
            hidden,
            hidden,
            Distillation(0.0, 0.0, 5.0, flip_weight=w),
        )
        for w in (0.0, 3.0)
    )
    assert unweighted.item() == weighted.item() == torch.nn.functional.cross_entropy(logits, labels).item()


@given(st.integers(1, 500), st.sampled_from(["none", "linear", "cosine"]))
def test_fade_factors_decrease_from_1_to_0(steps, schedule):
    factors = [decay_factor(schedule, step, steps) for step in range(steps + 1)]
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(1 if schedule == "none" else 0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors))


def test_the_weight_of_the_teacher_fades():
    options = Distillation(alpha=0.8, beta=2.0, temperature=5.0, decay="linear")
    assert options.apply_decay(0, 10) == options
    halfway = options.apply_decay(5, 10)
    assert (halfway.alpha, halfway.beta) == (pytest.approx(0.4), pytest.approx(1.0))
    assert halfway.temperature == options.temperature
    constant = Distillation(alpha=0.8, beta=2.0, temperature=5.0)
    assert constant.apply_decay(9, 10) == constant


def compute_gradients(model, loss):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, trainable, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("weighting", ["plain", "fisher"])
@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_the_gradient_of_the_anchor_is_the_weighted_distance_from_the_start(opened_bases, data, weighting, decay):
    base = opened_bases["bert"][1]
    model = fresh_model(base, data.head, 1).eval()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    examples = encode(base, data, data.train)

    def batch():
        return examples.batch(range(6))

    fisher = fisher_information(model, examples, np.arange(20), CATEGORICAL, silent) if weighting == "fisher" else None
    objective = anchored_objective(LABEL_OBJECTIVE, model, fisher, Anchoring(0.7, weighting, decay), 10)
    start = {name: p.detach().clone() for name, p in trainable.items()}
    assert objective(model, batch(), 0).item() == LABEL_OBJECTIVE(model, batch(), 0).item()
    add_noise(model, seed=0)
    label_gradients = compute_gradients(model, LABEL_OBJECTIVE(model, batch(), 3))
    gradients = compute_gradients(model, objective(model, batch(), 3))
    factor = {"none": 1, "linear": 0.7, "cosine": 0.5 * (1 + np.cos(0.3 * np.pi))}[decay]
    for name, gradient, label_gradient in zip(trainable, gradients, label_gradients, strict=True):
        distance = trainable[name].detach() - start[name]
        expected = 0.7 * factor * (distance if fisher is None else fisher[name] * distance)
        torch.testing.assert_close(gradient - label_gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_fisher_information_is_the_mean_squared_gradient(opened_bases, data):
    base = opened_bases["llama"][0]
    model = fresh_model(base, data.head, 1).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "score" in name)
    examples = encode(base, data, data.train)
    fisher = fisher_information(model, examples, np.array([7, 3, 7, 5]), CATEGORICAL, silent)
    assert model.training
    model.eval()
    squared_gradients = []
    for index in (7, 3, 5):
        ids = torch.tensor([examples.columns["input_ids"][index]])
        log_likelihood = model(input_ids=ids).logits.log_softmax(dim=1)[0, data.train.labels[index]]
        squared_gradients.append([gradient.square() for gradient in compute_gradients(model, log_likelihood)])
    expected = [sum(squares) / 3 for squares in zip(*squared_gradients, strict=True)]
    mean = torch.cat([tensor.flatten() for tensor in expected]).mean()
    for actual, expected_tensor in zip(fisher.values(), expected, strict=True):
        torch.testing.assert_close(actual, expected_tensor / mean, rtol=1e-3, atol=1e-5)
    assert torch.cat([tensor.flatten() for tensor in fisher.values()]).mean().item() == pytest.approx(1, rel=1e-4)


@pytest.fixture
def make_student_and_teacher(tmp_path, opened_bases, adaptations, data):
    """Builds a student and a teacher that differ, the teacher's outputs, and a function that returns a batch."""

    def make(architecture, kind, options):
        old, new = opened_bases[architecture]
        adaptation = load_adaptation(adaptations[architecture, kind])
        write_graft(adaptation, Upgrade(old, new), tmp_path / "graft", silent)
        student = load_model(load_adaptation(tmp_path / "graft"), new, data.head, trainable=True).eval()
        teacher = load_model(adaptation, old, data.head).eval()
        examples = encode(old, data, data.train)
        deployment = Deployment(teacher, old, data, "fp32")
        teacher_outputs = compute_teacher_outputs(deployment, data.train, np.arange(6), options, tmp_path)
        return student, teacher, teacher_outputs, lambda: examples.batch(range(6))

    return make


def detached_parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("llama", "lora"), ("bert", "bottleneck")])
def test_interpolation_without_points_equals_distillation(make_student_and_teacher, architecture, kind):
    options = {"alpha": 0.6, "beta": 2.0, "temperature": 3.0, "flip_weight": 0.5, "decay": "linear"}
    interpolation = Interpolation(**options, points=())
    student, teacher, teacher_outputs, batch = make_student_and_teacher(architecture, kind, interpolation)
    objective = interpolation_objective(teacher_outputs, teacher, interpolation, CATEGORICAL, 10, 20)
    loss = objective(student, batch(), 4)
    expected = distillation_objective(teacher_outputs, Distillation(**options), CATEGORICAL, 10)(student, batch(), 4)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients, expected_gradients = compute_gradients(student, loss), compute_gradients(student, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("llama", "lora"), ("bert", "bottleneck")])
def test_interpolation_is_the_mean_over_models_between_teacher_and_student(
    make_student_and_teacher, architecture, kind
):
    """Compared with distillation of models whose weights are set to those of each point."""
    options = Interpolation(alpha=0.6, beta=2.0, temperature=3.0, points=(0.25, 0.5))
    student, teacher, teacher_outputs, batch = make_student_and_teacher(architecture, kind, options)
    loss = interpolation_objective(teacher_outputs, teacher, options, CATEGORICAL, 10, 20)(student, batch(), 0)
    gradients = compute_gradients(student, loss)

    student_weights = {name: p.detach().clone() for name, p in student.named_parameters()}
    teacher_weights = detached_parameters(teacher)
    label_term = distillation_objective(teacher_outputs, Distillation(0.0, 0.0, 5.0), CATEGORICAL, 10)
    teacher_term = distillation_objective(teacher_outputs, Distillation(1.0, 2.0 / 0.6, 3.0), CATEGORICAL, 10)
    label_loss = 0.4 * label_term(student, batch(), 0)
    expected_gradients = list(compute_gradients(student, label_loss))
    expected = label_loss.detach()
    for x in (1.0, 0.25, 0.5):
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter.copy_(x * student_weights[name] + (1 - x) * teacher_weights[name])
        term = 0.6 / 3 * teacher_term(student, batch(), 0)
        # The derivative of the interpolated weights by those of the student is x.
        expected_gradients = [
            total + x * gradient
            for total, gradient in zip(expected_gradients, compute_gradients(student, term), strict=True)
        ]
        expected = expected + term.detach()

    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-7)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_interpolation_loss_vanishes_at_the_teacher(make_student_and_teacher):
    options = Interpolation(alpha=1.0, beta=1.0, temperature=5.0, points=(0.0,))
    student, teacher, teacher_outputs, batch = make_student_and_teacher("bert", "full", options)
    teacher_weights = detached_parameters(teacher)
    blended = blend(student, teacher_weights, 0)
    assert all(torch.equal(tensor, teacher_weights[name]) for name, tensor in blended.items())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(teacher_weights[name])
    teacher_outputs = dataclasses.replace(teacher_outputs, hidden=teacher_outputs.hidden.float())
    loss = interpolation_objective(teacher_outputs, teacher, options, CATEGORICAL, 10, 20)(student, batch(), 0)
    assert loss.item() == pytest.approx(0, abs=1e-4)  # the teacher's hidden states are stored in bfloat16
    options = dataclasses.replace(options, beta=0.0)
    loss = interpolation_objective(teacher_outputs, teacher, options, CATEGORICAL, 10, 20)(student, batch(), 0)
    assert max(gradient.abs().max() for gradient in compute_gradients(student, loss)) < 1e-5


def test_drawn_points_are_determined_by_seed_and_step():
    assert draw_points(3, 20, 7) == draw_points(3, 20, 7)
    assert draw_points(3, 20, 7) != draw_points(3, 20, 8)
    assert draw_points(3, 20, 7) != draw_points(3, 30, 7)
    assert draw_points(0, 20, 7) == []


@pytest.fixture(scope="module")
def large_upgrade(tmp_path_factory, bases):
    """An upgrade after which the student has much to learn from the teacher."""
    new = write_upgrade(bases["bert"][0], tmp_path_factory.mktemp("large-upgrade") / "new", 0.8)
    return Upgrade(bases["bert"][0], new)


def write_shuffled_labels(task_file, folder):
    """Copy a task with the labels of train and dev shuffled."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("task.yaml", "test.csv"):
        (folder / name).write_text((task_file.parent / name).read_text())
    for split in ("train", "dev"):
        rows = read_csv(task_file.parent / f"{split}.csv")
        labels = rng.permutation([row["label"] for row in rows])
        shuffled_rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
        write_table(folder / f"{split}.csv", shuffled_rows)
    return folder / "task.yaml"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_label_free_ignores_labels(tmp_path, large_upgrade, adaptations, task_file, data, kind):
    shuffled_task = write_shuffled_labels(task_file, tmp_path / "task")
    assert (load_data(shuffled_task, 20).train.labels != data.train.labels).any()
    source = adaptations["bert", kind]
    outcome, shuffled = (
        recycle(large_upgrade, source, task, "label-free", tmp_path / name, recipe=NINE_STEPS)
        for name, task in (("original", task_file), ("shuffled", shuffled_task))
    )
    assert have_equal_weights(outcome, shuffled)
    assert outcome.record.cost.labels == shuffled.record.cost.labels == 0
    assert outcome.record.notes["score"] == "overlap of the predicted distributions with the old model's on dev"
    assert [point["score"] for point in outcome.curve] == [point["score"] for point in shuffled.curve]
    init = recycle(large_upgrade, source, task_file, "init", tmp_path / "init", recipe=NINE_STEPS)
    assert not have_equal_weights(outcome, init)
    assert outcome.record.best_step > 0


def test_overlap_and_divergence_of_class_probabilities():
    student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.75, 0.25], [0.9, 0.1]])
    assert CATEGORICAL.overlap(student.log(), Signal(teacher.log())).tolist() == pytest.approx([0.75, 1])
    divergence = CATEGORICAL.divergence_terms(student.log(), Signal(teacher.log())).sum(dim=1)
    assert divergence.tolist() == pytest.approx([0.75 * np.log(1.5) + 0.25 * np.log(0.5), 0], abs=1e-7)
    certain = 50 * torch.eye(3)
    assert CATEGORICAL.overlap(certain, Signal(certain[[0, 1, 0]])).tolist() == pytest.approx([1, 1, 0])
    assert CATEGORICAL.overlap(3 + certain, Signal(certain)).tolist() == pytest.approx([1, 1, 1])


def test_label_free_learns_from_the_texts_of_a_file(tmp_path, large_upgrade, adaptations, task_file, data):
    texts = [text for (text,) in data.train.texts]
    (tmp_path / "same.txt").write_text("\n".join(texts))
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "reversed.txt").write_text("\n".join(text[::-1] for text in texts))
    (tmp_path / "empty.txt").write_text("\n\n")

    def run(name):
        options = LabelFree(text=str(tmp_path / name) if name else "")
        out = tmp_path / f"out-{name}"
        source = adaptations["bert", "lora"]
        return recycle(large_upgrade, source, task_file, "label-free", out, recipe=NINE_STEPS, options=options)

    expected = run("")
    assert have_equal_weights(expected, run("same.txt"))
    assert have_equal_weights(expected, run("same.jsonl"))
    assert not have_equal_weights(expected, run("reversed.txt"))
    (tmp_path / "same.txt").write_text("another text\n" * 40)  # a file of the same name with other content
    with pytest.raises(OutcomeError, match="differ in text"):
        run("same.txt")
    with pytest.raises(DataError, match="has no text"):
        run("empty.txt")
    with pytest.raises(DataError, match="no such file"):
        run("missing.txt")


@pytest.mark.parametrize(
    ("options_type", "values"),
    [
        (Anchoring, {"strength": -1}),
        (Anchoring, {"weighting": "diagonal"}),
        (Anchoring, {"decay": "slow"}),
        (Distillation, {"flip_weight": -0.5}),
        (Distillation, {"decay": "fast"}),
        (Interpolation, {"points": (1.0,)}),
        (Interpolation, {"points": (-0.1,)}),
        (Interpolation, {"drawn": -1}),
        (Interpolation, {"alpha": 2}),
        (LabelFree, {"beta": -1}),
        (LabelFree, {"temperature": 0}),
        (Recipe, {"average": 1.0}),
    ],
)
def test_invalid_options_of_tuned_methods_are_refused(options_type, values):
    (name,) = values
    with pytest.raises(RecipeError, match=name):
        options_type(**values)


def test_methods_that_learn_from_old_outputs_refuse_a_fresh_head(tmp_path, opened_bases, adaptations, task_file):
    upgrade = Upgrade(*opened_bases["bert"])
    source = adaptations["bert", "lora"]
    for method in ("interpolation", "label-free"):
        with pytest.raises(RecipeError, match="head must be copy"):
            recycle(upgrade, source, task_file, method, tmp_path / "out", recipe=NINE_STEPS, head="fresh")
    recycle(upgrade, source, task_file, "anchored", tmp_path / "anchored", recipe=NINE_STEPS, head="fresh")


def train_with_averaging(model, base, data, evaluate, folder):
    recipe = Recipe(steps=12, batch_size=8, learning_rate=3e-3, eval_every=3, precision="fp32", average=0.4)
    examples = encode(base, data, data.train)
    order = plan_order(examples.lengths, 8, 12, 20).tolist()
    return train(model, order, examples.batch, LABEL_OBJECTIVE, evaluate, recipe, folder, silent, stage="tune")


def test_averaged_weights_are_the_mean_of_the_last_evaluated_weights(opened_bases, data, tmp_path):
    base = opened_bases["bert"][1]
    model = fresh_model(base, data.head, 1)
    evaluated = []

    def evaluate(current):
        evaluated.append({name: p.detach().clone() for name, p in current.named_parameters()})
        return {"score": float(len(evaluated)), "loss": 0.0}

    curve = train_with_averaging(model, base, data, evaluate, tmp_path)
    assert [point["step"] for point in curve] == [0, 3, 6, 9, 12, 12]
    assert curve[-1]["averaged"] == 3
    for name, parameter in model.named_parameters():
        mean = (evaluated[2][name] + evaluated[3][name] + evaluated[4][name]) / 3
        torch.testing.assert_close(parameter.detach(), mean, rtol=1e-5, atol=1e-7)
        assert torch.equal(evaluated[5][name], parameter)


def test_averaged_weights_with_a_lower_score_are_discarded(opened_bases, data, tmp_path):
    base = opened_bases["bert"][1]
    model = fresh_model(base, data.head, 1)
    scores = iter([0.1, 0.5, 0.9, 0.2, 0.3, 0.8])
    classifiers = []

    def evaluate(current):
        classifiers.append(current.classifier.weight.detach().clone())
        return {"score": next(scores)}

    curve = train_with_averaging(model, base, data, evaluate, tmp_path)
    assert [point["score"] for point in curve] == [0.1, 0.5, 0.9, 0.2, 0.3]
    assert torch.equal(model.classifier.weight, classifiers[2])
