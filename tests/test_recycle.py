"""Recycling, end to end, on tiny bases of every architecture."""

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
from conftest import adapt, weights
from safetensors.torch import load_file
from transformers import AutoModel

from regraft import Base, Recipe, Upgrade, compare, load_adaptation, load_outcome, recycle, tune
from regraft.adaptation import load_model
from regraft.errors import MismatchError, OutcomeError, RecipeError
from regraft.methods import describe_methods, methods
from regraft.model import encode, predict
from regraft.task import load_data
from regraft.tuning import Distillation

ARCHITECTURES = ("bert", "roberta", "distilbert", "llama")
CELLS = [(a, k) for a in ARCHITECTURES for k in ("full", "lora")]
FEW = Recipe(steps=12, batch_size=8, learning_rate=1e-3, eval_every=4, precision="fp32")


def logits_of(path, base, task_file):
    """The logits on test of an adaptation on a base."""
    adaptation, base = load_adaptation(path), Base.open(base)
    data = load_data(task_file, 20).relabel(adaptation.labels)
    return predict(load_model(adaptation, base, data.head), encode(base, data, data.test), "fp32")


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_tuning_learns_the_task(tuned, architecture, kind):
    outcome = load_outcome(tuned[architecture, kind])
    assert outcome.scores["test"] > 0.8
    assert outcome.curve[0]["step"] == 0
    assert [point["step"] for point in outcome.curve] == [0, 20, 40, 60]


