"""Questions asked of an upgrade against known answers: flips, calibration, shift, what is kept, verdicts, all."""

import dataclasses
import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from conftest import LABELS, adapt, move_base, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import recall_score

from regraft import Base, Recipe, Upgrade, check, load_adaptation, tune
from regraft.cli import main
from regraft.diagnosis import (
    Questions,
    all_questions,
    compatibility,
    diagnose,
    kept,
    load_pair,
    mcnemar,
    noise_floor,
    read_diagnosis,
    regressions,
    shift,
    verdict,
)
from regraft.diagnosis.choice import choose
from regraft.errors import MismatchError, OutcomeError, RecipeError
from regraft.report import sections
from regraft.task import Interval
from regraft.task.types.class_metrics import ACCURACY
from regraft.task.types.class_views import calibration
from regraft.weights import subspace_overlap

EXACT = Recipe(precision="fp32")


@pytest.fixture
def pair_of(bases, task_file):
    def load(upgrade, path, **more):
        return load_pair(upgrade, path, task_file, recipe=EXACT, **more)

    return load


def test_flips_by_hand(pair_of, bases, tuned):
    with pair_of(Upgrade(*bases["bert"]), tuned["bert", "full"]) as pair:
        labels = pair.split.labels.tolist()
        right = torch.tensor(labels)
        before, after = right.clone(), right.clone()
        before[:3] = 1 - before[:3]  # wrong, then right
        after[10:15] = 1 - after[10:15]  # right, then wrong
        sure = torch.nn.functional.one_hot
        pair.old._outputs[pair.split], pair.new._outputs[pair.split] = 4.0 * sure(before, 2), 2.0 * sure(after, 2)
        found = regressions(pair, [[True] * 100])
        assert (found.negative, found.positive, found.examples) == (5, 3, 100)
        assert [flip.row for flip in found.flips] == [int(pair.split.rows[i]) for i in (0, 1, 2, 10, 11, 12, 13, 14)]
        assert [flip.kind for flip in found.flips] == ["positive"] * 3 + ["negative"] * 5
        flip = found.flips[3]
        assert flip.text == pair.split.texts[10][0]
        assert (flip.label, flip.before, flip.after) == (LABELS[labels[10]], LABELS[labels[10]], LABELS[1 - labels[10]])
        assert flip.confidence == pytest.approx(math.exp(2) / (math.exp(2) + 1), abs=1e-4)
        classes, calibrated = found.views
        for number, (label, examples, _, recall, _, negative, _) in enumerate(classes.rows):
            assert label == LABELS[number]
            assert examples == labels.count(number)
            assert recall == pytest.approx(recall_score(labels, after, labels=[number], average=None)[0])
            assert negative == sum(labels[i] == number for i in range(10, 15))
        assert [sum(series.sizes) for series in calibrated.series] == [100, 100]
        assert found.noise == pytest.approx((5 + 0) / 2 / 100)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(3, 1) == pytest.approx(2 * (4 + 1) / 16)
    assert mcnemar(7, 7) == 1
    assert mcnemar(40, 10) == pytest.approx(mcnemar(10, 40))
    assert mcnemar(40, 10) < 1e-4


def test_noise_floor():
    assert noise_floor([[True, True]]) is None
    assert noise_floor([[True, True, True, False], [True, True, False, False]]) == pytest.approx((1 / 4 + 0) / 2)


def test_calibration_by_hand():
    probabilities = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.35, 0.65], [0.4, 0.6]])
    found = calibration(probabilities.amax(dim=1).tolist(), [True, False, True, True])
    assert [(bin.low, bin.count) for bin in found.bins] == [(0.5, 1), (0.6, 1), (0.9, 2)]
    assert found.ece == pytest.approx((0.4 + 0.35 + 2 * abs(0.935 - 0.5)) / 4, abs=1e-5)
    certain = calibration([1.0, 1.0], [True, True])
    assert certain.ece == pytest.approx(0, abs=1e-6)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 4), st.integers(0, 2**31))
def test_calibration_of_any_classifier(count, classes, seed):
    random = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(count, classes, generator=random).softmax(dim=1)
    labels = torch.randint(classes, (count,), generator=random)
    is_right = probabilities.argmax(dim=1) == labels
    found = calibration(probabilities.amax(dim=1).tolist(), is_right.tolist())
    assert 0 <= found.ece <= 1
    assert sum(bin.count for bin in found.bins) == count
    right = is_right.float().mean()
    assert sum(bin.count * bin.accuracy for bin in found.bins) / count == pytest.approx(float(right), abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 20), st.integers(4, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_overlap_of_subspaces(out, inner, directions, seed):
    random = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(out, inner, generator=random, dtype=torch.float64) for _ in range(2))
    assert subspace_overlap(one, one, directions) == pytest.approx(1)
    assert subspace_overlap(one, -3 * one, directions) == pytest.approx(1)
    between = subspace_overlap(one, other, directions)
    assert -1e-9 <= between <= 1 + 1e-9
    assert subspace_overlap(other, one, directions) == pytest.approx(between)
    turn = torch.linalg.qr(torch.randn(out, out, generator=random, dtype=torch.float64)).Q
    assert subspace_overlap(turn @ one, turn @ other, directions) == pytest.approx(between)


