"""The diagnosis of text generation: known answers, prompts alone, texts and tasks of `keep`, records and the page."""

import dataclasses
import importlib
import json
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import FLOAT32, SIZES, assert_mentions, make_sentence, write_base, write_upgrade
from safetensors.torch import load_file, save_file

from regraft import Base, Recipe, Upgrade, check, diagnose, load_adaptation, tune
from regraft.adaptation import fresh_model, load_model
from regraft.diagnosis import (
    Questions,
    load_pair,
    measure_knowledge,
    read_diagnosis,
    regressions,
    retention,
    segment,
    similarity,
    verdict,
)
from regraft.diagnosis.choice import choose, is_within_tolerance
from regraft.diagnosis.comparison import ModelComparison
from regraft.errors import DataError, MismatchError
from regraft.model import Deployment
from regraft.model.attention import Activations
from regraft.model.corpus import Corpus, pack
from regraft.model.keep import MAX_BLOCKS, keep_metric, measure_keep
from regraft.progress import silent
from regraft.task import load_data
from regraft.task.types.answer_metrics import EXACT_MATCH, LOSS
from regraft.task.types.likelihood import CATEGORICAL
from regraft.task.types.token_likelihood import TOKENS
from regraft.task.types.token_logits import CHUNK_ROWS, TokenLogits, VocabularyHead
from regraft.tuning.language import language_loss

FEW_POINTS = Questions(points=3)


