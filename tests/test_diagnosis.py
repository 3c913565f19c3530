"""The questions of a diagnosis against known answers, one by one and together in a record."""

import dataclasses
import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from helpers import FLOAT32, LABELS, read_weights, write_adaptation, write_upgrade
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import recall_score

from regraft import Base, Recipe, Upgrade, check, load_adaptation, tune
from regraft.diagnosis import (
    Questions,
    all_questions,
    compatibility,
    diagnose,
    load_pair,
    mcnemar,
    noise_floor,
    read_diagnosis,
    regressions,
    retention,
    shift,
    verdict,
)
from regraft.diagnosis.choice import choose
from regraft.errors import MismatchError, OutcomeError, RecipeError
from regraft.report import sections
from regraft.task import Interval
from regraft.task.types.class_metrics import ACCURACY
from regraft.task.types.class_views import measure_calibration
from regraft.weights import subspace_overlap


@pytest.fixture
def open_pair(task_file):
    """A function of an upgrade and an adaptation, which opens the old and the new deployment in float32."""

    def open_deployments(upgrade, path):
        return load_pair(upgrade, path, task_file, recipe=FLOAT32)

    return open_deployments


def test_regressions_equal_flips_counted_by_hand(open_pair, bases, tuned_outcomes):
    with open_pair(Upgrade(*bases["bert"]), tuned_outcomes["bert", "full"]) as pair:
        labels = pair.split.labels.tolist()
        targets = torch.tensor(labels)
        before, after = targets.clone(), targets.clone()
        before[:3] = 1 - before[:3]  # positive flips: wrong, then right
        after[10:15] = 1 - after[10:15]  # negative flips: right, then wrong
        one_hot = torch.nn.functional.one_hot
        pair.old._outputs[pair.split] = 4.0 * one_hot(before, 2)
        pair.new._outputs[pair.split] = 2.0 * one_hot(after, 2)
        result = regressions(pair, [[True] * 100])
        assert (result.negative, result.positive, result.examples) == (5, 3, 100)
        flipped = [0, 1, 2, 10, 11, 12, 13, 14]
        assert [flip.row for flip in result.flips] == pair.split.row_numbers[flipped].tolist()
        assert [flip.kind for flip in result.flips] == ["positive"] * 3 + ["negative"] * 5
        flip = result.flips[3]
        assert flip.text == pair.split.texts[10][0]
        assert (flip.label, flip.before, flip.after) == (LABELS[labels[10]], LABELS[labels[10]], LABELS[1 - labels[10]])
        assert flip.confidence == pytest.approx(math.exp(2) / (math.exp(2) + 1), abs=1e-4)
        classes, reliability = result.views
        for index, (label, examples, _, recall, _, negative, _) in enumerate(classes.rows):
            assert label == LABELS[index]
            assert examples == labels.count(index)
            assert recall == pytest.approx(recall_score(labels, after, labels=[index], average=None)[0])
            assert negative == labels[10:15].count(index)
        assert [sum(series.sizes) for series in reliability.series] == [100, 100]
        assert result.noise == pytest.approx((5 + 0) / 2 / 100)


def test_mcnemar_equals_values_computed_by_hand():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(3, 1) == pytest.approx(2 * (4 + 1) / 16)
    assert mcnemar(7, 7) == 1
    assert mcnemar(40, 10) == pytest.approx(mcnemar(10, 40))
    assert mcnemar(40, 10) < 1e-4


def test_noise_floor():
    assert noise_floor([[True, True]]) is None
    assert noise_floor([[True, True, True, False], [True, True, False, False]]) == pytest.approx((1 / 4 + 0) / 2)


def test_calibration_equals_one_computed_by_hand():
    probabilities = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.35, 0.65], [0.4, 0.6]])
    result = measure_calibration(probabilities.amax(dim=1).tolist(), [True, False, True, True])
    assert [(entry.low, entry.count) for entry in result.bins] == [(0.5, 1), (0.6, 1), (0.9, 2)]
    assert result.ece == pytest.approx((0.4 + 0.35 + 2 * abs(0.935 - 0.5)) / 4, abs=1e-5)
    certain = measure_calibration([1.0, 1.0], [True, True])
    assert certain.ece == pytest.approx(0, abs=1e-6)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 4), st.integers(0, 2**31))