def test_overlap_of_orthogonal_and_of_large_matrices():
    one, other = torch.zeros(10, 6), torch.zeros(10, 6)
    one[:3], other[3:6] = torch.randn(3, 6), torch.randn(3, 6)
    assert subspace_overlap(one, other, 3) == pytest.approx(0, abs=1e-9)
    assert subspace_overlap(one, torch.zeros(10, 6)) == 0
    random = torch.Generator().manual_seed(0)
    large = torch.randn(1100, 4, generator=random) @ torch.randn(4, 1200, generator=random)
    before = torch.get_rng_state()
    assert subspace_overlap(large, 2 * large, 4) == pytest.approx(1, abs=1e-3)
    assert torch.equal(torch.get_rng_state(), before)


def test_shift_against_delta(tmp_path, bases):
    old, new = bases["bert"]
    body = {n: t.double() for n, t in load_file(old / "model.safetensors").items() if n.startswith("bert.")}
    upgrade = Upgrade(old, new)
    path = adapt(upgrade.old, "full", tmp_path / "full")
    tensors = weights(path)
    moved = load_file(new / "model.safetensors")
    for name in body:  # what tuning changed is half of what the upgrade changes, and the other way round in one tensor
        tensors[name] = body[name].add((moved[name].double() - body[name]) / 2).float()
    back = "bert.encoder.layer.1.output.dense.weight"
    tensors[back] = (body[back] - (moved[back].double() - body[back])).float()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = shift(upgrade, load_adaptation(path))
    assert found.whole.base == pytest.approx(math.sqrt(sum(float(t.square().sum()) for t in body.values())))
    assert found.whole.shift == pytest.approx(upgrade.distance().l2)
    first = next(layer for layer in found.layers if layer.name == "layer 0")
    assert first.cosine == pytest.approx(1, abs=1e-4)
    assert first.delta == pytest.approx(first.shift / 2, rel=1e-4)
    assert first.signs == pytest.approx(1, abs=1e-3)
    assert first.overlap == pytest.approx(1, abs=1e-3)
    assert next(layer for layer in found.layers if layer.name == "layer 1").cosine < 0.5
    assert [layer.name for layer in found.layers] == ["embeddings", "layer 0", "layer 1"]
    kinds = {kind.name: kind for kind in found.kinds}
    assert set(kinds) >= {"embedding", "attention", "feed-forward", "norm"}
    squares = sum(kind.shift**2 for kind in found.kinds)
    assert math.sqrt(squares) == pytest.approx(found.whole.shift)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_shift_of_a_lora_is_that_of_the_full_fine_tune_it_amounts_to(tmp_path, bases, architecture):
    from regraft import convert

    upgrade = Upgrade(*bases[architecture])
    path = adapt(upgrade.old, "lora", tmp_path / "made" / "adaptation")
    full = convert(path, upgrade.old, tmp_path / "full", "full").path
    one, other = (shift(upgrade, load_adaptation(p)) for p in (path, full))
    assert one.whole.delta == pytest.approx(other.whole.delta, rel=1e-4)
    assert one.whole.cosine == pytest.approx(other.whole.cosine, abs=1e-4)
    assert one.whole.shift == other.whole.shift


def test_shift_where_there_is_no_dense_delta(tmp_path, bases):
    upgrade = Upgrade(*bases["bert"])
    found = shift(upgrade, load_adaptation(adapt(upgrade.old, "bottleneck", tmp_path / "made")))
    assert found.whole.shift > 0
    assert (found.whole.delta, found.whole.cosine, found.whole.signs, found.whole.overlap) == (0, None, None, None)


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("llama", "lora"), ("roberta", "full")])
def test_what_is_kept_of_bases_that_are_the_same(pair_of, bases, tuned, architecture, kind):
    old = bases[architecture][0]
    with pair_of(Upgrade(old, old), tuned[architecture, kind]) as pair:
        found = kept(pair)
    assert found.loss["old base"] == found.loss["new base"]
    assert found.loss["old deployment"] == pytest.approx(found.loss["new deployment"], rel=1e-5)
    assert found.share is None
    assert found.text == "the training texts of mood"


