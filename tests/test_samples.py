"""Sample logs of lm-evaluation-harness: made on tiny models in memory, and compared by pairs."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import BAD, GOOD, make_config, make_tokenizer, run_command
from peft import LoraConfig, get_peft_model
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

from regraft.diagnosis import compare_samples
from regraft.errors import CheckpointError, DataError, RecipeError
from regraft.model.harness import run_lm_eval

pytest.importorskip("lm_eval")

ROWS = [
    {"question": f"the film was {word}", "label": label, "answer": ("bad", "good")[label]}
    for pair in zip(BAD, GOOD, strict=True)
    for label, word in enumerate(pair)
]
TASKS: dict[str, dict[str, Any]] = {
    "mood_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": ["bad", "good"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "f1"}],
    },
    "mood_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["film"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {
                "name": "first-word",
                "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}],
            },
        ],
    },
    "mood_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def make_model(seed: int, **settings) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(make_config("llama", **settings))


def make_plain_tokenizer() -> Any:
    return make_tokenizer("llama")


@pytest.fixture(scope="module")
def task_files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    files = {}
    for name, keys in TASKS.items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"task": name, **source, **keys}))
        files[name] = str(file)
    return files


@pytest.fixture(scope="module")
def runs(task_files, tmp_path_factory) -> tuple[Path, Path, dict[str, Any], dict[str, Any]]:
    """The folders and the scores of two models."""
    folder = tmp_path_factory.mktemp("runs")
    scores = [
        run_lm_eval(make_model(seed), make_plain_tokenizer(), list(task_files.values()), folder / name)
        for seed, name in ((0, "old"), (1, "new"))
    ]
    return folder / "old", folder / "new", scores[0], scores[1]


def log_of(folder: Path, task: str) -> Path:
    return next(folder.rglob(f"samples_{task}_*.jsonl"))


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_log(file: Path, values: list[Any], metric: str = "acc", **changes) -> Path:
    rows = [
        {"doc_id": i, "doc_hash": f"d{i}", "prompt_hash": f"p{i}", "filter": "none", "metrics": [metric], metric: value}
        for i, value in enumerate(values)
    ]
    file.write_text("".join(json.dumps(row | changes) + "\n" for row in rows))
    return file


class TestRunLmEval:
    def test_accuracy_is_that_of_the_models_own_probabilities(self, runs):
        model, tokenizer = make_model(0).eval(), make_plain_tokenizer()
        choices = tokenizer.convert_tokens_to_ids(["bad", "good"])
        right = 0
        for row in ROWS:
            ids = tokenizer(row["question"], return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(ids).logits[0, -1, choices]
            right += int(logits.argmax()) == row["label"]
        assert runs[2]["mood_choice"]["acc"] == pytest.approx(right / len(ROWS))

    def test_perplexity_is_that_of_the_models_own_loss(self, runs):
        model, tokenizer = make_model(0).eval(), make_plain_tokenizer()
        loss, words = 0.0, 0
        for row in ROWS:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(row["question"]).input_ids]])
            with torch.no_grad():
                loss += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            words += len(row["question"].split())
        assert runs[2]["mood_text"]["word_perplexity"] == pytest.approx(math.exp(loss / words), rel=1e-4)

    def test_groups_in_a_file_have_their_tasks_beside_it(self, task_files, tmp_path, runs):
        group = Path(task_files["mood_text"]).with_name("moods.yaml")
        group.write_text(yaml.safe_dump({"group": "moods", "task": ["mood_choice", "mood_text"]}))
        scores = run_lm_eval(make_model(0), make_plain_tokenizer(), [str(group)], tmp_path)
        assert scores["mood_text"] == runs[2]["mood_text"]
        assert [pair.task for pair in compare_samples(runs[0], tmp_path).logs] == ["mood_choice", "mood_text"]

    def test_nothing_is_printed_and_progress_is_reported(self, task_files, tmp_path, capfd, monkeypatch):
        monkeypatch.chdir(tmp_path)  # git finds no repository
        calls: list[tuple[Any, ...]] = []
        run_lm_eval(
            make_model(0),
            make_plain_tokenizer(),
            list(task_files.values()),
            tmp_path,
            limit=3,
            progress=lambda *arguments: calls.append(arguments),
        )
        captured = capfd.readouterr()
        assert (captured.out, captured.err) == ("", "")
        assert ("Running generate_until requests", 3, 3, {}) in calls

    def test_model_tokenizer_and_random_states_are_left_as_they_were(self, task_files, tmp_path):
        model, tokenizer = make_model(0).train(), make_plain_tokenizer()
        model.model.layers[0].eval()
        tokenizer.pad_token = None
        modes = [module.training for module in model.modules()]
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        draws = (random.random(), np.random.rand(), float(torch.rand(())))
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        run_lm_eval(model, tokenizer, [task_files["mood_choice"]], tmp_path, limit=2)
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == draws
        assert [module.training for module in model.modules()] == modes
        assert tokenizer.pad_token is None
        assert "tie_weights" not in model.__dict__

    @pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
    def test_an_adapters_own_copy_of_a_tied_head_is_evaluated(self, task_files, tmp_path):
        base = make_model(0, tie_word_embeddings=True)
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config)
        with torch.no_grad():
            head = adapted.base_model.model.lm_head.modules_to_save["default"].weight
            head.zero_()
        scores = run_lm_eval(adapted, make_plain_tokenizer(), [task_files["mood_text"]], tmp_path)
        words = sum(len(row["question"].split()) for row in ROWS)
        tokens = sum(len(make_plain_tokenizer()(row["question"]).input_ids) for row in ROWS)
        uniform = head.shape[0] ** (tokens / words)  # a head of zeros makes all tokens equally likely
        assert scores["mood_text"]["word_perplexity"] == pytest.approx(uniform, rel=1e-4)

    def test_chat_template_is_applied_on_request(self, task_files, tmp_path, runs):
        tokenizer = make_plain_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}good {{ message['content'] }} bad\n{% endfor %}"
        run_lm_eval(make_model(0), tokenizer, [task_files["mood_choice"]], tmp_path, apply_chat_template=True)
        rows = read_rows(log_of(tmp_path, "mood_choice"))
        assert rows[0]["arguments"]["gen_args_0"]["arg_0"] == f"good {ROWS[0]['question']} bad\n"
        comparison = compare_samples(runs[0], tmp_path)
        assert comparison.logs[0].different_prompts == len(ROWS)
        assert comparison.only_old == ("mood_answer", "mood_text")

    def test_missing_package_is_named_with_the_remedy(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
        with pytest.raises(RecipeError, match=r"pip install 'regraft\[lm-eval\]'"):
            run_lm_eval(make_model(0), make_plain_tokenizer(), ["hellaswag"], tmp_path)

    def test_unknown_tasks_are_refused(self, monkeypatch, tmp_path):
        class Index:
            all_tasks = ("hellaswag", "piqa")

            def __init__(self, **_options):
                pass

        monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)  # the whole index takes many seconds
        with pytest.raises(RecipeError, match=r"no task 'helaswag'\. Did you mean 'hellaswag'"):
            run_lm_eval(make_model(0), make_plain_tokenizer(), ["helaswag"], tmp_path)
        with pytest.raises(RecipeError, match=r"none\.yaml: there is no such file"):
            run_lm_eval(make_model(0), make_plain_tokenizer(), [str(tmp_path / "none.yaml")], tmp_path)

    def test_task_without_data_is_named(self, tmp_path, task_files):
        file = tmp_path / "broken.yaml"
        keys = yaml.safe_load(Path(task_files["mood_text"]).read_text())
        keys["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "missing.jsonl")
        file.write_text(yaml.safe_dump(keys))
        with pytest.raises(DataError, match=r"broken\.yaml: cannot be run"):
            run_lm_eval(make_model(0), make_plain_tokenizer(), [str(file)], tmp_path)


class TestCompareSamples:
    def test_scores_are_the_harness_own_aggregates(self, runs):
        old, new, old_scores, new_scores = runs
        comparison = compare_samples(old, new)
        assert len(comparison.changes) == 7
        for change in comparison.changes:
            name = change.metric if change.filter == "none" else f"{change.metric},{change.filter}"
            assert change.old == pytest.approx(old_scores[change.task][name], rel=1e-12)
            assert change.new == pytest.approx(new_scores[change.task][name], rel=1e-12)
            assert change.difference.estimate == pytest.approx(change.new - change.old, abs=1e-12)
            assert change.difference.low <= change.difference.estimate <= change.difference.high
            assert change.higher_is_better == (change.task != "mood_text")
            assert change.examples == len(ROWS)

    def test_flips_and_mcnemar_are_those_of_the_samples(self, runs):
        old, new = (read_rows(log_of(folder, "mood_choice")) for folder in runs[:2])
        pairs = [(before["acc"], after["acc"]) for before, after in zip(old, new, strict=True)]
        negative, positive = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
        assert negative and positive
        (change,) = compare_samples(*runs[:2], metric="acc").changes
        assert (change.negative, change.positive) == (negative, positive)
        assert change.mcnemar == pytest.approx(binomtest(negative, negative + positive).pvalue)

    def test_interval_agrees_with_a_naive_bootstrap(self, runs):
        old, new = (
            np.array([row["word_perplexity"] for row in read_rows(log_of(folder, "mood_text"))]) for folder in runs[:2]
        )
        generator = np.random.default_rng(7)
        differences = []
        for _ in range(4000):
            chosen = generator.integers(0, len(old), len(old))
            before, after = (np.exp(-log[chosen, 0].sum() / log[chosen, 1].sum()) for log in (old, new))
            differences.append(after - before)
        (change,) = compare_samples(*runs[:2], metric="word_perplexity").changes
        low, high = np.quantile(differences, [0.025, 0.975])
        spread = np.std(differences)
        assert change.difference.low == pytest.approx(low, abs=0.2 * spread)
        assert change.difference.high == pytest.approx(high, abs=0.2 * spread)
        assert change.negative is None and change.mcnemar is None

    def test_known_flips(self, tmp_path):
        old = write_log(tmp_path / "a.jsonl", [1, 0, 0, 0, 0, 0, 0, 1, 1, 0])
        new = write_log(tmp_path / "b.jsonl", [0, 1, 1, 1, 1, 1, 1, 1, 1, 0])
        (change,) = compare_samples(old, new).changes
        assert (change.task, change.old, change.new) == ("b", 0.3, 0.8)
        assert (change.negative, change.positive) == (1, 6)
        assert change.mcnemar == pytest.approx(0.125)  # 2 · (1 + 7) / 2⁷

    @pytest.mark.parametrize("metric", ["perplexity", "brier_score"])
    def test_metrics_of_which_lower_is_better(self, tmp_path, metric):
        old = write_log(tmp_path / "a.jsonl", [1.0, 0.0, 1.0, 0.0], metric)
        new = write_log(tmp_path / "b.jsonl", [0.0, 0.0, 0.0, 1.0], metric)
        (change,) = compare_samples(old, new).changes
        expected = (math.exp(-0.5), math.exp(-0.25)) if metric == "perplexity" else (0.5, 0.25)
        assert (change.old, change.new) == pytest.approx(expected)
        assert not change.higher_is_better
        assert change.negative is None
        assert change.difference.low <= change.new - change.old <= change.difference.high

    def test_unpaired_samples_are_counted(self, task_files, tmp_path, runs):
        run_lm_eval(make_model(1), make_plain_tokenizer(), [task_files["mood_answer"]], tmp_path, limit=12)
        (pair,) = compare_samples(log_of(runs[0], "mood_answer"), tmp_path).logs
        assert (pair.paired, pair.only_old, pair.only_new) == (24, 16, 0)  # two filters
        assert pair.different_prompts == 0

    def test_documents_that_changed_are_not_paired(self, tmp_path):
        old = write_log(tmp_path / "a.jsonl", [1, 0, 1])
        new = write_log(tmp_path / "b.jsonl", [1, 1, 1])
        rows = read_rows(new)
        rows[1]["doc_hash"] = "other"
        new.write_text("".join(json.dumps(row) + "\n" for row in rows))
        comparison = compare_samples(old, new)
        assert comparison.changes[0].examples == 2
        assert (comparison.logs[0].only_old, comparison.logs[0].only_new) == (1, 1)
        with pytest.raises(DataError, match="none of their 3 and 3 samples"):
            compare_samples(old, write_log(tmp_path / "c.jsonl", [1, 1, 1], doc_hash="other"))

    def test_metrics_that_do_not_add_up_over_examples_are_named(self, runs, tmp_path):
        comparison = compare_samples(*runs[:2])
        reasons = {pair.task: pair.skipped for pair in comparison.logs}["mood_choice"]
        assert list(reasons) == ["f1"]
        assert "line 1: its value [" in reasons["f1"]
        with pytest.raises(RecipeError, match="'f1' cannot be compared"):
            compare_samples(*runs[:2], metric="f1")

    @pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "1", None, [1, 2]])
    def test_values_that_are_no_numbers_are_named(self, tmp_path, value):
        file = write_log(tmp_path / "a.jsonl", [1, value])
        (pair,) = compare_samples(file, file).logs
        assert f"a.jsonl, line 2: its value {value!r:.60}" in pair.skipped["acc"]

    def test_logs_without_the_names_of_metrics_and_filters(self, tmp_path):
        file = tmp_path / "samples_old.jsonl"
        row = {"doc_id": 0, "doc": {"acc": 3}, "target": "x", "doc_hash": "d", "prompt_hash": "p", "acc": 1.0}
        file.write_text(json.dumps(row) + "\n")
        (change,) = compare_samples(file, file).changes
        assert (change.task, change.metric, change.filter) == ("old", "acc", "none")

    def test_malformed_lines_are_named(self, tmp_path):
        good = write_log(tmp_path / "a.jsonl", [1, 0, 1])
        bad = tmp_path / "b.jsonl"
        lines = good.read_text().splitlines()
        bad.write_text("\n".join([lines[0], lines[1][:-5]]))
        with pytest.raises(CheckpointError, match=r"b\.jsonl, line 2: not valid JSON"):
            compare_samples(good, bad)
        bad.write_text("\n".join([lines[0], '{"acc": 1}']))
        with pytest.raises(DataError, match=r"b\.jsonl, line 2: expected a sample"):
            compare_samples(good, bad)
        bad.write_text("\n".join([*lines, lines[1]]))
        with pytest.raises(DataError, match=r"b\.jsonl, line 4: repeats document 1 .* of line 2"):
            compare_samples(good, bad)
        bad.write_text("")
        with pytest.raises(DataError, match="has no samples"):
            compare_samples(good, bad)

    def test_sources(self, runs, tmp_path):
        old, new = runs[:2]
        globbed = compare_samples(f"{old}/**/samples_mood_[ct]*.jsonl", new)
        assert [pair.task for pair in globbed.logs] == ["mood_choice", "mood_text"]
        assert globbed.only_new == ("mood_answer",)
        with pytest.raises(DataError, match=r"there is no samples_\*\.jsonl"):
            compare_samples(tmp_path, new)
        shutil.copytree(old, tmp_path / "one")
        shutil.copytree(old, tmp_path / "two")
        with pytest.raises(DataError, match="has several logs of mood_answer"):
            compare_samples(tmp_path, new)
        with pytest.raises(DataError, match="no task in common"):
            compare_samples(f"{old}/**/samples_mood_[ct]*", f"{new}/**/samples_mood_a*")
        with pytest.raises(RecipeError, match="Did you mean 'acc_norm'"):
            compare_samples(old, new, metric="acc_nrm")

    def test_command(self, runs, tmp_path):
        file = tmp_path / "comparison.json"
        output = run_command("compare-samples", *runs[:2], "--json", file)
        assert "↓" in output and "↑" in output  # the names may be broken into lines
        assert "mood_choice: f1 is not compared" in " ".join(output.split())
        record = json.loads(file.read_text())
        assert [change["metric"] for change in record["changes"]].count("exact_match") == 2
        assert record["changes"][0]["difference"].keys() == {"estimate", "low", "high"}