def test_calibration_counts_all_examples_and_their_accuracy(num_examples, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(num_examples, num_classes, generator=generator).softmax(dim=1)
    labels = torch.randint(num_classes, (num_examples,), generator=generator)
    is_right = probabilities.argmax(dim=1) == labels
    result = measure_calibration(probabilities.amax(dim=1).tolist(), is_right.tolist())
    assert 0 <= result.ece <= 1
    assert sum(entry.count for entry in result.bins) == num_examples
    accuracy = float(is_right.float().mean())
    assert sum(entry.count * entry.accuracy for entry in result.bins) / num_examples == pytest.approx(
        accuracy, abs=1e-5
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 20), st.integers(4, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_overlap_is_symmetric_and_ignores_scale_and_rotation(rows, columns, directions, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    assert subspace_overlap(a, a, directions) == pytest.approx(1)
    assert subspace_overlap(a, -3 * a, directions) == pytest.approx(1)
    overlap = subspace_overlap(a, b, directions)
    assert -1e-9 <= overlap <= 1 + 1e-9
    assert subspace_overlap(b, a, directions) == pytest.approx(overlap)
    rotation = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q
    assert subspace_overlap(rotation @ a, rotation @ b, directions) == pytest.approx(overlap)


def test_overlap_of_orthogonal_and_of_large_matrices():
    a, b = torch.zeros(10, 6), torch.zeros(10, 6)
    a[:3], b[3:6] = torch.randn(3, 6), torch.randn(3, 6)
    assert subspace_overlap(a, b, 3) == pytest.approx(0, abs=1e-9)
    assert subspace_overlap(a, torch.zeros(10, 6)) == 0
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(1100, 4, generator=generator) @ torch.randn(4, 1200, generator=generator)
    rng_state = torch.get_rng_state()
    assert subspace_overlap(large, 2 * large, 4) == pytest.approx(1, abs=1e-3)
    assert torch.equal(torch.get_rng_state(), rng_state)


def test_shift_of_an_upgrade_is_compared_with_the_delta(tmp_path, bases):
    old, new = bases["bert"]
    old_tensors, new_tensors = (load_file(base / "model.safetensors") for base in (old, new))
    old_body = {name: tensor.double() for name, tensor in old_tensors.items() if name.startswith("bert.")}
    upgrade_shift = {name: new_tensors[name].double() - tensor for name, tensor in old_body.items()}
    upgrade = Upgrade(old, new)
    path = write_adaptation(upgrade.old, "full", tmp_path / "full")
    tensors = read_weights(path)
    for name, tensor in old_body.items():  # the delta is half of the upgrade's shift, and its opposite in one tensor
        tensors[name] = tensor.add(upgrade_shift[name] / 2).float()
    opposite = "bert.encoder.layer.1.output.dense.weight"
    tensors[opposite] = (old_body[opposite] - upgrade_shift[opposite]).float()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    result = shift(upgrade, load_adaptation(path))
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in old_body.values()))
    assert result.whole.base == pytest.approx(norm)
    assert result.whole.shift == pytest.approx(upgrade.distance().l2)
    assert [layer.name for layer in result.layers] == ["embeddings", "layer 0", "layer 1"]
    _, layer_0, layer_1 = result.layers
    assert layer_0.cosine == pytest.approx(1, abs=1e-4)
    assert layer_0.delta == pytest.approx(layer_0.shift / 2, rel=1e-4)
    assert layer_0.signs == pytest.approx(1, abs=1e-3)
    assert layer_0.overlap == pytest.approx(1, abs=1e-3)
    assert layer_1.cosine < 0.5
    assert {kind.name for kind in result.kinds} >= {"embedding", "attention", "feed-forward", "norm"}
    squares = sum(kind.shift**2 for kind in result.kinds)
    assert math.sqrt(squares) == pytest.approx(result.whole.shift)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_shift_of_a_lora_equals_that_of_its_full_conversion(tmp_path, bases, architecture):
    from regraft import convert

    upgrade = Upgrade(*bases[architecture])
    path = write_adaptation(upgrade.old, "lora", tmp_path / "lora" / "adaptation")
    full = convert(path, upgrade.old, tmp_path / "full", "full").path
    lora_shift, full_shift = (shift(upgrade, load_adaptation(folder)).whole for folder in (path, full))
    assert lora_shift.delta == pytest.approx(full_shift.delta, rel=1e-4)
    assert lora_shift.cosine == pytest.approx(full_shift.cosine, abs=1e-4)
    assert lora_shift.shift == full_shift.shift


def test_an_adaptation_without_a_dense_delta_has_only_a_shift(tmp_path, bases):
    upgrade = Upgrade(*bases["bert"])
    body = shift(upgrade, load_adaptation(write_adaptation(upgrade.old, "bottleneck", tmp_path / "bottleneck"))).whole
    assert body.shift > 0
    assert (body.delta, body.cosine, body.signs, body.overlap) == (0, None, None, None)


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("llama", "lora"), ("roberta", "full")])
def test_retention_is_undefined_if_the_upgrade_changed_nothing(open_pair, bases, tuned_outcomes, architecture, kind):
    old = bases[architecture][0]
    with open_pair(Upgrade(old, old), tuned_outcomes[architecture, kind]) as pair:
        result = retention(pair)
    assert result.loss["old base"] == result.loss["new base"]
    assert result.loss["old deployment"] == pytest.approx(result.loss["new deployment"], rel=1e-5)
    assert result.share is None
    assert result.text == "the training texts of mood"


