"""Outcomes of generation tasks: comparisons, chains, cards and reports of them."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import make_sentence, write_base, write_upgrade

from regraft import Base, Recipe, Upgrade, compare, load_adaptation, recycle, tune
from regraft.adaptation import fresh_model, load_model, load_outcome
from regraft.adaptation.card import model_card
from regraft.adaptation.outcome_record import ANSWER_LOSS, read_outcome_record
from regraft.chain import Chain, read_chain, run_chain, summarise_routes
from regraft.cli.chain import print_chain
from regraft.cli.compare import print_comparison
from regraft.cli.recycle import print_outcome
from regraft.errors import DataError, OutcomeError, RecipeError
from regraft.methods import convert, references
from regraft.methods.auto import Auto
from regraft.methods.comparison import read_comparison
from regraft.model import Deployment, harness, match_labels
from regraft.model.keep import measure_keep
from regraft.report import write_report
from regraft.report.find import find_inputs
from regraft.report.summaries import settings_by_task
from regraft.task import load_data

TUNING = Recipe(steps=40, learning_rate=5e-3, batch_size=8, precision="fp32")
RECYCLING = Recipe(steps=6, learning_rate=5e-3, batch_size=8, eval_every=2, precision="fp32")
METHODS = ("direct", "init", "label-free")


class Interruption(Exception):
    """What a test raises in the middle of a run."""


def write_task(folder: Path, name: str, answered: bool = True, **keys) -> Path:
    """Write a task of naming the mood of a sentence, with or without answers."""
    rng = random.Random(0)
    for split, count in (("train", 64), ("dev", 24), ("test", 24)):
        rows = []
        for _ in range(count):
            is_positive = rng.random() < 0.5
            answer = {"completion": " good" if is_positive else " bad"} if answered else {}
            rows.append({"prompt": make_sentence(rng, is_positive), **answer})
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{split}: {name}-{split}.jsonl" for split in ("train", "dev", "test")]
    settings = {"type": "text-generation", "metric": "exact_match", "max_new_tokens": 4, **keys}
    lines += [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    file = folder / f"{name}.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two bases, tasks, and an rsLoRA on the old base."""
    folder = tmp_path_factory.mktemp("generation")
    write_upgrade(write_base(folder / "old", "llama"), folder / "new", 0.1)
    rng = random.Random(1)
    (folder / "keep.txt").write_text("".join(make_sentence(rng, True) + "\n" for _ in range(60)))
    tune(folder / "old", write_task(folder, "mood"), folder / "tuned", kind="rslora", recipe=TUNING)
    return folder


@pytest.fixture(scope="module")
def upgrade(folder):
    return Upgrade(Base.open(folder / "old"), Base.open(folder / "new"))


@pytest.fixture(scope="module")
def compared(folder, upgrade):
    """A comparison that was interrupted in its third method, and resumed; with the times of the references' files."""
    task = write_task(folder, "kept", keep="keep.txt")
    arguments = (upgrade, folder / "tuned", task, METHODS, folder / "compared")

    def interrupt(stage, completed, total, figures):
        if stage == "init: tune" and completed == 3:
            raise Interruption

    with pytest.raises(Interruption):
        compare(*arguments, recipe=RECYCLING, progress=interrupt)
    files = sorted((folder / "compared" / references.REFERENCES_FOLDER).rglob("figures.json"))
    times = {file: file.stat().st_mtime_ns for file in files}
    return compare(*arguments, recipe=RECYCLING), times


