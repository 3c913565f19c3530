"""Methods that train: what their losses are, that they go on where they were, and what they say it cost."""

import csv
import dataclasses
import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import loss_of, move_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from regraft import Base, Distillation, Recipe, Upgrade, load_adaptation, recycle
from regraft.adaptation import attach, fresh_model, initial_factors, load_model, new_config, save_model, write_graft
from regraft.errors import DataError, OutcomeError, RecipeError
from regraft.methods.label_free import LabelFree
from regraft.model import Deployment, encode
from regraft.progress import silent
from regraft.recipe import fade_factor
from regraft.task import load_data
from regraft.task.types import Signal
from regraft.task.types.likelihood import CATEGORICAL
from regraft.tuning import Anchoring, Interpolation, distillation_loss, plan_order
from regraft.tuning.anchor import anchored_objective, fisher_information
from regraft.tuning.distill import compute_teacher_outputs, distillation_objective, teacher_loss
from regraft.tuning.interpolate import blend, draw_points, interpolation_objective
from regraft.tuning.trainer import train
from regraft.tuning.tune import label_objective

FEW = Recipe(steps=9, batch_size=8, learning_rate=3e-3, eval_every=3, save_every=3, precision="fp32")
OPTIONS = {
    "anchored": Anchoring(strength=0.1, weighting="fisher"),
    "interpolation": Interpolation(points=(0.3,), drawn=1, decay="cosine"),
    "label-free": LabelFree(),
    "init+distill": Distillation(flip_weight=1.0, decay="linear"),
}


@pytest.fixture(scope="module")
def opened(bases):
    return {name: tuple(Base.open(path) for path in bases[name]) for name in ("bert", "llama")}


@pytest.fixture(scope="module")
def data(task_file):
    return load_data(task_file, 20)


@pytest.fixture(scope="module")
def adaptations(tmp_path_factory, opened, tuned, data):
    """What was tuned on the old bases, and adapters of other kinds with every tuned number moved."""
    folder, made = tmp_path_factory.mktemp("moved"), dict(tuned)
    for name, kind in (("bert", "bottleneck"), ("llama", "bottleneck"), ("bert", "pissa")):
        base = opened[name][0]
        model = attach(
            fresh_model(base, data.head, 1), base, data.head, new_config(kind, base, data.head, rank=3, inner_size=5), 1
        )
        start = initial_factors(model)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        made[name, kind] = folder / f"{name}-{kind}"
        save_model(model, base, data.head, made[name, kind] / "adaptation", start)
    return made


def weights(out):
    (file,) = (out / "adaptation").glob("*.safetensors")
    return load_file(file)


def same_weights(one, other):
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


class StopError(Exception):
    """As a user's Ctrl-C."""


def stop_at(step):
    def progress(stage, done, total, figures):
        if stage == "tune" and done == step:
            raise StopError

    return progress


EVERYWHERE = [("bert", "full"), ("llama", "lora")]
SLOWLY = [(a, kind) for a in ("bert", "llama") for kind in ("full", "lora", "bottleneck")] + [("bert", "pissa")]


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*EVERYWHERE, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOWLY if cell not in EVERYWHERE)],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    tmp_path, opened, adaptations, task_file, architecture, kind, method
):
    upgrade, source = Upgrade(*opened[architecture]), adaptations[architecture, kind]
    given = {"recipe": dataclasses.replace(FEW, average=0.3), "options": OPTIONS[method]}
    whole = recycle(upgrade, source, task_file, method, tmp_path / "whole", **given)
    for step in (4, 8):
        with pytest.raises(StopError):
            recycle(upgrade, source, task_file, method, tmp_path / "cut", **given, progress=stop_at(step))
    cut = recycle(upgrade, source, task_file, method, tmp_path / "cut", **given)
    assert same_weights(whole.path, cut.path)
    assert [point["loss"] for point in whole.curve] == [point["loss"] for point in cut.curve]
    cost = whole.record.cost
    assert (cost.steps, cost.labels) == (9, 0 if method == "label-free" else 72)
    assert cost.seconds > 0
    if method != "label-free":
        direct = recycle(upgrade, source, task_file, "direct", tmp_path / "direct", recipe=FEW)
        assert weights(direct.path).keys() == weights(whole.path).keys()
        assert whole.curve[0]["score"] == direct.scores["dev"]