def test_an_adaptation_that_changes_nothing_keeps_the_whole_gain(tmp_path, open_pair, bases, task_file):
    from regraft import Corpus, pretrain

    old = Base.open(bases["bert"][0])
    text = tmp_path / "text.txt"
    text.write_text((task_file.parent / "train.csv").read_text().partition("\n")[2])
    recipe = Recipe(steps=40, learning_rate=3e-3, precision="fp32")
    new = pretrain(old, Corpus((str(text),)), tmp_path / "new", recipe, block_size=16)
    path = write_adaptation(old, "full", tmp_path / "full")
    base_tensors = load_file(old.path / "model.safetensors")
    tensors = {name: base_tensors.get(name, tensor) for name, tensor in read_weights(path).items()}
    tensors["classifier.weight"] = tensors["classifier.weight"] + 1
    bias = "bert.encoder.layer.1.output.LayerNorm.bias"
    tensors[bias] = tensors[bias] + 1e-5  # a delta of 0 is refused
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with open_pair(Upgrade(old, new), path) as pair:
        result = retention(pair, (str(text),))
        outputs = pair.old.outputs(pair.split)
        pair.old.clear_outputs()
        assert torch.equal(pair.old.outputs(pair.split), outputs)  # the deployments are unchanged
    assert result.loss["new base"] < result.loss["old base"]
    assert result.share == pytest.approx(1, abs=0.005)
    assert result.text == str(text)


def test_retention_needs_a_language_model(tmp_path, open_pair, bases, tuned_outcomes, saved_adaptations):
    headless = tmp_path / "headless"
    headless.mkdir()
    old = bases["bert"][0]
    for file in old.iterdir():
        if file.suffix != ".safetensors":
            (headless / file.name).write_bytes(file.read_bytes())
    tensors = load_file(old / "model.safetensors")
    body = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    save_file(body, headless / "model.safetensors", metadata={"format": "pt"})
    upgrade = Upgrade(headless, headless)
    full, prompt = tuned_outcomes["bert", "full"], saved_adaptations["bert", "prompt"][0].parent
    with open_pair(upgrade, full) as pair, pytest.raises(MismatchError, match="no language-modelling head"):
        retention(pair)
    with open_pair(Upgrade(*bases["bert"]), prompt) as pair, pytest.raises(MismatchError, match="virtual tokens"):
        retention(pair)