def write_task(folder, name, **keys):
    """Write a task file of text generation."""
    settings = {"type": "text-generation", "train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl"}
    settings |= {"metric": "exact_match", "max_new_tokens": 4, **keys}
    lines = [f"{key}: {value}\n" for key, value in settings.items() if value is not None]
    (folder / f"{name}.yaml").write_text("".join(lines), encoding="utf-8")
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two bases, a LoRA that answers on the old one, tasks, prompts and texts."""
    folder = tmp_path_factory.mktemp("generation")
    write_upgrade(write_base(folder / "old", "llama"), folder / "new", 0.02)
    rng = random.Random(0)
    for split, count in (("train", 120), ("dev", 20), ("test", 20)):
        rows = []
        for _ in range(count):
            is_good = rng.random() < 0.5
            rows.append({"prompt": make_sentence(rng, is_good), "completion": " good" if is_good else " bad"})
        lines = {"": rows, "prompts-": [{"prompt": row["prompt"]} for row in rows]}
        for prefix, content in lines.items():
            text = "".join(json.dumps(row) + "\n" for row in content)
            (folder / f"{prefix}{split}.jsonl").write_text(text, encoding="utf-8")
    texts = "".join(make_sentence(rng, rng.random() < 0.5) + "\n" for _ in range(300))
    (folder / "texts.txt").write_text(texts, encoding="utf-8")
    write_task(folder, "task")
    write_task(folder, "loss", metric="loss")
    write_task(folder, "prompts", train="prompts-train.jsonl", dev="prompts-dev.jsonl", test=None)
    write_task(folder, "keep-texts", keep="texts.txt")
    write_task(folder, "keep-task", keep="loss.yaml")
    recipe = Recipe(steps=50, learning_rate=5e-3, precision="fp32")
    tune(Base.open(folder / "old"), folder / "task.yaml", folder / "tuned", kind="lora", recipe=recipe)
    return folder


@pytest.fixture
def open_pair(folder):
    """A function of a task and a new base, which opens the old and the new deployment in float32."""

    def open_deployments(task="task", new="new"):
        upgrade = Upgrade(folder / "old", folder / new)
        return load_pair(upgrade, folder / "tuned", folder / f"{task}.yaml", recipe=FLOAT32)

    return open_deployments


@pytest.mark.parametrize("task", ["task", "loss"])
def test_an_upgrade_that_changed_nothing_keeps_everything(folder, task):
    old = folder / "old"
    diagnosis = diagnose(
        Upgrade(old, old), folder / "tuned", folder / f"{task}.yaml", questions=FEW_POINTS, recipe=FLOAT32
    )
    result, answers = diagnosis.check, diagnosis.answers
    assert result.new == result.old
    assert result.retained == pytest.approx(1)
    assert result.agreement == pytest.approx(1, abs=1e-5)
    assert (result.negative_flips, result.positive_flips) == ((0, 0) if task == "task" else (None, None))
    assert answers["connectivity"].barrier == pytest.approx({"dev": 0, "test": 0}, abs=1e-6)
    assert answers["connectivity"].connected
    assert set(answers["connectivity"].score) == ({"dev", "test"} if task == "loss" else set())
    figures = answers["similarity"]
    assert np.abs(figures.divergence).max() < 1e-9
    assert (figures.kl, figures.agreement) == (pytest.approx(0, abs=1e-9), 1)
    assert figures.cka == pytest.approx([1] * 3)
    assert answers["kept"].share is None
    assert answers["shift"].whole.shift == 0
    assert diagnosis.verdict.choice == "use as is"
    assert diagnosis.verdict.predicted == pytest.approx(1)
    assert diagnosis.left_out.keys() == {"probe"}
    assert "predicts no texts" in diagnosis.left_out["probe"]


def test_chance_is_the_score_of_the_bare_new_base(open_pair, folder):
    with open_pair("loss") as pair:
        base = Base.open(folder / "new")
        bare = Deployment(fresh_model(base, pair.data.head, 0), base, pair.data, "fp32")
        assert pair.chance == pytest.approx(bare.score(pair.split))
        assert pair.floor == "the bare new base"
    result = check(Upgrade(folder / "old", base), folder / "tuned", folder / "loss.yaml", recipe=FLOAT32)
    assert result.floor == pytest.approx(bare.score(pair.split))
    assert result.old < result.floor  # a loss: lower is better
    assert result.retained == pytest.approx((result.new - result.floor) / (result.old - result.floor))


def test_agreement_without_answers_is_the_overlap_of_the_distributions(open_pair):
    with open_pair("loss") as pair:
        old, new = (deployment.outputs(pair.split).dense().double().softmax(1) for deployment in (pair.old, pair.new))
        assert pair.agreement(pair.new) == pytest.approx(float(old.minimum(new).sum(1).mean()), abs=1e-5)


def test_agreement_maps_tokens_between_vocabularies(open_pair, folder):
    exchanged = folder / "exchanged"
    shutil.copytree(folder / "new", exchanged)
    content = json.loads((exchanged / "tokenizer.json").read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    ids["good"], ids["bad"] = ids["bad"], ids["good"]
    (exchanged / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tensors = load_file(exchanged / "model.safetensors")
    rows = [ids["good"], ids["bad"]]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][rows] = tensors[name][rows[::-1]]
    save_file(tensors, exchanged / "model.safetensors", metadata={"format": "pt"})
    with open_pair("loss") as pair, open_pair("loss", "exchanged") as exchanged_pair:
        assert exchanged_pair.agreement(exchanged_pair.new) == pytest.approx(pair.agreement(pair.new), abs=1e-6)
        assert exchanged_pair.chance == pytest.approx(pair.chance, abs=1e-6)


def test_no_logits_of_all_rows_exist(folder, monkeypatch):
    """The texts of `retention` and `keep` have thousands of tokens, of which only those of a chunk may have logits."""
    num_rows = []

    linear = torch.nn.functional.linear

    def record(states, weight, bias=None):
        if len(weight) == SIZES["vocab_size"]:
            num_rows.append(states.shape[:-1].numel())
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    upgrade = Upgrade(folder / "old", folder / "new")
    diagnose(upgrade, folder / "tuned", folder / "keep-texts.yaml", questions=FEW_POINTS, recipe=FLOAT32)
    assert max(num_rows) == CHUNK_ROWS


def test_agreement_is_unknown_if_the_tokenizers_divide_texts_differently(open_pair):
    with open_pair("loss") as pair:
        examples = pair.new.examples(pair.split)
        cut = [ids[:-1] for ids in examples.columns["input_ids"]]
        pair.new._examples[pair.split] = dataclasses.replace(examples, columns={"input_ids": cut})
        assert pair.agreement(pair.new) is None


def test_flips_and_health_follow_from_the_answers(open_pair):
    with open_pair() as pair:
        prediction = {"ended": True, "tokens": 2, "loss": 0.0, "correct": 1, "labels": 1}
        right = [{**prediction, "answer": target.strip()} for target in pair.split.targets.tolist()]
        wrong = {**prediction, "answer": "film film", "ended": False}
        pair.old._predictions[pair.split] = [wrong, *right[1:]]  # a positive flip in row 0
        pair.new._predictions[pair.split] = [*right[:4], *[wrong] * 3, *right[7:]]  # and three negative ones
        result = regressions(pair, [[True] * 20])
        assert (result.negative, result.positive, result.examples) == (3, 1, 20)
        assert [flip.kind for flip in result.flips] == ["positive", "negative", "negative", "negative"]
        assert result.flips[1].after == "film film"
        assert result.flips[1].confidence is None
        assert result.noise == pytest.approx((0 + 3 / 20) / 2)
        health, answers = result.views
        assert [row[:3] for row in health.rows] == [("old", 0.95, 21 / 20), ("new", 17 / 20, 23 / 20)]
        assert [pair.change for pair in answers.pairs[:5]] == ["negative"] * 3 + ["positive", "same"]


def test_predictions_that_are_neither_right_nor_wrong_have_no_flips(open_pair):
    with open_pair("loss") as pair:
        result = regressions(pair)
    assert (result.negative, result.positive, result.mcnemar, result.noise, result.flips) == (None,) * 4 + ((),)


@pytest.mark.parametrize("metric", ["exact_match", "loss"])
def test_prompts_alone_have_agreement_and_health_but_no_scores(folder, metric):
    task = write_task(
        folder, f"prompts-{metric}", train="prompts-train.jsonl", dev="prompts-dev.jsonl", test=None, metric=metric
    )
    upgrade = Upgrade(folder / "old", folder / "new")
    result = check(upgrade, folder / "tuned", task, recipe=FLOAT32)
    assert (result.old, result.new, result.floor, result.retained) == (None,) * 4
    assert (result.negative_flips, result.positive_flips) == (None, None)
    assert 0 <= result.agreement <= 1
    assert result.effect > 0
    assert result.health.keys() == {"before", "after"}
    assert result.health["before"].length_ratio is None
    assert "neither scores nor flips are known" in result.verdict
    diagnosis = diagnose(upgrade, folder / "tuned", task, questions=FEW_POINTS, recipe=FLOAT32)
    assert (diagnosis.verdict.choice, diagnosis.verdict.predicted) == ("unknown", None)
    assert diagnosis.left_out.keys() == {"connectivity", "probe"}
    assert "no reference answers" in diagnosis.left_out["connectivity"]
    assert len(diagnosis.answers["regressions"].views) == 2


def test_divergence_over_a_vocabulary_equals_that_of_dense_outputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 4, generator=generator)
    states = [torch.randn(5, 4, generator=generator) for _ in range(2)]
    attention = (torch.full((1, 1, 5, 5), 0.2),)
    mask = torch.ones(1, 5, dtype=torch.bool)
    figures = []
    for likelihood, outputs in (
        (TOKENS, [TokenLogits(rows, VocabularyHead(weight)) for rows in states]),
        (CATEGORICAL, [rows @ weight.T for rows in states]),
    ):
        comparison = ModelComparison(likelihood, all_head_pairs=False)
        comparison.add(*(Activations(attention, (states[0][None],), rows) for rows in outputs), mask)
        figures.append((comparison.kl, comparison.num_equal, comparison.num_predictions))
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_loss_on_the_segment_equals_that_of_interpolated_models(open_pair, folder):
    with open_pair("loss") as pair:
        models = [pair.old.model, pair.new.model]
        result = segment(*models, pair.upgrade.old, pair.data, points=3)
        tensors = [dict(model.named_parameters()) for model in models]
        middle = load_model(load_adaptation(folder / "tuned"), pair.upgrade.old, pair.data.head)
        with torch.no_grad():
            for name, parameter in middle.named_parameters():
                parameter.copy_((tensors[0][name].cpu() + tensors[1][name].cpu()) / 2)
        deployment = Deployment(middle, pair.upgrade.old, pair.data, "fp32")
        assert result.loss["test"][1] == pytest.approx(deployment.loss(pair.split), abs=1e-5)
        assert result.score["test"] == pytest.approx(result.loss["test"], abs=1e-5)


def test_long_examples_have_no_attention_maps(open_pair, monkeypatch):
    module = importlib.import_module("regraft.diagnosis.similarity")  # the package has a function of that name
    monkeypatch.setattr(module, "MAX_GENERATED_TOKENS", 8)
    with open_pair() as pair:
        lengths = pair.old.examples(pair.split).lengths
        result = similarity(pair.old.model, pair.new.model, pair.upgrade.old, pair.data, maps=0)
        assert 0 < result.texts == (lengths <= 8).sum() < len(pair.split)
        monkeypatch.setattr(module, "MAX_GENERATED_TOKENS", 1)
        with pytest.raises(MismatchError, match="more than 1 tokens"):
            similarity(pair.old.model, pair.new.model, pair.upgrade.old, pair.data)


def test_retention_measures_deployments_as_the_language_models_that_they_are(open_pair, folder):
    with open_pair() as pair:
        result = retention(pair, [str(folder / "texts.txt")])
        blocks = np.array(pack(Corpus((str(folder / "texts.txt"),)), pair.old.base, 64, folder / "tokens.bin", silent))
        expected = language_loss(pair.new.model, pair.new.base, blocks[:128], "fp32")
    assert result.loss["new deployment"] == pytest.approx(expected, abs=1e-5)


def test_texts_to_keep_have_the_loss_of_language_modelling(folder):
    data = load_data(folder / "keep-texts.yaml", 0)
    assert keep_metric(data.task) is LOSS
    for name in ("old", "new"):
        base = Base.open(folder / name)
        model = fresh_model(base, data.head, 0)
        corpus, size = Corpus((str(folder / "texts.txt"),)), base.max_input_length
        blocks = np.array(pack(corpus, base, size, folder / f"{name}.bin", silent))[:MAX_BLOCKS]
        with torch.no_grad():
            ids = torch.from_numpy(blocks.astype(np.int64))
            expected = float(model(input_ids=ids, labels=ids).loss)
        assert measure_keep(model, base, data, "fp32") == pytest.approx(expected, abs=1e-5)


def test_a_task_to_keep_has_its_own_metric(folder):
    data, kept = (load_data(folder / f"{name}.yaml", 0) for name in ("keep-task", "loss"))
    assert keep_metric(data.task).name == "loss"
    base = Base.open(folder / "new")
    model = fresh_model(base, data.head, 0)
    expected = Deployment(model, base, kept, "fp32").score(kept.test)
    assert measure_keep(model, base, data, "fp32") == expected


def test_without_keep_there_is_no_measurement(folder, data):
    generation = load_data(folder / "task.yaml", 0)
    for task_data in (generation, data):
        assert keep_metric(task_data.task) is None
        assert measure_keep(None, None, task_data, "fp32") is None


def test_new_knowledge_and_old_behaviour_of_all_models(folder):
    result = check(Upgrade(folder / "old", folder / "new"), folder / "tuned", folder / "keep-task.yaml", recipe=FLOAT32)
    rows = {row.model: row for row in result.knowledge.models}
    assert list(rows) == ["old base", "new base", "old deployment", "as they are"]
    assert (result.knowledge.source, result.knowledge.metric) == ("loss.yaml", "loss")
    losses = check(Upgrade(folder / "old", folder / "new"), folder / "tuned", folder / "loss.yaml", recipe=FLOAT32)
    assert rows["old deployment"].new_knowledge == pytest.approx(losses.old)
    assert rows["as they are"].new_knowledge == pytest.approx(losses.new)
    assert rows["new base"].new_knowledge == pytest.approx(losses.floor)
    assert rows["new base"].old_behaviour == result.floor
    assert rows["old deployment"].old_behaviour == result.old


def test_what_cannot_be_kept_is_refused_before_models_run(folder, task_file, monkeypatch):
    upgrade = Upgrade(folder / "old", folder / "new")
    monkeypatch.setattr("regraft.diagnosis.pair.load_old_model", None)  # calling it would fail
    for keep, words in (("missing.txt", ["missing.txt", "no such file"]), (task_file, ["text-generation"])):
        task = write_task(folder, "keep-wrong", keep=keep)
        with pytest.raises(DataError) as error:
            check(upgrade, folder / "tuned", task, recipe=FLOAT32)
        assert_mentions(error, *words)


def test_losses_of_texts_are_not_compared_between_vocabularies(open_pair, monkeypatch):
    monkeypatch.setattr("regraft.base.Base.vocabulary", property(lambda base: {str(base.path): 0}))
    with open_pair("keep-texts") as pair, pytest.raises(MismatchError, match="different vocabularies"):
        measure_knowledge(pair)


def test_a_loss_is_as_good_within_its_own_tolerance():
    assert is_within_tolerance(LOSS, 2.0, 2.015)
    assert is_within_tolerance(LOSS, 2.0, 1.5)
    assert is_within_tolerance(LOSS, 2.0, 2.03) is False
    assert is_within_tolerance(EXACT_MATCH, 0.9, 0.9) is None
    assert choose(0.5, within_tolerance=True) == "use as is"
    assert choose(0.99, within_tolerance=False) == "training-free"
    rng = np.random.default_rng(0)
    before = [{"loss": loss, "correct": 0, "labels": 1} for loss in rng.uniform(1.9, 2.1, 100).tolist()]
    for shift, chance, choice in (
        (0.01, 2.05, "use as is"),  # a share of 0.8 or less of a small gain
        (0.05, 12.0, "training-free"),
        (-0.5, 4.0, "use as is"),
        (0.9, 3.0, "scratch"),
        (0.0, 1.0, "scratch"),  # no better than the bare base
    ):
        after = [{**prediction, "loss": prediction["loss"] + shift} for prediction in before]
        result = verdict(LOSS, ["a"] * 100, before, after, chance, floor="the bare new base")
        assert result.choice == choice
        assert "the bare new base" in result.advice


def test_records_of_earlier_versions_are_still_read(folder):
    out = folder / "deep"
    diagnosis = diagnose(
        Upgrade(folder / "old", folder / "new"),
        folder / "tuned",
        folder / "keep-texts.yaml",
        out,
        questions=FEW_POINTS,
        recipe=FLOAT32,
    )
    content = json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))
    assert read_diagnosis(content, "diagnosis.json") == diagnosis
    for field in ("health", "knowledge", "floor_name"):
        del content["answers"]["check"][field]
    del content["answers"]["knowledge"]
    earlier = read_diagnosis(content, "diagnosis.json")
    assert (earlier.check.health, earlier.check.knowledge, earlier.check.floor_name) == ({}, None, "guessing")
    assert "knowledge" not in earlier.answers


def test_command_and_page_show_what_the_upgrade_brought(folder, tmp_path, run_main):
    names = {"--old-base": "old", "--new-base": "new", "--adaptation": "tuned"}
    options = [part for option, name in names.items() for part in (option, folder / name)]
    command = ["check", *options, "--precision", "fp32", "--task"]
    code, output, _ = run_main(*command, folder / "keep-texts.yaml")
    assert code == 0
    for line in ("floor (bare new base)", "answers before", "new knowledge  old behaviour", "loss on texts.txt"):
        assert line in output
    for task, printed, shown in (
        ("keep-texts", "use as is", ["What the upgrade brought", "Answers side by side", "bare new base"]),
        ("prompts", "– / –", ["Unknown", "Health of the answers", "are right is not known"]),
    ):
        out, page = tmp_path / task, tmp_path / f"{task}.html"
        code, output, error = run_main(*command, folder / f"{task}.yaml", "--deep", "--points", 3, "--out", out)
        assert code == 0, error
        assert printed in output
        assert run_main("report", out, "--out", page)[0] == 0
        text = page.read_text(encoding="utf-8")
        assert all(words in text for words in shown)


def test_plane_and_compatibility_of_decoders(folder, tmp_path):
    recipe = Recipe(steps=2, learning_rate=5e-3, precision="fp32", seed=1)
    scratch = tune(Base.open(folder / "new"), folder / "task.yaml", tmp_path / "scratch", kind="lora", recipe=recipe)
    questions = Questions(points=3, plane=3, counterparts=(str(scratch.path),), checkpoints=(str(folder / "new"),))
    upgrade = Upgrade(folder / "old", folder / "new")
    task = folder / "keep-texts.yaml"
    diagnosis = diagnose(upgrade, folder / "tuned", task, questions=questions, recipe=FLOAT32)
    answers = diagnosis.answers
    assert np.shape(answers["plane"].loss) == (3, 3)
    assert answers["plane"].score == ()  # answers are not generated at each point
    first, last = answers["compatibility"]
    assert first.score == pytest.approx(diagnosis.check.old)
    assert last.agreement == pytest.approx(diagnosis.check.agreement)
    names = [model.model for model in answers["knowledge"].models]
    assert names == ["old base", "new base", "old deployment", "as they are", "new deployment, scratch"]