def literal_teacher_loss(z_s, y, z_t, h_s, h_t, options):
    """The formula with flip weights, number by number."""
    batch, classes = z_s.shape
    right = [int(z_t[i].argmax()) == int(y[i]) for i in range(batch)]
    raw = [1 + options.flip_weight if right[i] else 1.0 for i in range(batch)]
    weight = [w * batch / sum(raw) for w in raw]
    assert sum(weight) == pytest.approx(batch)
    kl = mse = 0.0
    for i in range(batch):
        p_t, p_s = (torch.exp(z[i] / options.temperature) for z in (z_t, z_s))
        p_t, p_s = p_t / p_t.sum(), p_s / p_s.sum()
        kl = kl + weight[i] * sum(p_t[c] * torch.log(p_t[c] / p_s[c]) for c in range(classes))
        mse = mse + weight[i] * ((h_s[i] - h_t[i]) ** 2).sum() / h_s.numel()
    kl = kl / (batch if options.kl_reduction == "batchmean" else batch * classes)
    return options.alpha * options.temperature**2 * kl + options.beta * 0.5 * mse


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(2, 5), st.sampled_from([0.3, 1.0]), st.sampled_from([0.0, 2.0]),
    st.sampled_from([1.0, 5.0]), st.sampled_from(["batchmean", "mean"]), st.sampled_from([0.0, 0.5, 1.0, 20.0]),
    st.integers(0, 1000),
)  # fmt: skip
def test_the_teachers_loss_is_the_formula_with_flip_weights(batch, classes, alpha, beta, hot, reduction, flip, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    z_t, h_t, start_z, start_h = draw(batch, classes), draw(batch, 2, 3), draw(batch, classes), draw(batch, 2, 3)
    y = torch.randint(classes, (batch,), generator=generator)
    options = Distillation(alpha, beta, hot, reduction, flip)
    found = []
    for formula in (partial(loss_of, teacher_loss), literal_teacher_loss):
        z, h = start_z.clone().requires_grad_(), start_h.clone().requires_grad_()
        loss = formula(z, y, z_t, h, h_t, options)
        gradients = torch.autograd.grad(loss, (z, h), allow_unused=True, materialize_grads=True)
        found.append((loss.detach(), *gradients))
    for ours, literal in zip(*found, strict=True):
        torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-9)


def test_flip_weights_leave_the_true_labels_share_alone():
    logits, labels, teacher = torch.randn(6, 3), torch.randint(3, (6,)), torch.randn(6, 3)
    hidden = torch.zeros(6, 1, 1)
    plain, flipped = (
        loss_of(distillation_loss, logits, labels, teacher, hidden, hidden, Distillation(0.0, 0.0, flip_weight=flip))
        for flip in (0.0, 3.0)
    )
    assert plain.item() == flipped.item() == torch.nn.functional.cross_entropy(logits, labels).item()


@given(st.integers(1, 500), st.sampled_from(["none", "linear", "cosine"]))
def test_what_fades_starts_whole_and_ends_at_nothing(steps, how):
    left = [fade_factor(how, step, steps) for step in range(steps + 1)]
    assert left[0] == 1
    assert left[-1] == pytest.approx(1 if how == "none" else 0)
    assert all(later <= sooner for sooner, later in itertools.pairwise(left))


def test_the_teachers_share_fades():
    options = Distillation(alpha=0.8, beta=2.0, decay="linear")
    assert options.faded(0, 10) == options
    halfway = options.faded(5, 10)
    assert (halfway.alpha, halfway.beta) == (pytest.approx(0.4), pytest.approx(1.0))
    assert halfway.temperature == options.temperature
    kept = Distillation(alpha=0.8, beta=2.0)
    assert kept.faded(9, 10) == kept


OBJECTIVE = label_objective(CATEGORICAL)


def batch_of(base, data, count=6):
    examples = encode(base, data, data.train)
    return examples, (lambda: examples.batch(list(range(count))))