def read_rows(folder: Path, split: str = "test") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def test_comparison_equals_its_definition(folder, upgrade, compared):
    comparison, _ = compared
    out = folder / "compared"
    data = load_data(folder / "kept.yaml", RECYCLING.seed)
    assert [row.method for row in comparison.rows] == ["scratch", *METHODS]
    assert (comparison.type, comparison.selection, comparison.curve_metric) == ("text-generation", "loss", "loss")
    bare = Deployment(fresh_model(upgrade.new, data.head, 0), upgrade.new, data, "fp32")
    assert comparison.majority == bare.score(data.test)
    adaptation = load_adaptation(folder / "tuned")
    data = match_labels(adaptation, data)
    old = Deployment(load_model(adaptation, upgrade.old, data.head), upgrade.old, data, "fp32")
    old_right = [
        prediction["answer"] == target.strip()
        for prediction, target in zip(old.predictions(data.test), data.test.targets, strict=True)
    ]
    assert comparison.old == sum(old_right) / len(old_right) > 0.8
    scratch = load_outcome(out / "scratch-seed20")
    for row in comparison.rows:
        outcome = load_outcome(out / f"{row.method}-seed20")
        right = [line["prediction"]["answer"] == line["label"].strip() for line in read_rows(outcome.path)]
        assert outcome.right("test") == right
        assert row.test == pytest.approx(sum(right) / len(right))
        assert row.negative_flips == sum(a and not b for a, b in zip(old_right, right, strict=True)) / len(right)
        expected = (row.test - comparison.majority) / (scratch.scores["test"] - comparison.majority)
        assert row.recovery is None or row.recovery == pytest.approx(expected)
        losses = [point["score"] for point in outcome.curve]
        if row.method == "label-free":
            assert (row.start, row.dev, row.steps_to_scratch) == (None, None, None)
            continue
        assert (row.start, row.dev) == (losses[0], min(losses))
        reached = [point["step"] for point in outcome.curve if point["score"] <= scratch.curve[-1]["score"]]
        assert row.steps_to_scratch == reached[0]
    assert read_comparison(json.loads((out / "comparison.json").read_text()), "") == comparison


def test_references_are_measured_once(folder, upgrade, compared, monkeypatch):
    comparison, times = compared
    assert len(times) == 3  # the old deployment and both bases
    assert {file: file.stat().st_mtime_ns for file in times} == times
    for name in ("Deployment", "bare_deployment"):
        monkeypatch.setattr(references, name, None)
    again = compare(upgrade, folder / "tuned", folder / "kept.yaml", METHODS, folder / "compared", recipe=RECYCLING)
    assert again == comparison
    damaged = next(file for file in times if "new-base" in str(file))
    content = damaged.read_text()
    damaged.write_text(content.replace("score", "scores"))
    with pytest.raises(TypeError):  # it is not taken as it is, but measured again
        compare(upgrade, folder / "tuned", folder / "kept.yaml", METHODS, folder / "compared", recipe=RECYCLING)
    damaged.write_text(content)


def test_keep_is_measured_for_all_models(folder, upgrade, compared, capsys):
    comparison, _ = compared
    data = load_data(folder / "kept.yaml", RECYCLING.seed)
    keep = comparison.keep
    assert keep.metric == "loss"
    for base, score in ((upgrade.old, keep.old_base), (upgrade.new, keep.new_base)):
        assert score == measure_keep(fresh_model(base, data.head, 0), base, data, "fp32")
    outcome = load_outcome(folder / "compared" / "init-seed20")
    model = load_model(load_adaptation(outcome.path), upgrade.new, data.head)
    measured = measure_keep(model, upgrade.new, data, "fp32")
    row = next(row for row in comparison.rows if row.method == "init")
    assert row.keep == outcome.record.notes["keep"]["score"] == pytest.approx(measured, abs=1e-5)
    print_comparison(comparison)
    text = capsys.readouterr().out
    for words in ("dev loss", "the bare new base", "New knowledge × old behaviour", "old deployment", "old base"):
        assert words in text


def test_written_loras_have_one_rank_and_one_scale(folder, upgrade, compared, tmp_path):
    for adaptation in (folder / "tuned", *(folder / "compared" / f"{name}-seed20" for name in ("scratch", "init"))):
        config = json.loads((adaptation / "adaptation" / "adapter_config.json").read_text())
        assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    written = convert(folder / "tuned", upgrade.old, tmp_path / "converted", "lora", energy=0.9)
    config = json.loads((written.path / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})


def test_cards_say_how_to_use_a_language_model(folder, compared):
    card = (folder / "compared" / "init-seed20" / "README.md").read_text()
    base = folder / "new"
    for words in (
        "pipeline_tag: text-generation",
        "(before the first step: dev loss ",
        "answers on test: ended by itself ",
        "- recycled from: `",
        "keep`: loss ",
        f'AutoModelForCausalLM.from_pretrained("{base}"',
        'PeftModel.from_pretrained(base, "adaptation")',
        f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules",
    ):
        assert words in card, words
    assert "widget" not in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_card_contains_hostile_names_in_code(folder, compared):
    record = load_outcome(folder / "compared" / "init-seed20").record
    name = "x```\n# heading\n'; rm -rf \"$(y)\x1b"
    record = dataclasses.replace(record, base=dataclasses.replace(record.base, name=name))
    card = model_card(record, folder / "compared" / "init-seed20" / "adaptation", [])
    assert sum(line.startswith("# ") for line in card.splitlines()) == 1
    assert card.count("```") == 4 and "\x1b" not in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    command = shlex.split(card.split("```sh\n")[1].split("```")[0])
    assert command[:2] == ["vllm", "serve"] and command[3] == "--enable-lora"


