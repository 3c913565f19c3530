"""Recycling end to end, on tiny bases of every architecture."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    compute_test_logits,
    have_equal_tensors,
    read_jsonl,
    read_modification_times,
    read_weights,
    write_adaptation,
    write_table,
)
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from regraft import Base, Recipe, Upgrade, compare, load_adaptation, load_outcome, recycle, tune
from regraft.errors import MismatchError, OutcomeError, RecipeError
from regraft.methods import describe_methods, methods
from regraft.task import load_data
from regraft.tuning import Distillation

ARCHITECTURES_AND_KINDS = [(architecture, kind) for architecture in ARCHITECTURES for kind in ("full", "lora")]
RECIPE = Recipe(steps=12, batch_size=8, learning_rate=1e-3, eval_every=4, precision="fp32")


@pytest.mark.parametrize(("architecture", "kind"), ARCHITECTURES_AND_KINDS)
def test_tuning_learns_the_task(tuned_outcomes, architecture, kind):
    outcome = load_outcome(tuned_outcomes[architecture, kind])
    assert outcome.scores["test"] > 0.8
    assert outcome.curve[0]["step"] == 0
    assert [point["step"] for point in outcome.curve] == [0, 20, 40, 60]


def test_outcomes_list_correct_predictions_in_schemas_1_and_2(tuned_outcomes, tmp_path):
    outcome = load_outcome(tuned_outcomes["bert", "full"])
    record = dataclasses.asdict(outcome.record)
    rows = read_jsonl(outcome.path / "predictions.jsonl")

    # In schema 1, predictions had no field `right`.
    old_copy = shutil.copytree(outcome.path, tmp_path / "copy")
    (old_copy / "outcome.json").write_text(json.dumps(record | {"schema": 1}))
    write_table(old_copy / "predictions.jsonl", [{k: v for k, v in row.items() if k != "right"} for row in rows])
    for split in ("dev", "test"):
        expected = [row["label"] == row["prediction"] for row in rows if row["split"] == split]
        assert outcome.right(split) == load_outcome(old_copy).right(split) == expected
        assert sum(expected) / len(expected) == pytest.approx(outcome.scores[split])

    (old_copy / "outcome.json").write_text(json.dumps(record | {"schema": 3}))
    with pytest.raises(OutcomeError, match="has schema 3"):
        load_outcome(old_copy)


@pytest.mark.parametrize(("architecture", "kind"), ARCHITECTURES_AND_KINDS)
def test_direct_on_an_equal_base_reproduces_the_old_model(
    tmp_path, bases, tuned_outcomes, task_file, architecture, kind
):
    old = bases[architecture][0]
    source = tuned_outcomes[architecture, kind]
    outcome = recycle(Upgrade(old, old), source, task_file, "direct", tmp_path / "out", recipe=RECIPE)
    before, after = read_weights(source / "adaptation"), read_weights(tmp_path / "out" / "adaptation")
    assert have_equal_tensors(before, after)
    logits, expected = (compute_test_logits(path, Base.open(old), task_file) for path in (outcome.path, source))
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
    assert outcome.scores["test"] == load_outcome(source).scores["test"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_direct_adds_the_delta_to_the_body_and_copies_the_head(
    tmp_path, bases, tuned_outcomes, task_file, architecture
):
    old, new = bases[architecture]
    source = tuned_outcomes[architecture, "full"]
    out = recycle(Upgrade(old, new), source, task_file, "direct", tmp_path / "out", recipe=RECIPE).path
    old_tensors, new_tensors = load_file(old / "model.safetensors"), load_file(new / "model.safetensors")
    before, after = read_weights(source / "adaptation"), read_weights(out / "adaptation")
    assert before.keys() == after.keys()
    body_names = [name for name in before if name in old_tensors]
    head_names = [name for name in before if name not in old_tensors]
    assert len(body_names) > 15
    assert any(not torch.equal(old_tensors[name], before[name]) for name in body_names)
    for name in body_names:
        expected = new_tensors[name].double() + (before[name].double() - old_tensors[name].double())
        torch.testing.assert_close(after[name].double(), expected, atol=1e-7, rtol=1e-6)
    assert {"classifier", "score"} & {name.split(".")[0] for name in head_names}
    assert all(torch.equal(before[name], after[name]) for name in head_names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_direct_copies_a_lora_and_names_the_new_base(tmp_path, bases, tuned_outcomes, task_file, architecture):
    old, new = bases[architecture]
    source = tuned_outcomes[architecture, "lora"]
    out = recycle(Upgrade(old, new), source, task_file, "direct", tmp_path / "out", recipe=RECIPE).path
    source_bytes = (source / "adaptation" / "adapter_model.safetensors").read_bytes()
    assert (out / "adaptation" / "adapter_model.safetensors").read_bytes() == source_bytes
    before, after = (json.loads((path / "adaptation" / "adapter_config.json").read_text()) for path in (source, out))
    assert before.pop("base_model_name_or_path") == str(old)
    assert after.pop("base_model_name_or_path") == str(new)
    assert before == after


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("llama", "lora")])  # test_contract has all
def test_learning_curves_begin_at_the_start_of_the_method(
    tmp_path, bases, tuned_outcomes, task_file, architecture, kind
):
    upgrade = Upgrade(*bases[architecture])
    source = tuned_outcomes[architecture, kind]
    recipe = dataclasses.replace(RECIPE, steps=2, eval_every=2)
    outcomes = {
        name: recycle(upgrade, source, task_file, name, tmp_path / name.replace("+", "-"), recipe=recipe)
        for name in ("direct", "init", "init+distill", "scratch", "distill")
    }
    initial = {name: outcome.curve[0] for name, outcome in outcomes.items()}
    assert initial["init"]["score"] == initial["direct"]["score"] == outcomes["direct"].scores["dev"]
    assert initial["init+distill"]["loss"] == initial["init"]["loss"]
    assert initial["distill"]["score"] == initial["scratch"]["score"]
    assert initial["distill"]["loss"] == initial["scratch"]["loss"]
    assert initial["scratch"]["loss"] != initial["init"]["loss"]
    for name, outcome in outcomes.items():
        assert outcome.scores["dev_at_start"] == initial[name]["score"]


def single_task_methods():
    """The names of all methods for classification that need no other tasks."""
    return [name for name, method in methods().items() if "tasks" not in method.needs() and not method.generation_only]


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory, bases, tuned_outcomes, task_file, quick_recipe):
    """Comparisons of all methods on a full fine-tune of BERT, and of five on a LoRA (test_figures.py covers all)."""
    folder = tmp_path_factory.mktemp("comparisons")
    upgrade = Upgrade(*bases["bert"])
    names = single_task_methods()
    return {
        kind: compare(upgrade, tuned_outcomes["bert", kind], task_file, kind_names, folder / kind, recipe=quick_recipe)
        for kind, kind_names in (("full", names), ("lora", names[:5]))
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_compare_measures_every_method_against_scratch(comparisons, tuned_outcomes, kind):
    comparison = comparisons[kind]
    rows = {row.method: row for row in comparison.rows}
    names = single_task_methods()
    assert names[:5] == ["scratch", "direct", "init", "distill", "init+distill"]
    assert list(rows) == (names if kind == "full" else names[:5])
    assert rows["scratch"].recovery == 1
    assert comparison.majority == 0.5
    assert comparison.old == load_outcome(tuned_outcomes["bert", kind]).scores["test"]
    scratch_gain = rows["scratch"].test - comparison.majority
    for row in rows.values():
        assert row.recovery == pytest.approx((row.test - comparison.majority) / scratch_gain)
        assert row.start is None or row.start <= row.dev
        assert 0 <= row.negative_flips <= comparison.old
    assert (rows["direct"].steps, rows["direct"].labels) == (0, 0)
    assert 0 <= rows["direct"].seconds < 60
    assert rows["scratch"].steps == 60
    assert rows["scratch"].labels == 240
    assert rows["direct"].test > 0.8  # the upgrade is small
    assert rows["init"].start == rows["direct"].dev
    assert len(comparison.outcomes) == len(rows)
    record = json.loads((Path(comparison.outcomes[0]).parent / "comparison.json").read_text())
    assert [row["method"] for row in record["rows"]] == list(rows)


def test_tuning_that_does_not_improve_the_score_is_warned_about(tmp_path, bases, task_file, caplog):
    recipe = dataclasses.replace(RECIPE, steps=2, learning_rate=1e-12)
    tune(bases["bert"][0], task_file, tmp_path / "out", kind="lora", recipe=recipe)
    assert "no score on dev is better than the untrained head's" in caplog.text
    assert str(tmp_path / "out") in caplog.text


def test_compare_averages_scores_over_seeds(tmp_path, bases, tuned_outcomes, task_file):
    upgrade = Upgrade(*bases["bert"])
    source = tuned_outcomes["bert", "lora"]
    comparison = compare(upgrade, source, task_file, ["scratch"], tmp_path, recipe=RECIPE, seeds=(20, 30))
    outcomes = [load_outcome(path) for path in comparison.outcomes]
    scores = [outcome.scores["test"] for outcome in outcomes]
    (row,) = comparison.rows
    assert row.seeds == (20, 30)
    assert row.test == pytest.approx(sum(scores) / 2)
    assert row.test_deviation == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert {outcome.record.seed for outcome in outcomes} == {20, 30}


def test_a_repeated_run_returns_the_outcome_without_training(tmp_path, bases, tuned_outcomes, task_file, monkeypatch):
    upgrade = Upgrade(*bases["bert"])
    source = tuned_outcomes["bert", "full"]
    out = tmp_path / "out"
    outcome = recycle(upgrade, source, task_file, "init+distill", out, recipe=RECIPE)
    times = read_modification_times(out)
    monkeypatch.setattr("regraft.methods.job.tune_model", lambda *_: pytest.fail("trained a second time"))
    repeated = recycle(Upgrade(*bases["bert"]), source, task_file, "init+distill", out, recipe=RECIPE)
    assert repeated.record == outcome.record
    assert read_modification_times(out) == times

    with pytest.raises(OutcomeError, match="recipe"):
        recycle(upgrade, source, task_file, "init+distill", out, recipe=dataclasses.replace(RECIPE, seed=30))
    with pytest.raises(OutcomeError, match="options"):
        recycle(upgrade, source, task_file, "init+distill", out, recipe=RECIPE, options=Distillation(alpha=0.9))
    with pytest.raises(OutcomeError, match="method"):
        recycle(upgrade, source, task_file, "direct", out, recipe=RECIPE)
    assert read_modification_times(out) == times
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


SCRIPT_WITHOUT_REGRAFT = """
import json
import os
import sys