def gradients_of(model, loss):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("weighting", ["plain", "fisher"])
@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_the_anchors_gradient_is_the_pull_to_the_start(opened, data, weighting, decay):
    model = fresh_model(opened["bert"][1], data.head, 1).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    examples, batch = batch_of(opened["bert"][1], data)
    weighed = fisher_information(model, examples, np.arange(20), CATEGORICAL, silent) if weighting == "fisher" else None
    pulled = anchored_objective(OBJECTIVE, model, weighed, Anchoring(0.7, weighting, decay), 10)
    start = {name: p.detach().clone() for name, p in trained.items()}
    assert pulled(model, batch(), 0).item() == OBJECTIVE(model, batch(), 0).item()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = gradients_of(model, OBJECTIVE(model, batch(), 3))
    whole = gradients_of(model, pulled(model, batch(), 3))
    left = {"none": 1, "linear": 0.7, "cosine": 0.5 * (1 + np.cos(0.3 * np.pi))}[decay]
    for name, without, with_it in zip(trained, plain, whole, strict=True):
        moved = trained[name].detach() - start[name]
        expected = 0.7 * left * (moved if weighed is None else weighed[name] * moved)
        torch.testing.assert_close(with_it - without, expected, rtol=1e-4, atol=1e-6)


def test_the_fisher_information_is_the_mean_squared_gradient(opened, data):
    base = opened["llama"][0]
    model = fresh_model(base, data.head, 1).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "score" in name)
    examples = encode(base, data, data.train)
    found = fisher_information(model, examples, np.array([7, 3, 7, 5]), CATEGORICAL, silent)
    assert model.training
    model.eval()
    squares = []
    for index in (7, 3, 5):
        ids = torch.tensor([examples.columns["input_ids"][index]])
        likelihood = model(input_ids=ids).logits.log_softmax(dim=1)[0, data.train.labels[index]]
        squares.append([gradient.square() for gradient in gradients_of(model, likelihood)])
    expected = [sum(several) / 3 for several in zip(*squares, strict=True)]
    mean = torch.cat([tensor.flatten() for tensor in expected]).mean()
    for ours, literal in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, literal / mean, rtol=1e-3, atol=1e-5)
    assert torch.cat([tensor.flatten() for tensor in found.values()]).mean().item() == pytest.approx(1, rel=1e-4)


@pytest.fixture
def pair(tmp_path, opened, adaptations, data):
    """A student and a teacher that differ, and what the teacher says."""

    def make(architecture, kind, options):
        old, new = opened[architecture]
        adaptation = load_adaptation(adaptations[architecture, kind])
        write_graft(adaptation, Upgrade(old, new), tmp_path / "graft", silent)
        student = load_model(load_adaptation(tmp_path / "graft"), new, data.head, trainable=True).eval()
        teacher = load_model(adaptation, old, data.head).eval()
        examples = encode(old, data, data.train)
        taught = compute_teacher_outputs(
            Deployment(teacher, old, data, "fp32"), data.train, np.arange(6), options, tmp_path
        )
        return student, teacher, taught, lambda: examples.batch(list(range(6)))

    return make


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("llama", "lora"), ("bert", "bottleneck")])
def test_interpolation_at_the_student_alone_is_distillation(pair, architecture, kind):
    options = {"alpha": 0.6, "beta": 2.0, "temperature": 3.0, "flip_weight": 0.5, "decay": "linear"}
    interpolation = Interpolation(**options, points=())
    student, teacher, taught, batch = pair(architecture, kind, interpolation)
    ours = interpolation_objective(taught, teacher, interpolation, CATEGORICAL, 10, 20)(student, batch(), 4)
    plain = distillation_objective(taught, Distillation(**options), CATEGORICAL, 10)(student, batch(), 4)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for one, other in zip(gradients_of(student, ours), gradients_of(student, plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("llama", "lora"), ("bert", "bottleneck")])