def test_loss_has_no_flips(folder, upgrade, capsys):
    task = write_task(folder, "loss", metric="loss")
    comparison = compare(upgrade, folder / "tuned", task, ["direct"], folder / "loss", recipe=RECYCLING)
    direct = comparison.rows[1]
    assert direct.negative_flips is None and comparison.selection is None
    assert direct.dev == direct.start == pytest.approx(load_outcome(folder / "loss" / "direct-seed20").scores["dev"])
    print_comparison(comparison)
    assert "–" in capsys.readouterr().out
    report = write_report(folder / "loss", folder / "loss.md", "md").read_text()
    assert "Answers" not in report and "loss on test" in report


def test_report_shows_curves_answers_and_keep(folder, compared):
    comparison, _ = compared
    setting = next(
        setting for setting in settings_by_task(find_inputs([folder / "compared"]))["kept"] if len(setting.runs) > 1
    )
    assert (setting.curve_metric, setting.dev, setting.chance) == ("loss", "dev loss", comparison.majority)
    for row in comparison.rows:
        summary = next(summary for summary in setting.summaries if summary.method == row.method)
        for field in ("start", "score", "recovery", "steps_to_scratch", "negative_flips"):
            expected = getattr(row, "test" if field == "score" else field)
            assert getattr(summary, field) == (expected if field != "negative_flips" else pytest.approx(expected))
    report = write_report(folder / "compared", folder / "report.md", "md").read_text()
    for words in (
        "dev loss best",
        "until dev loss is where scratch ends",
        "loss on dev",
        "the bare new base",
        "New knowledge × old behaviour",
        "Health of the answers",
        "direct: answers side by side",
        "before: ",
        "reference: good",
    ):
        assert words in report, words
    assert "scratch: answers side by side" not in report


def test_page_opens(folder, compared):
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    page_file = write_report(folder / "compared", folder / "report.html")
    events: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.goto(page_file.as_uri())
        text = page.inner_text("body")
        browser.close()
    assert not events
    for words in ("loss on dev, lower is better", "24 of 24 examples", "label-free: answers side by side"):
        assert words in text


def test_prompts_alone(folder, upgrade, capsys):
    task = write_task(folder, "prompts", answered=False, metric="rouge_l")
    free = recycle(upgrade, folder / "tuned", task, "label-free", folder / "free", recipe=RECYCLING)
    auto = recycle(
        upgrade,
        folder / "tuned",
        task,
        "auto",
        folder / "prompts-auto",
        recipe=RECYCLING,
        options=Auto(labels=False),
    )
    for outcome in (free, auto):
        assert outcome.scores["dev"] is None and outcome.record.cost.labels == 0
        assert all(row["label"] is None and row["prediction"]["answer"] for row in read_rows(outcome.path))
        print_outcome(outcome)
    assert "not scored" in capsys.readouterr().out
    assert auto.record.notes["tried"][0]["score"] > 0.8
    assert "Health of the answers" in write_report([free.path, auto.path], folder / "prompts.md", "md").read_text()
    with pytest.raises(DataError, match="no labels, which method scratch needs"):
        compare(upgrade, folder / "tuned", task, ["direct"], folder / "no-labels", recipe=RECYCLING)


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_auto_without_labels_selects_by_the_loss_of_answers(folder, upgrade, metric):
    task = write_task(folder, f"auto-{metric}", metric=metric)
    options = Auto(labels=False, confidence=0.999, tolerance=0.0, budgets=(1.0,))
    out = folder / f"auto-{metric}"
    outcome = recycle(upgrade, folder / "tuned", task, "auto", out, recipe=RECYCLING, options=options)
    notes = outcome.record.notes
    assert notes["score"] == ANSWER_LOSS
    if outcome.curve[-1]["step"]:
        assert outcome.record.best_step == min(outcome.curve, key=lambda point: point["score"])["step"]
    if metric == "loss":  # the old deployment answers as the references do
        losses = [point["score"] for point in load_outcome(folder / "tuned").curve]
        assert notes["old_deployment"] == pytest.approx(min(losses), abs=0.1)