def test_what_is_kept_of_a_gain(tmp_path, pair_of, bases, task_file):
    """An adaptation that changes nothing keeps all of the gain; the loss is transformers' own."""
    from regraft import Corpus, pretrain

    old = Base.open(bases["bert"][0])
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{row}\n" for row in (task_file.parent / "train.csv").read_text().splitlines()[1:]))
    new = pretrain(
        old, Corpus((str(text),)), tmp_path / "new", Recipe(steps=40, learning_rate=3e-3, precision="fp32"), 16
    )
    path = adapt(old, "full", tmp_path / "made")
    tensors = weights(path)
    plain = load_file(old.path / "model.safetensors")
    unchanged = {name: plain.get(name, tensor) for name, tensor in tensors.items()}
    unchanged["classifier.weight"] = unchanged["classifier.weight"] + 1
    unchanged["bert.encoder.layer.1.output.LayerNorm.bias"] = (
        unchanged["bert.encoder.layer.1.output.LayerNorm.bias"] + 1e-5
    )
    save_file(unchanged, path / "model.safetensors", metadata={"format": "pt"})
    with pair_of(Upgrade(old, new), path) as pair:
        found = kept(pair, (str(text),))
        before = pair.old.outputs(pair.split)
        pair.old.clear_outputs()
        assert torch.equal(pair.old.outputs(pair.split), before)  # the deployments are as they were
    assert found.loss["new base"] < found.loss["old base"]
    assert found.share == pytest.approx(1, abs=0.005)
    assert found.text == str(text)


def test_nothing_is_kept_where_there_is_no_language_model(tmp_path, pair_of, bases, tuned, made):
    headless = tmp_path / "headless"
    headless.mkdir()
    old = bases["bert"][0]
    for file in old.iterdir():
        if file.suffix != ".safetensors":
            (headless / file.name).write_bytes(file.read_bytes())
    tensors = load_file(old / "model.safetensors")
    body = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    save_file(body, headless / "model.safetensors", metadata={"format": "pt"})
    told = "no language-modelling head"
    with pair_of(Upgrade(headless, headless), tuned["bert", "full"]) as pair, pytest.raises(MismatchError, match=told):
        kept(pair)
    prompt = made["bert", "prompt"][0].parent
    with pair_of(Upgrade(*bases["bert"]), prompt) as pair, pytest.raises(MismatchError, match="virtual tokens"):
        kept(pair)


def test_compatibility_over_checkpoints(tmp_path, pair_of, bases, tuned):
    old, new = bases["bert"]
    way = [move_base(old, tmp_path / f"step{n}", amount) for n, amount in enumerate((0.05, 0.3, 3.0))]
    with pair_of(Upgrade(old, new), tuned["bert", "full"]) as pair:
        points = compatibility(pair, way)
    assert [point.name for point in points] == [str(old), *map(str, way)]
    assert points[0].distance == 0
    assert points[0].agreement == 1
    assert points[0].score == check(Upgrade(old, new), tuned["bert", "full"], pair.data, recipe=EXACT).old
    distances = [point.distance for point in points]
    assert distances == sorted(distances)
    assert points[1].agreement >= points[3].agreement
    one = check(Upgrade(old, way[1]), tuned["bert", "full"], pair.data, recipe=EXACT)
    assert points[2].score == one.new
    assert points[2].agreement == pytest.approx(one.agreement)


@pytest.mark.parametrize(
    ("share", "gain", "choice"),
    [(1.2, 0, "use as is"), (0.95, 0, "use as is"), (0.9, 0, "training-free"), (0.9, 0.02, "short tuning"),
     (0.5, 0, "short tuning"), (0.1, 0, "scratch"), (-1, 0, "scratch")],
)  # fmt: skip
def test_choices(share, gain, choice):
    assert choose(share, gain) == choice