def test_compatibility_falls_with_the_distance_of_checkpoints(tmp_path, open_pair, bases, tuned_outcomes):
    old, new = bases["bert"]
    checkpoints = [write_upgrade(old, tmp_path / f"noise-{amount}", amount) for amount in (0.05, 0.3, 3.0)]
    with open_pair(Upgrade(old, new), tuned_outcomes["bert", "full"]) as pair:
        points = compatibility(pair, checkpoints)
    assert [point.name for point in points] == [str(old), *map(str, checkpoints)]
    assert points[0].distance == 0
    assert points[0].agreement == 1
    assert points[0].score == check(Upgrade(old, new), tuned_outcomes["bert", "full"], pair.data, recipe=FLOAT32).old
    distances = [point.distance for point in points]
    assert distances == sorted(distances)
    assert points[1].agreement >= points[3].agreement
    second = check(Upgrade(old, checkpoints[1]), tuned_outcomes["bert", "full"], pair.data, recipe=FLOAT32)
    assert points[2].score == second.new
    assert points[2].agreement == pytest.approx(second.agreement)


@pytest.mark.parametrize(
    ("share", "gain", "choice"),
    [
        (1.2, 0, "use as is"),
        (0.95, 0, "use as is"),
        (0.9, 0, "training-free"),
        (0.9, 0.02, "short tuning"),
        (0.5, 0, "short tuning"),
        (0.1, 0, "scratch"),
        (-1, 0, "scratch"),
    ],
)
def test_choice_depends_on_share_and_gain(share, gain, choice):
    assert choose(share, gain) == choice


def test_verdicts_follow_from_predictions():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    accurate = np.where(rng.random(400) < 0.9, labels, 1 - labels)
    unchanged = verdict(ACCURACY, labels, accurate, accurate, 0.5)
    assert (unchanged.choice, unchanged.sure, unchanged.predicted) == ("use as is", 1, 1)
    lost = verdict(ACCURACY, labels, accurate, rng.integers(2, size=400), 0.5)
    assert lost.choice == "scratch"
    assert lost.sure > 0.9
    assert "from scratch" in lost.advice
    perturbed = np.where(rng.random(400) < 0.03, 1 - accurate, accurate)
    borderline = verdict(ACCURACY, labels, accurate, perturbed, 0.5)
    assert 0.3 < borderline.sure < 1
    with_gain = verdict(ACCURACY, labels, accurate, accurate, 0.5, gain=Interval(0.1, 0.05, 0.15))
    expected = ((accurate == labels).mean() - 0.5) / ((accurate == labels).mean() + 0.1 - 0.5)
    assert with_gain.predicted == pytest.approx(expected)
    assert with_gain.choice == "short tuning"
    assert verdict(ACCURACY, labels, accurate, accurate, 0.5, gain=Interval(0.1, -0.01, 0.2)).choice == "use as is"
    assert {reason.name for reason in with_gain.reasons} >= {"old deployment", "as they are", "guessing"}
    from_chance = verdict(ACCURACY, labels, np.zeros(400, int), accurate, 0.6)
    assert "nothing to carry over" in from_chance.advice


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("llama", "lora")])
def test_diagnosis_of_an_upgrade_that_changed_nothing(tmp_path, bases, tuned_outcomes, task_file, architecture, kind):
    old = bases[architecture][0]
    diagnosis = diagnose(
        Upgrade(old, old), tuned_outcomes[architecture, kind], task_file, tmp_path / "out", recipe=FLOAT32
    )
    assert diagnosis.verdict.choice == "use as is"
    assert diagnosis.verdict.predicted == 1
    segment, similarity, flips = (diagnosis.answers[name] for name in ("connectivity", "similarity", "regressions"))
    assert max(segment.barrier.values()) == pytest.approx(0, abs=1e-6)
    assert segment.connected
    assert max(map(max, similarity.divergence)) == pytest.approx(0, abs=1e-6)
    assert min(similarity.cka) == pytest.approx(1, abs=1e-5)
    assert (flips.negative, flips.positive, flips.mcnemar) == (0, 0, 1)
    assert diagnosis.answers["shift"].whole.shift == 0
    assert diagnosis.left_out == {}
    stored = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(diagnosis)))
    assert stored["schema"] == 2
    assert read_diagnosis(stored, "diagnosis.json") == diagnosis