sys.modules["regraft"] = None  # any import of regraft fails
try:
    import regraft
except ImportError:
    pass
else:
    raise SystemExit("regraft can be imported")

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

texts, labels, folders = json.load(sys.stdin)
logits = []
for folder in folders:
    config = folder + "/adapter_config.json"
    if os.path.exists(config):
        base = json.load(open(config))["base_model_name_or_path"]
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
        model.config.pad_token_id = 0
        model = PeftModel.from_pretrained(model, folder)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert [model.config.id2label[i] for i in range(len(labels))] == labels
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    model.eval()
    with torch.no_grad():
        logits.append(model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.tolist())
print("LOGITS", json.dumps(logits))
"""


@pytest.mark.slow
def test_outcomes_load_without_regraft(tmp_path, bases, tuned_outcomes, task_file):
    cells = [
        ("bert", "full", "direct"),
        ("bert", "lora", "init"),
        ("llama", "full", "init"),
        ("llama", "lora", "direct"),
    ]
    outcomes = []
    for architecture, kind, method in cells:
        upgrade = Upgrade(*bases[architecture])
        out = tmp_path / f"{architecture}-{kind}"
        outcomes.append(recycle(upgrade, tuned_outcomes[architecture, kind], task_file, method, out, recipe=RECIPE))
    texts = [text for (text,) in load_data(task_file, 20).test.texts[:20]]
    folders = [str(outcome.path / "adaptation") for outcome in outcomes]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT_WITHOUT_REGRAFT],
        input=json.dumps([texts, outcomes[0].record.labels, folders]),
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    all_logits = json.loads(result.stdout.split("LOGITS")[1])
    for (architecture, _, _), outcome, logits in zip(cells, outcomes, all_logits, strict=True):
        expected = compute_test_logits(outcome.path, Base.open(bases[architecture][1]), task_file)[:20]
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)


def test_the_record_describes_the_provenance_of_the_weights(tmp_path, bases, tuned_outcomes, task_file):
    old, new = bases["roberta"]
    source = tuned_outcomes["roberta", "lora"]
    out = tmp_path / "out"
    outcome = recycle(Upgrade(old, new), source, task_file, "init", out, recipe=RECIPE)
    record = json.loads((out / "outcome.json").read_text())
    assert load_outcome(out).record == outcome.record
    fields = json.loads(json.dumps(dataclasses.asdict(outcome.record)))
    assert fields["task"].pop("selection") is None  # recorded only if it is not the metric
    assert record == fields
    assert record["base"] == {"name": str(new), "fingerprint": Base.open(new).fingerprint}
    assert record["recycled_from"]["old_base_fingerprint"] == Base.open(old).fingerprint
    assert record["recycled_from"]["fingerprint"] == load_adaptation(source).fingerprint
    assert record["recycled_from"]["lineage"] == "proven"
    assert record["cost"]["steps"] == 12
    assert record["cost"]["labels"] == 96  # 12 batches of 8: less than an epoch
    assert record["cost"]["seconds"] > 0
    assert {"dev", "test", "dev_at_start", "dev_majority", "test_majority"} <= record["scores"].keys()
    assert {"python", "torch", "transformers", "peft", "safetensors"} <= record["versions"].keys()
    assert record["versions"]["torch"] == torch.__version__
    labels = load_data(task_file, 20).test.labels.tolist()
    correct = [label == prediction for label, prediction in zip(labels, outcome.predictions("test"), strict=True)]
    assert record["scores"]["test"] == sum(correct) / 100
    model_card = (out / "README.md").read_text()
    assert str(new) in model_card
    assert f"{record['scores']['test']:.4f}" in model_card


@pytest.mark.parametrize("method", ["direct", "init"])
def test_the_order_of_a_tasks_labels_does_not_matter(tmp_path, bases, tuned_outcomes, task_file, method):
    upgrade = Upgrade(*bases["bert"])
    source = tuned_outcomes["bert", "full"]
    labels = load_outcome(source).record.labels
    shutil.copytree(task_file.parent, tmp_path / "task")
    reversed_task = tmp_path / "task" / "task.yaml"
    reversed_task.write_text(task_file.read_text() + f"labels: {json.dumps(labels[::-1])}\n")
    assert load_data(reversed_task, 20).labels == labels[::-1]
    outcome = recycle(upgrade, source, reversed_task, method, tmp_path / "reversed", recipe=RECIPE)
    expected = recycle(upgrade, source, task_file, method, tmp_path / "original", recipe=RECIPE)
    assert outcome.record.labels == labels
    assert outcome.predictions("test") == expected.predictions("test")
    assert outcome.scores == expected.scores
    if method == "direct":
        assert expected.scores["test"] > 0.8


def test_a_sharded_fine_tune_is_recycled_like_an_unsharded_one(tmp_path, bases, tuned_outcomes, task_file):
    source = tuned_outcomes["bert", "full"] / "adaptation"
    upgrade = Upgrade(*bases["bert"])
    sharded_source = tmp_path / "source"
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.save_pretrained(sharded_source, max_shard_size="20KB")
    assert len(list(sharded_source.glob("*.safetensors"))) > 2
    unsharded, sharded = (
        read_weights(recycle(upgrade, path, task_file, "direct", tmp_path / name, recipe=RECIPE).path / "adaptation")
        for name, path in (("unsharded", source), ("sharded", sharded_source))
    )
    assert have_equal_tensors(unsharded, sharded)


def test_invalid_arguments_are_refused_before_anything_is_written(tmp_path, bases, tuned_outcomes, task_file):
    old, new = bases["bert"]
    source = tuned_outcomes["bert", "full"]
    out = tmp_path / "out"
    with pytest.raises(MismatchError, match="was not tuned on"):
        recycle(Upgrade(new, old), source, task_file, "direct", out, recipe=RECIPE)
    with pytest.raises(RecipeError, match=r"Did you mean 'distill'\?"):
        recycle(Upgrade(old, new), source, task_file, "distil", out, recipe=RECIPE)
    with pytest.raises(RecipeError, match="no options"):
        recycle(Upgrade(old, new), source, task_file, "init", out, recipe=RECIPE, options=Distillation())
    with pytest.raises(RecipeError, match="no kind 'loro'"):
        tune(old, task_file, out, kind="loro", recipe=RECIPE)
    assert not list(tmp_path.iterdir())


def test_distillation_brings_the_student_close_to_the_teacher(tmp_path, bases, tuned_outcomes, task_file, quick_recipe):
    """With soft labels alone, the student agrees with the teacher on the test split as well."""
    old, new = bases["bert"]
    source = tuned_outcomes["bert", "full"]
    options = Distillation(alpha=1.0, beta=0.0, temperature=2.0)
    outcome = recycle(
        Upgrade(old, new), source, task_file, "distill", tmp_path / "out", recipe=quick_recipe, options=options
    )
    student = compute_test_logits(outcome.path, Base.open(new), task_file).log_softmax(dim=1)
    teacher = compute_test_logits(source, Base.open(old), task_file).softmax(dim=1)
    divergence = torch.nn.functional.kl_div(student, teacher, reduction="batchmean")
    assert divergence < 0.1
    assert not any("teacher" in file.name for file in outcome.path.rglob("*"))


def test_the_readme_lists_all_methods():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = readme.partition("| method | what it does | needs |\n|---|---|---|\n")[2].partition("\n\n")[0]
    expected = [f"| `{name}` | {summary} | {needs} |" for name, summary, needs, _ in describe_methods()]
    assert table.splitlines() == expected


def test_the_old_score_of_a_comparison_is_the_mean_over_seeds(bases, tuned_outcomes, task_file, tmp_path, monkeypatch):
    scores = iter([1.0, 0.5])  # one per seed
    monkeypatch.setattr(
        sys.modules["regraft.methods.references"],
        "Deployment",
        lambda *_: SimpleNamespace(score=lambda split: next(scores), right=lambda split: [True] * len(split)),
    )
    upgrade = Upgrade(*bases["bert"])
    source = tuned_outcomes["bert", "lora"]
    comparison = compare(upgrade, source, task_file, ["direct", "label-free"], tmp_path, recipe=RECIPE, seeds=(20, 30))
    label_free = comparison.rows[2]
    assert label_free.method == "label-free"
    # its curve is agreement with the old model, which has no relation to scratch's scores
    assert label_free.start is label_free.steps_to_scratch is label_free.seconds_to_scratch is None
    dev_scores = [load_outcome(path).scores["dev"] for path in comparison.outcomes if "label-free" in path]
    assert label_free.dev == pytest.approx(sum(dev_scores) / 2)
    assert comparison.old == 0.75


def test_a_pooler_that_the_new_base_lacks_is_copied_and_noted(tmp_path, bases, task_file, quick_recipe):
    old = tmp_path / "pooled"
    AutoModel.from_pretrained(bases["bert"][0], add_pooling_layer=True).save_pretrained(old)
    Base.open(bases["bert"][0]).tokenizer.save_pretrained(old)
    source = write_adaptation(Base.open(old), "full", tmp_path / "source")
    outcome = recycle(
        Upgrade(old, bases["bert"][1]), source, task_file, "direct", tmp_path / "out", recipe=quick_recipe
    )
    names = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert outcome.record.notes["copied_as_a_base_lacks_it"] == names
    before, after = read_weights(source), read_weights(outcome.path / "adaptation")
    assert all(torch.equal(after[name], before[name]) for name in names)