def test_chain_measures_bare_bases(folder, capsys):
    write_task(folder, "mood")
    (folder / "chain.yaml").write_text(
        "bases: [old, new]\ntasks: [mood.yaml]\nkinds: [lora]\nmethods: [direct]\nprecision: fp32\n"
        "tuning: {steps: 20, learning_rate: 5.0e-3, batch_size: 8, eval_every: 20}\nrecycling: {steps: 2}\n"
    )
    chain = Chain.load(folder / "chain.yaml")
    rows = run_chain(chain, folder / "chain")
    data = load_data(folder / "mood.yaml", chain.seeds[0])
    for row in rows:
        base = Base.open(folder / ("old", "new")[row.base])
        bare = Deployment(fresh_model(base, data.head, 0), base, data, "fp32")
        assert row.majority == bare.score(data.test)
        assert row.negative_flips is not None and row.type == "text-generation"
    assert read_chain(folder / "chain")[1] == rows
    assert summarise_routes(chain.bases, rows)
    print_chain(chain.bases, rows)
    assert "0 % is the bare new base" in " ".join(capsys.readouterr().out.split())


def test_harness_scores_are_recorded(folder, upgrade, monkeypatch, capsys):
    calls = []

    def run_lm_eval(model, tokenizer, tasks, out_folder, **options):
        calls.append(out_folder)
        out_folder.mkdir(parents=True)
        (out_folder / "samples_t.jsonl").write_text("{}\n")
        return {"t": {"acc": 0.25 * len(calls)}}

    monkeypatch.setattr(harness, "run_lm_eval", run_lm_eval)
    task = write_task(folder, "harness", lm_eval=["t"])
    for _ in range(2):
        comparison = compare(upgrade, folder / "tuned", task, ["direct"], folder / "harness", recipe=RECYCLING)
    assert len(calls) == 3  # the old deployment, scratch and direct, once each
    assert comparison.lm_eval == {
        "old deployment": {"t": {"acc": 0.25}},
        "scratch": {"t": {"acc": 0.5}},
        "direct": {"t": {"acc": 0.75}},
    }
    assert len(list((folder / "harness").rglob("lm_eval/samples_t.jsonl"))) == 3
    print_comparison(comparison)
    assert "t acc" in capsys.readouterr().out
    assert "lm-evaluation-harness" in write_report(folder / "harness", folder / "harness.md", "md").read_text()


def test_progress_names_the_dev_loss(folder, upgrade):
    seen: set[str] = set()
    recipe = dataclasses.replace(RECYCLING, steps=2, eval_every=1)
    recycle(
        upgrade,
        folder / "tuned",
        folder / "mood.yaml",
        "init",
        folder / "progress",
        recipe=recipe,
        progress=lambda stage, completed, total, figures: seen.update(figures),
    )
    assert "dev loss" in seen and "score" not in seen


def test_served_base_of_a_tuned_adapter(folder, tmp_path):
    recipe = dataclasses.replace(TUNING, steps=1)
    outcome = tune(
        folder / "old", folder / "mood.yaml", tmp_path / "served", kind="lora", recipe=recipe, served_base="org/base"
    )
    config = json.loads((outcome.path / "adaptation" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    card = (outcome.path / "README.md").read_text()
    assert 'base_model: "org/base"' in card and "vllm serve org/base" in card
    with pytest.raises(RecipeError, match="full fine-tune"):
        tune(folder / "old", folder / "mood.yaml", tmp_path / "full", recipe=recipe, served_base="org/base")


def test_records_without_the_new_fields_open(folder, compared):
    content = json.loads((folder / "compared" / "init-seed20" / "outcome.json").read_text())
    assert content["task"].pop("selection") == "loss"
    assert read_outcome_record(content, "").task.curve_metric == "exact_match"
    content["task"]["selection"] = 3
    with pytest.raises(OutcomeError, match="selection"):
        read_outcome_record(content, "")
    comparison = json.loads((folder / "compared" / "comparison.json").read_text())
    for field in ("type", "selection", "keep", "lm_eval"):
        del comparison[field]
    for row in comparison["rows"]:
        del row["keep"]
    assert read_comparison(comparison, "").curve_metric == "exact_match"