def test_interpolation_is_the_mean_over_models_on_the_line(pair, architecture, kind):
    """A second implementation: a model whose very weights are those of the point."""
    options = Interpolation(alpha=0.6, beta=2.0, temperature=3.0, points=(0.25, 0.5))
    student, teacher, taught, batch = pair(architecture, kind, options)
    loss = interpolation_objective(taught, teacher, options, CATEGORICAL, 10, 20)(student, batch(), 0)
    ours = gradients_of(student, loss)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    other = dict(teacher.named_parameters())
    alone, cross_entropy = Distillation(1.0, 2.0 / 0.6, 3.0), Distillation(0.0, 0.0)
    expected = 0.4 * distillation_objective(taught, cross_entropy, CATEGORICAL, 10)(student, batch(), 0)
    total = [*gradients_of(student, expected)]
    expected = expected.detach()
    for x in (1.0, 0.25, 0.5):
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter.copy_(x * before[name] + (1 - x) * other[name])
        term = 0.6 / 3 * distillation_objective(taught, alone, CATEGORICAL, 10)(student, batch(), 0)
        total = [t + x * g for t, g in zip(total, gradients_of(student, term), strict=True)]  # dθ(x)/dstudent = x
        expected = expected + term.detach()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-7)
    for one, literal in zip(ours, total, strict=True):
        torch.testing.assert_close(one, literal, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_at_the_teacher_there_is_nothing_to_learn(pair):
    options = Interpolation(alpha=1.0, beta=1.0, points=(0.0,))
    student, teacher, taught, batch = pair("bert", "full", options)
    assert all(
        torch.equal(t, dict(teacher.named_parameters())[n]) for n, t in blend(student, fixed(teacher), 0).items()
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(fixed(teacher)[name])
    taught = dataclasses.replace(taught, hidden=taught.hidden.float())
    loss = interpolation_objective(taught, teacher, options, CATEGORICAL, 10, 20)(student, batch(), 0)
    assert loss.item() == pytest.approx(0, abs=1e-4)  # the hidden states are kept in bfloat16
    options = dataclasses.replace(options, beta=0.0)
    loss = interpolation_objective(taught, teacher, options, CATEGORICAL, 10, 20)(student, batch(), 0)
    assert max(gradient.abs().max() for gradient in gradients_of(student, loss)) < 1e-5


def fixed(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_points_are_drawn_alike_whenever_a_step_is_computed():
    assert draw_points(3, 20, 7) == draw_points(3, 20, 7)
    assert draw_points(3, 20, 7) != draw_points(3, 20, 8)
    assert draw_points(3, 20, 7) != draw_points(3, 30, 7)
    assert draw_points(0, 20, 7) == []


@pytest.fixture(scope="module")
def far(tmp_path_factory, bases):
    """An upgrade that leaves a teacher something to teach."""
    return Upgrade(bases["bert"][0], move_base(bases["bert"][0], tmp_path_factory.mktemp("far") / "new", 0.8))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_label_free_reads_no_label(tmp_path, far, adaptations, task_file, data, kind):
    turned = tmp_path / "task"
    turned.mkdir()
    chance = np.random.default_rng(0)
    (turned / "task.yaml").write_text(task_file.read_text())
    (turned / "test.csv").write_text((task_file.parent / "test.csv").read_text())
    for split in ("train", "dev"):
        with (task_file.parent / f"{split}.csv").open(newline="") as stream:
            header, *rows = csv.reader(stream)
        labels = chance.permutation([label for _, label in rows])
        with (turned / f"{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *([text, lab] for (text, _), lab in zip(rows, labels, strict=True))])
    assert (load_data(turned / "task.yaml", 20).train.labels != data.train.labels).any()
    upgrade, source = far, adaptations["bert", kind]
    straight, scrambled = (
        recycle(upgrade, source, task, "label-free", tmp_path / name, recipe=FEW)
        for name, task in (("straight", task_file), ("scrambled", turned / "task.yaml"))
    )
    assert same_weights(straight.path, scrambled.path)
    assert straight.record.cost.labels == scrambled.record.cost.labels == 0
    assert straight.record.notes["score"] == "overlap of class probabilities with the old model's on dev"
    assert [p["score"] for p in straight.curve] == [p["score"] for p in scrambled.curve]
    init = recycle(upgrade, source, task_file, "init", tmp_path / "init", recipe=FEW)
    assert not same_weights(straight.path, init.path)
    assert straight.record.best_step > 0


def test_closeness_is_the_overlap_of_probabilities():
    one, other = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.75, 0.25], [0.9, 0.1]])
    assert CATEGORICAL.overlap(one.log(), Signal(other.log())).tolist() == pytest.approx([0.75, 1])
    divergence = CATEGORICAL.divergence_terms(one.log(), Signal(other.log())).sum(dim=1)
    assert divergence.tolist() == pytest.approx([0.75 * np.log(1.5) + 0.25 * np.log(0.5), 0], abs=1e-7)
    certain = 50 * torch.eye(3)
    assert CATEGORICAL.overlap(certain, Signal(certain[[0, 1, 0]])).tolist() == pytest.approx([1, 1, 0])
    assert CATEGORICAL.overlap(3 + certain, Signal(certain)).tolist() == pytest.approx([1, 1, 1])


def test_label_free_learns_from_texts_of_another_file(tmp_path, far, adaptations, task_file, data):
    texts = [text for (text,) in data.train.texts]
    (tmp_path / "same.txt").write_text("\n".join(texts))
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "other.txt").write_text("\n".join(text[::-1] for text in texts))
    upgrade, source = far, adaptations["bert", "lora"]

    def learn(name):
        options = LabelFree(text=str(tmp_path / name) if name else "")
        return recycle(upgrade, source, task_file, "label-free", tmp_path / f"o{name}", recipe=FEW, options=options)

    plain = learn("")
    assert same_weights(plain.path, learn("same.txt").path)
    assert same_weights(plain.path, learn("same.jsonl").path)
    assert not same_weights(plain.path, learn("other.txt").path)
    (tmp_path / "same.txt").write_text("another text\n" * 40)  # a file of the same name is no longer the same run
    with pytest.raises(OutcomeError, match="inputs differ in text"):
        learn("same.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, says in (("empty.txt", "has no text"), ("none.txt", "no such file")):
        with pytest.raises(DataError, match=says):
            learn(name)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (Anchoring, {"strength": -1}), (Anchoring, {"weighting": "diagonal"}), (Anchoring, {"decay": "slow"}),
        (Distillation, {"flip_weight": -0.5}), (Distillation, {"decay": "fast"}), (Interpolation, {"points": (1.0,)}),
        (Interpolation, {"points": (-0.1,)}), (Interpolation, {"drawn": -1}), (Interpolation, {"alpha": 2}),
        (LabelFree, {"beta": -1}), (LabelFree, {"temperature": 0}), (Recipe, {"average": 1.0}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options, given):
    with pytest.raises(RecipeError, match=next(iter(given))):
        options(**given)


def test_old_outputs_are_learnt_with_the_old_head_only(tmp_path, opened, adaptations, task_file):
    upgrade, source = Upgrade(*opened["bert"]), adaptations["bert", "lora"]
    for method in ("interpolation", "label-free"):
        with pytest.raises(RecipeError, match="head must be copy"):
            recycle(upgrade, source, task_file, method, tmp_path / "out", recipe=FEW, head="fresh")
    recycle(upgrade, source, task_file, "anchored", tmp_path / "anchored", recipe=FEW, head="fresh")


def test_averaged_weights_are_the_mean_of_the_late_evaluations(opened, data, tmp_path):
    recipe = Recipe(steps=12, batch_size=8, learning_rate=3e-3, eval_every=3, precision="fp32", average=0.4)
    model, seen = fresh_model(opened["bert"][1], data.head, 1), []

    def evaluate(current):
        seen.append({name: p.detach().clone() for name, p in current.named_parameters()})
        return {"score": float(len(seen)), "loss": 0.0}

    examples = encode(opened["bert"][1], data, data.train)
    order = plan_order(examples.lengths, 8, 12, 20).tolist()
    curve = train(model, order, examples.batch, OBJECTIVE, evaluate, recipe, tmp_path, silent, stage="tune")
    assert [point["step"] for point in curve] == [0, 3, 6, 9, 12, 12]
    assert curve[-1]["averaged"] == 3
    for name, parameter in model.named_parameters():
        mean = (seen[2][name] + seen[3][name] + seen[4][name]) / 3
        torch.testing.assert_close(parameter.detach(), mean, rtol=1e-5, atol=1e-7)
        assert torch.equal(seen[5][name], parameter)


def test_averaged_weights_that_are_no_better_are_left(opened, data, tmp_path):
    recipe = Recipe(steps=12, batch_size=8, learning_rate=3e-3, eval_every=3, precision="fp32", average=0.4)
    model, scores, seen = fresh_model(opened["bert"][1], data.head, 1), iter([0.1, 0.5, 0.9, 0.2, 0.3, 0.8]), []

    def evaluate(current):
        seen.append(current.classifier.weight.detach().clone())
        return {"score": next(scores)}

    examples = encode(opened["bert"][1], data, data.train)
    order = plan_order(examples.lengths, 8, 12, 20).tolist()
    curve = train(model, order, examples.batch, OBJECTIVE, evaluate, recipe, tmp_path, silent, stage="tune")
    assert [point["score"] for point in curve] == [0.1, 0.5, 0.9, 0.2, 0.3]
    assert torch.equal(model.classifier.weight, seen[2])