def test_diagnosis_with_counterparts_and_checkpoints(tmp_path, bases, tuned_outcomes, task_file, quick_recipe):
    old, new = bases["bert"]
    counterparts = tuple(
        str(tune(new, task_file, tmp_path / f"new{seed}", recipe=dataclasses.replace(quick_recipe, seed=seed)).path)
        for seed in (20, 30)
    )
    questions = Questions(points=5, counterparts=counterparts, checkpoints=(str(new),), plane=3)
    diagnosis = diagnose(
        Upgrade(old, new), tuned_outcomes["bert", "full"], task_file, questions=questions, recipe=FLOAT32
    )
    assert diagnosis.compared == counterparts[0]
    segment, points, plane = (diagnosis.answers[name] for name in ("connectivity", "compatibility", "plane"))
    assert len(segment.mu) == 5
    assert segment.ends == ("old deployment", "new deployment, new20")
    assert len(points) == 2
    assert points[1].score == diagnosis.check.new
    assert diagnosis.answers["regressions"].noise is not None
    assert len(plane.loss) == len(plane.loss[0]) == 3
    assert segment.score["test"][0] == diagnosis.check.old


def test_questions_without_an_answer_are_left_out_with_the_reason(bases, saved_adaptations, task_file):
    old, new = bases["bert"]
    diagnosis = diagnose(Upgrade(old, new), saved_adaptations["bert", "prompt"][0].parent, task_file, recipe=FLOAT32)
    assert "kept" not in diagnosis.answers
    assert "virtual tokens" in diagnosis.left_out["kept"]
    assert "similarity" in diagnosis.answers


def test_every_question_has_its_order_and_a_section_in_the_report():
    questions = all_questions()
    assert len({question.name for question in questions}) == len({question.order for question in questions})
    without_section = {
        question.name
        for question in questions
        if not importlib.util.find_spec(f"{sections.__name__}.{question.section or question.name}")
    }
    assert without_section == {"probe", "verdict"}  # a card at the top shows the verdict


def test_invalid_requests_are_refused_and_write_nothing(tmp_path, bases, tuned_outcomes, task_file):
    with pytest.raises(RecipeError, match="from 3 to 1,000 points"):
        Questions(points=2)
    with pytest.raises(RecipeError, match="counterpart"):
        Questions(plane=5)
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "thesis.txt").write_text("")
    upgrade = Upgrade(*bases["bert"])
    adaptation = tuned_outcomes["bert", "full"]
    with pytest.raises(OutcomeError, match="documents"):
        diagnose(upgrade, adaptation, task_file, folder)
    with pytest.raises(MismatchError, match="was tuned on"):
        diagnose(upgrade, adaptation, task_file, questions=Questions(counterparts=(str(adaptation),)))
    assert [file.name for file in folder.iterdir()] == ["thesis.txt"]


def test_command_prints_and_writes_a_deep_diagnosis(tmp_path, bases, tuned_outcomes, task_file, run_main):
    old, new = bases["bert"]
    upgrade = ["--old-base", old, "--new-base", new, "--adaptation", tuned_outcomes["bert", "full"]]
    command = ["check", *upgrade, "--task", task_file, "--precision", "fp32"]

    code, output, _ = run_main(*command, "--deep", "--points", 3, "--out", tmp_path / "deep")
    assert code == 0
    for line in ("barrier of the loss", "attention heads", "shift against delta", "sure)", "regraft report"):
        assert line in output
    assert (tmp_path / "deep" / "diagnosis.json").is_file()
    code, _, error = run_main(*command, "--out", tmp_path / "other")
    assert code == 2
    assert "--deep" in error