def test_outcomes_say_which_predictions_are_right_those_of_schema_1_too(tuned, tmp_path):
    outcome = load_outcome(tuned["bert", "full"])
    older = load_outcome(shutil.copytree(outcome.path, tmp_path / "older"))
    rows = [json.loads(line) for line in (outcome.path / "predictions.jsonl").read_text().splitlines()]
    (older.path / "outcome.json").write_text(json.dumps(dataclasses.asdict(outcome.record) | {"schema": 1}))
    without = [{key: value for key, value in row.items() if key != "right"} for row in rows]
    (older.path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    for split in ("dev", "test"):
        expected = [row["label"] == row["prediction"] for row in rows if row["split"] == split]
        assert outcome.right(split) == load_outcome(older.path).right(split) == expected
        assert sum(expected) / len(expected) == pytest.approx(outcome.scores[split])
    (older.path / "outcome.json").write_text(json.dumps(dataclasses.asdict(outcome.record) | {"schema": 3}))
    with pytest.raises(OutcomeError, match="has schema 3"):
        load_outcome(older.path)


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_direct_onto_the_same_base_is_the_old_model(tmp_path, bases, tuned, task_file, architecture, kind):
    old, source = bases[architecture][0], tuned[architecture, kind]
    outcome = recycle(Upgrade(old, old), source, task_file, "direct", tmp_path / "out", recipe=FEW)
    before, after = weights(source / "adaptation"), weights(tmp_path / "out" / "adaptation")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected, found = logits_of(source, old, task_file), logits_of(outcome.path, old, task_file)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert outcome.scores["test"] == load_outcome(source).scores["test"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_direct_adds_the_delta_to_the_body_and_copies_the_head(tmp_path, bases, tuned, task_file, architecture):
    old, new = bases[architecture]
    source = tuned[architecture, "full"]
    out = recycle(Upgrade(old, new), source, task_file, "direct", tmp_path / "out", recipe=FEW).path
    old_file, new_file = load_file(old / "model.safetensors"), load_file(new / "model.safetensors")
    before, after = weights(source / "adaptation"), weights(out / "adaptation")
    assert before.keys() == after.keys()
    body = [name for name in before if name in old_file]
    head = [name for name in before if name not in old_file]
    assert len(body) > 15
    assert any(not torch.equal(old_file[name], before[name]) for name in body)
    for name in body:
        expected = new_file[name].double() + (before[name].double() - old_file[name].double())
        torch.testing.assert_close(after[name].double(), expected, atol=1e-7, rtol=1e-6)
    assert {"classifier", "score"} & {name.split(".")[0] for name in head}
    assert all(torch.equal(before[name], after[name]) for name in head)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_direct_leaves_a_lora_as_it_is_and_names_its_new_base(tmp_path, bases, tuned, task_file, architecture):
    old, new = bases[architecture]
    source = tuned[architecture, "lora"]
    out = recycle(Upgrade(old, new), source, task_file, "direct", tmp_path / "out", recipe=FEW).path
    stored = (source / "adaptation" / "adapter_model.safetensors").read_bytes()
    assert (out / "adaptation" / "adapter_model.safetensors").read_bytes() == stored
    before, after = (json.loads((p / "adaptation" / "adapter_config.json").read_text()) for p in (source, out))
    assert before.pop("base_model_name_or_path") == str(old)
    assert after.pop("base_model_name_or_path") == str(new)
    assert before == after


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_where_each_method_starts(tmp_path, bases, tuned, task_file, architecture, kind):
    upgrade, source = Upgrade(*bases[architecture]), tuned[architecture, kind]
    recipe = dataclasses.replace(FEW, steps=2, eval_every=2)
    found = {
        name: recycle(upgrade, source, task_file, name, tmp_path / name.replace("+", "-"), recipe=recipe)
        for name in ("direct", "init", "init+distill", "scratch", "distill")
    }
    start = {name: outcome.curve[0] for name, outcome in found.items()}
    assert start["init"]["score"] == start["direct"]["score"] == found["direct"].scores["dev"]
    assert start["init+distill"]["loss"] == start["init"]["loss"]
    assert start["distill"]["score"] == start["scratch"]["score"]
    assert start["distill"]["loss"] == start["scratch"]["loss"]
    assert start["scratch"]["loss"] != start["init"]["loss"]
    for name, outcome in found.items():
        assert outcome.scores["dev_at_start"] == start[name]["score"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, bases, tuned, task_file, quick):
    """Every method that needs no other tasks on bert, full; the first of them on a LoRA (test_figures has all)."""
    folder = tmp_path_factory.mktemp("compared")
    names = [name for name, method in methods().items() if "tasks" not in method.needs()]
    return {
        kind: compare(Upgrade(*bases["bert"]), tuned["bert", kind], task_file, some, folder / kind, recipe=quick)
        for kind, some in (("full", names), ("lora", names[:5]))
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_compare_holds_every_method_against_scratch(compared, tuned, kind):
    comparison = compared[kind]
    rows = {row.method: row for row in comparison.rows}
    names = [name for name, method in methods().items() if "tasks" not in method.needs()]
    assert names[:5] == ["scratch", "direct", "init", "distill", "init+distill"]
    assert list(rows) == (names if kind == "full" else names[:5])
    assert rows["scratch"].recovery == 1
    assert comparison.majority == 0.5
    assert comparison.old == load_outcome(tuned["bert", kind]).scores["test"]
    gap = rows["scratch"].test - comparison.majority
    for row in rows.values():
        assert row.recovery == pytest.approx((row.test - comparison.majority) / gap)
        assert row.start <= row.dev
        assert 0 <= row.negative_flips <= comparison.old
    assert (rows["direct"].steps, rows["direct"].labels) == (0, 0)
    assert 0 <= rows["direct"].seconds < 60
    assert rows["scratch"].steps == 60
    assert rows["scratch"].labels == 240
    assert rows["direct"].test > 0.8  # a mild upgrade
    assert rows["init"].start == rows["direct"].dev
    assert len(comparison.outcomes) == len(rows)
    record = json.loads((Path(comparison.outcomes[0]).parent / "comparison.json").read_text())
    assert [row["method"] for row in record["rows"]] == list(rows)


def test_a_tuning_that_learnt_nothing_says_so(tmp_path, bases, task_file, caplog):
    recipe = dataclasses.replace(FEW, steps=2, learning_rate=1e-12)
    tune(bases["bert"][0], task_file, tmp_path / "out", kind="lora", recipe=recipe)
    assert "no score on dev is better" in caplog.text
    assert str(tmp_path / "out") in caplog.text


def test_compare_over_seeds_gives_means(tmp_path, bases, tuned, task_file):
    upgrade, source = Upgrade(*bases["bert"]), tuned["bert", "lora"]
    table = compare(upgrade, source, task_file, ["scratch"], tmp_path, recipe=FEW, seeds=(20, 30))
    scores = [load_outcome(path).scores["test"] for path in table.outcomes]
    (row,) = table.rows
    assert row.seeds == (20, 30)
    assert row.test == pytest.approx(sum(scores) / 2)
    assert row.test_deviation == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert {load_outcome(path).record.seed for path in table.outcomes} == {20, 30}


def test_a_second_run_does_nothing(tmp_path, bases, tuned, task_file, monkeypatch):
    upgrade, source, out = Upgrade(*bases["bert"]), tuned["bert", "full"], tmp_path / "out"
    first = recycle(upgrade, source, task_file, "init+distill", out, recipe=FEW)
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    monkeypatch.setattr("regraft.methods.job.tune_model", lambda *_: pytest.fail("trained again"))
    again = recycle(Upgrade(*bases["bert"]), source, task_file, "init+distill", out, recipe=FEW)
    assert again.record == first.record
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == files
    changes = {
        "recipe": {"recipe": dataclasses.replace(FEW, seed=30)},
        "options": {"recipe": FEW, "options": Distillation(alpha=0.9)},
    }
    for what, given in changes.items():
        with pytest.raises(OutcomeError, match=what):
            recycle(upgrade, source, task_file, "init+distill", out, **given)
    with pytest.raises(OutcomeError, match="method"):
        recycle(upgrade, source, task_file, "direct", out, recipe=FEW)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


PLAIN = """
import sys
sys.modules["regraft"] = None  # any import of it fails
try:
    import regraft
except ImportError:
    pass
else:
    raise SystemExit("regraft can be imported")
import json
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, labels = sys.argv[1], json.loads(sys.argv[2])
config = folder + "/adapter_config.json"
import os
if os.path.exists(config):
    from peft import PeftModel
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
    batch = tokenizer(json.load(sys.stdin), padding=True, return_tensors="pt")
    print("LOGITS", json.dumps(model(**batch).logits.tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind", "method"),
    [("bert", "full", "direct"), ("bert", "lora", "init"), ("llama", "full", "init"), ("llama", "lora", "direct")],
)
def test_outcomes_load_without_regraft(tmp_path, bases, tuned, task_file, architecture, kind, method):
    old, new = bases[architecture]
    outcome = recycle(Upgrade(old, new), tuned[architecture, kind], task_file, method, tmp_path / "out", recipe=FEW)
    texts = [text for (text,) in load_data(task_file, 20).test.texts[:20]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(outcome.path / "adaptation"), json.dumps(outcome.record.labels)]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *arguments],
        input=json.dumps(texts), capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain = torch.tensor(json.loads(done.stdout.split("LOGITS")[1]))
    torch.testing.assert_close(plain, logits_of(outcome.path, new, task_file)[:20], atol=1e-5, rtol=0)


def test_the_record_tells_where_weights_come_from(tmp_path, bases, tuned, task_file):
    old, new = bases["roberta"]
    source = tuned["roberta", "lora"]
    outcome = recycle(Upgrade(old, new), source, task_file, "init", tmp_path / "out", recipe=FEW)
    record = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert load_outcome(tmp_path / "out").record == outcome.record
    assert record == json.loads(json.dumps(dataclasses.asdict(outcome.record)))
    assert record["base"] == {"name": str(new), "fingerprint": Base.open(new).fingerprint}
    assert record["recycled_from"]["old_base_fingerprint"] == Base.open(old).fingerprint
    assert record["recycled_from"]["fingerprint"] == load_adaptation(source).fingerprint
    assert record["recycled_from"]["lineage"] == "proven"
    assert record["cost"]["steps"] == 12
    assert record["cost"]["labels"] == 96  # 12 batches of 8, below one pass
    assert record["cost"]["seconds"] > 0
    assert {"dev", "test", "dev_at_start", "dev_majority", "test_majority"} <= record["scores"].keys()
    assert {"python", "torch", "transformers", "peft", "safetensors"} <= record["versions"].keys()
    assert record["versions"]["torch"] == torch.__version__
    data = load_data(task_file, 20)
    right = sum(a == b for a, b in zip(outcome.predictions("test"), data.test.labels.tolist(), strict=True))
    assert record["scores"]["test"] == right / 100
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(new) in card
    assert f"{record['scores']['test']:.4f}" in card


def test_labels_listed_in_another_order_change_nothing(tmp_path, bases, tuned, task_file):
    upgrade, source = Upgrade(*bases["bert"]), tuned["bert", "full"]
    turned = tmp_path / "task"
    shutil.copytree(task_file.parent, turned)
    labels = load_outcome(source).record.labels
    text = task_file.read_text() + f"labels: {json.dumps(labels[::-1])}\n"
    (turned / "task.yaml").write_text(text)
    assert load_data(turned / "task.yaml", 20).labels == labels[::-1]
    outcomes = [
        recycle(upgrade, source, task, method, tmp_path / f"{method}-{name}", recipe=FEW)
        for method in ("direct", "init")
        for name, task in (("as-tuned", task_file), ("turned", turned / "task.yaml"))
    ]
    for straight, other in (outcomes[:2], outcomes[2:]):
        assert other.record.labels == labels
        assert other.predictions("test") == straight.predictions("test")
        assert other.scores == straight.scores
    assert outcomes[0].scores["test"] > 0.8


def test_a_sharded_fine_tune_is_recycled_like_a_whole_one(tmp_path, bases, tuned, task_file):
    from transformers import AutoModelForSequenceClassification

    source, upgrade = tuned["bert", "full"] / "adaptation", Upgrade(*bases["bert"])
    sharded = tmp_path / "sharded"
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    outs = [
        recycle(upgrade, path, task_file, "direct", tmp_path / name, recipe=FEW).path
        for name, path in (("one", source), ("many", sharded))
    ]
    one, many = (weights(out / "adaptation") for out in outs)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_what_does_not_belong_together_is_refused(tmp_path, bases, tuned, task_file):
    old, new = bases["bert"]
    given = {"recipe": FEW, "out": tmp_path / "out"}
    with pytest.raises(MismatchError, match="was not tuned on"):
        recycle(Upgrade(new, old), tuned["bert", "full"], task_file, "direct", **given)
    with pytest.raises(RecipeError, match=r"Did you mean 'distill'\?"):
        recycle(Upgrade(old, new), tuned["bert", "full"], task_file, "distil", **given)
    with pytest.raises(RecipeError, match="no options"):
        recycle(Upgrade(old, new), tuned["bert", "full"], task_file, "init", options=Distillation(), **given)
    with pytest.raises(RecipeError, match="no kind 'loro'"):
        tune(old, task_file, tmp_path / "out", kind="loro", recipe=FEW)
    assert not list(tmp_path.iterdir())


def test_distilling_follows_the_teacher(tmp_path, bases, tuned, task_file, quick):
    """With the teacher's soft labels alone, the student comes to agree with it on new texts."""
    old, new = bases["bert"]
    source = tuned["bert", "full"]
    options = Distillation(alpha=1.0, beta=0.0, temperature=2.0)
    outcome = recycle(Upgrade(old, new), source, task_file, "distill", tmp_path / "out", recipe=quick, options=options)
    student = logits_of(outcome.path, new, task_file).log_softmax(dim=1)
    teacher = logits_of(source, old, task_file).softmax(dim=1)
    divergence = torch.nn.functional.kl_div(student, teacher, reduction="batchmean")
    assert divergence < 0.1
    assert not any("teacher" in file.name for file in outcome.path.rglob("*"))


def test_the_readme_lists_the_methods_that_there_are():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = readme.partition("| method | what it does | needs |\n|---|---|---|\n")[2].partition("\n\n")[0]
    expected = [f"| `{name}` | {summary} | {needs} |" for name, summary, needs, _ in describe_methods()]
    assert table.splitlines() == expected


def test_the_old_score_of_a_comparison_is_the_mean_over_seeds(bases, tuned, task_file, tmp_path, monkeypatch):
    """Of a deployment that is right everywhere for one seed, and half of the time for the other."""
    scores = iter([1.0, 0.5])
    monkeypatch.setattr(
        sys.modules["regraft.methods.compare"],
        "Deployment",
        lambda *_: SimpleNamespace(score=lambda split: next(scores), right=lambda split: [True] * len(split)),
    )
    table = compare(
        Upgrade(*bases["bert"]), tuned["bert", "lora"], task_file, ["direct"], tmp_path, recipe=FEW, seeds=(20, 30)
    )
    assert table.old == 0.75


def test_a_pooler_that_one_base_lacks_is_copied_and_named(tmp_path, bases, task_file, quick):
    old = tmp_path / "pooled"
    AutoModel.from_pretrained(bases["bert"][0], add_pooling_layer=True).save_pretrained(old)
    Base.open(bases["bert"][0]).tokenizer.save_pretrained(old)
    tuned = adapt(Base.open(old), "full", tmp_path / "tuned")
    outcome = recycle(Upgrade(old, bases["bert"][1]), tuned, task_file, "direct", tmp_path / "out", recipe=quick)
    names = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert outcome.record.notes["copied_as_a_base_lacks_it"] == names
    assert all(torch.equal(weights(outcome.path / "adaptation")[name], weights(tuned)[name]) for name in names)