def test_verdicts():
    random = np.random.default_rng(0)
    labels = random.integers(2, size=400)
    good = np.where(random.random(400) < 0.9, labels, 1 - labels)
    same = verdict(ACCURACY, labels, good, good, 0.5)
    assert (same.choice, same.sure, same.predicted) == ("use as is", 1, 1)
    lost = verdict(ACCURACY, labels, good, random.integers(2, size=400), 0.5)
    assert lost.choice == "scratch"
    assert lost.sure > 0.9
    assert "from scratch" in lost.advice
    slightly = np.where(random.random(400) < 0.03, 1 - good, good)
    between = verdict(ACCURACY, labels, good, slightly, 0.5)
    assert 0.3 < between.sure < 1
    better = verdict(ACCURACY, labels, good, good, 0.5, gain=Interval(0.1, 0.05, 0.15))
    expected = ((good == labels).mean() - 0.5) / ((good == labels).mean() + 0.1 - 0.5)
    assert better.predicted == pytest.approx(expected)
    assert better.choice == "short tuning"
    assert verdict(ACCURACY, labels, good, good, 0.5, gain=Interval(0.1, -0.01, 0.2)).choice == "use as is"
    assert {reason.name for reason in better.reasons} >= {"old deployment", "as they are", "guessing"}
    useless = verdict(ACCURACY, labels, np.zeros(400, int), good, 0.6)
    assert "nothing to carry over" in useless.advice


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("llama", "lora")])
def test_diagnosis_of_an_upgrade_that_changed_nothing(tmp_path, bases, tuned, task_file, architecture, kind):
    old = bases[architecture][0]
    found = diagnose(Upgrade(old, old), tuned[architecture, kind], task_file, tmp_path / "out", recipe=EXACT)
    assert found.verdict.choice == "use as is"
    assert found.verdict.predicted == 1
    segment, alike, worse = (found.answers[name] for name in ("connectivity", "similarity", "regressions"))
    assert max(segment.barrier.values()) == pytest.approx(0, abs=1e-6)
    assert segment.connected
    assert max(map(max, alike.divergence)) == pytest.approx(0, abs=1e-6)
    assert min(alike.cka) == pytest.approx(1, abs=1e-5)
    assert (worse.negative, worse.positive, worse.mcnemar) == (0, 0, 1)
    assert found.answers["shift"].whole.shift == 0
    assert found.left_out == {}
    stored = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(found)))
    assert stored["schema"] == 2
    assert read_diagnosis(stored, "diagnosis.json") == found


def test_diagnosis_with_counterparts_and_checkpoints(tmp_path, bases, tuned, task_file, quick):
    old, new = bases["bert"]
    others = tuple(
        str(tune(new, task_file, tmp_path / f"new{s}", recipe=dataclasses.replace(quick, seed=s)).path)
        for s in (20, 30)
    )
    asked = Questions(points=5, counterparts=others, checkpoints=(str(new),), plane=3)
    found = diagnose(Upgrade(old, new), tuned["bert", "full"], task_file, questions=asked, recipe=EXACT)
    assert found.compared == others[0]
    segment, points, plane = (found.answers[name] for name in ("connectivity", "compatibility", "plane"))
    assert len(segment.mu) == 5
    assert segment.ends == ("old deployment", "new deployment, new20")
    assert len(points) == 2
    assert points[1].score == found.check.new
    assert found.answers["regressions"].noise is not None
    assert len(plane.loss) == len(plane.loss[0]) == 3
    assert segment.score["test"][0] == found.check.old


def test_what_cannot_be_answered_is_said(tmp_path, bases, made, task_file):
    old, new = bases["bert"]
    found = diagnose(Upgrade(old, new), made["bert", "prompt"][0].parent, task_file, recipe=EXACT)
    assert "kept" not in found.answers
    assert "virtual tokens" in found.left_out["kept"]
    assert "similarity" in found.answers


def test_questions_and_their_sections():
    questions = all_questions()
    assert len({question.name for question in questions}) == len({question.order for question in questions})
    drawn = {
        question.name for question in questions if importlib.util.find_spec(f"{sections.__name__}.{question.name}")
    }
    assert {question.name for question in questions} - drawn == {"probe", "verdict"}  # the second is the card above all


def test_bad_requests(tmp_path, bases, tuned, task_file):
    with pytest.raises(RecipeError, match="from 3 to 1,000 points"):
        Questions(points=2)
    with pytest.raises(RecipeError, match="counterpart"):
        Questions(plane=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    upgrade = Upgrade(*bases["bert"])
    with pytest.raises(OutcomeError, match="mine"):
        diagnose(upgrade, tuned["bert", "full"], task_file, tmp_path / "mine")
    with pytest.raises(MismatchError, match="was tuned on"):
        diagnose(
            upgrade, tuned["bert", "full"], task_file, questions=Questions(counterparts=(str(tuned["bert", "full"]),))
        )
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_command(tmp_path, bases, tuned, task_file, monkeypatch, capsys):
    old, new = bases["bert"]
    given = ["--old-base", str(old), "--new-base", str(new), "--adaptation", str(tuned["bert", "full"])]
    command = ["regraft", "check", *given, "--task", str(task_file), "--precision", "fp32"]

    def run(*more):
        monkeypatch.setattr("sys.argv", [*command, *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr()

    code, printed = run("--deep", "--points", "3", "--out", str(tmp_path / "deep"))
    assert code == 0
    for line in ("barrier of the loss", "attention heads", "shift against delta", "sure)", "regraft report"):
        assert line in printed.out
    assert (tmp_path / "deep" / "diagnosis.json").is_file()
    code, printed = run("--out", str(tmp_path / "other"))
    assert code == 2
    assert "--deep" in printed.err
