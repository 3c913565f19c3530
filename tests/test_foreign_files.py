"""Untrusted checkpoints, configs, tokenizers and adapters: their code never runs, and unusable ones are refused."""

import dataclasses
import json
import math
import re
import shutil
import struct
import time

import pytest
import torch
from helpers import HEAD, find_weights, load_tuned_model, make_head, make_tokenizer, run_command, write_adaptation
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from typer.testing import CliRunner

from regraft import Base, Upgrade, check, load_adaptation, recycle, tune
from regraft.adaptation import fresh_model, load_model, merge_lora, prepare_for_tuning
from regraft.checkpoint import TOKENIZER_FILES, Checkpoint, copy_auxiliary_files
from regraft.cli import app
from regraft.errors import CheckpointError, DataError, MismatchError, RecipeError, RegraftError
from regraft.model import encode
from regraft.task import load_data
from regraft.weights import distance, distances, graft_all, interpolate_all, low_rank

WEIGHT_NAME = "bert.encoder.layer.0.output.dense.weight"
EMPTY_TENSOR_ENTRY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@pytest.fixture
def copy_folder(tmp_path):
    """A function that copies a folder and changes one of its JSON files; `...` removes a key."""

    def copy(source, file="config.json", **changes):
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, folder)
        content = {**json.loads((folder / file).read_text()), **changes}
        content = {name: value for name, value in content.items() if value is not ...}
        (folder / file).write_text(json.dumps(content))
        return folder

    return copy


def insert_nan(folder):
    """Set an element of `WEIGHT_NAME` in a folder's file to NaN, and return the folder."""
    file = find_weights(folder)
    tensors = load_file(file)
    tensors[WEIGHT_NAME][3, 4] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def write_header(folder, text):
    """Replace a folder's safetensors file with a header alone, and return the folder."""
    file = find_weights(folder)
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    return folder


# infinite values and NaN


@pytest.mark.parametrize("index", [0, 1])
def test_base_with_nan_is_refused(copy_folder, bases, tuned_outcomes, task_file, tmp_path, index):
    base_folders = list(bases["bert"])
    base_folders[index] = insert_nan(copy_folder(base_folders[index]))
    message = re.escape(
        f"{base_folders[index]}: 1 tensors hold values that are infinite or NaN: {WEIGHT_NAME} (1 of 2,048)"
    )
    upgrade = Upgrade(*base_folders)
    adaptation = load_adaptation(tuned_outcomes["bert", "lora"])
    with pytest.raises(CheckpointError, match=message):
        check(upgrade, adaptation, task_file, force=True)
    with pytest.raises(CheckpointError, match=message):
        recycle(upgrade, adaptation, task_file, "direct", tmp_path / "out", force=True)
    with pytest.raises(CheckpointError, match=message):
        tune(base_folders[index], task_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arithmetic_refuses_nonfinite_values(copy_folder, bases, tuned_outcomes):
    old, new = (Checkpoint.open(path) for path in bases["bert"])
    full = Checkpoint.open(tuned_outcomes["bert", "full"] / "adaptation")
    with_nan = Checkpoint.open(insert_nan(copy_folder(bases["bert"][1])))
    for factor in (math.nan, math.inf):
        with pytest.raises(RecipeError, match="λ must be a finite number"):
            graft_all(new, full, old, factor)
        with pytest.raises(RecipeError, match="t must be a finite number"):
            interpolate_all(old, new, factor)
    with pytest.raises(CheckpointError, match=WEIGHT_NAME):
        distances(old, with_nan)
    with pytest.raises(CheckpointError, match=r"infinite or (NaN|not a number)"):
        distance([(torch.tensor([1.0, math.inf]), torch.ones(2))])
    with pytest.raises(CheckpointError, match=f"{WEIGHT_NAME}' would be infinite"):
        graft_all(with_nan, full, old)[WEIGHT_NAME]
    with pytest.raises(CheckpointError, match=r"infinite or (NaN|not a number)"):
        low_rank(torch.full((3, 3), math.nan), rank=1)
    lora = Checkpoint.open(tuned_outcomes["bert", "lora"] / "adaptation")
    config = json.loads((tuned_outcomes["bert", "lora"] / "adaptation" / "adapter_config.json").read_text())
    for alpha in (math.nan, math.inf, "16", None):
        with pytest.raises(CheckpointError, match="lora_alpha"):
            merge_lora(lora, {**config, "lora_alpha": alpha}, old)


def test_result_beyond_the_range_of_its_dtype_is_refused():
    weights = {"w": torch.full((4,), 60_000.0, dtype=torch.float16)}
    with pytest.raises(CheckpointError, match="'w' would be infinite or NaN in F16"):
        graft_all(weights, weights, {"w": torch.zeros(4, dtype=torch.float16)})["w"]


# code in checkpoints


def test_code_of_a_checkpoint_never_runs(copy_folder, bases, tuned_outcomes, tmp_path, monkeypatch):
    def add_code(folder):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        return folder

    def fail_on_prompt(prompt=""):
        pytest.fail("asked for confirmation")

    monkeypatch.setattr("builtins.input", fail_on_prompt)
    custom_code = {
        "auto_map": {"AutoConfig": "evil.E", "AutoModelForSequenceClassification": "evil.M"},
        "model_type": "evil",
    }
    base = Base.open(bases["bert"][0])
    with pytest.raises(CheckpointError, match="needs code from the folder, which regraft does not run"):
        Base.open(add_code(copy_folder(base.path, **custom_code)))
    full = load_adaptation(add_code(copy_folder(tuned_outcomes["bert", "full"] / "adaptation", **custom_code)))
    with pytest.raises(CheckpointError, match="needs code from the folder, which regraft does not run"):
        load_model(full, base, make_head(*full.labels))
    with pytest.raises(CheckpointError, match="attn_implementation is 'somebody/kernel', code from the hub"):
        Base.open(copy_folder(base.path, attn_implementation="somebody/kernel"))
    tokenizer_config = {"tokenizer_class": "E", "auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]}}
    with_tokenizer_code = add_code(copy_folder(base.path, "tokenizer_config.json", **tokenizer_config))
    assert Base.open(with_tokenizer_code).tokenizer.get_vocab() == base.tokenizer.get_vocab()
    lora = copy_folder(
        tuned_outcomes["bert", "lora"] / "adaptation",
        "adapter_config.json",
        megatron_config={"a": 1},
        megatron_core="evil",
    )
    with pytest.raises(CheckpointError, match="makes PEFT import 'evil'"):
        load_adaptation(lora)
    assert not (tmp_path / "ran").exists()


def test_prompt_initialised_from_text_loads_no_tokenizer(tmp_path, bases):
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_CLS",
        "num_virtual_tokens": 2,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x",
        "tokenizer_name_or_path": str(tmp_path / "none"),
        "token_dim": 32,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.ones(2, 32)}, tmp_path / "adapter_model.safetensors")
    base = Base.open(bases["bert"][0])
    adaptation = load_adaptation(tmp_path)
    adapter_config = adaptation.family.read_config(adaptation, for_new_adapter=True)
    head = make_head("a", "b")
    prepare_for_tuning(fresh_model(base, head, 0), base, head, adapter_config, 0)


def test_code_is_not_copied_with_weights(tmp_path, copy_folder, bases):
    folder = copy_folder(bases["bert"][0])
    (folder / "tokenizer_code.py").write_text("")
    (folder / "vocab.txt").mkdir()
    (tmp_path / "out").mkdir()
    copy_auxiliary_files(folder, tmp_path / "out", TOKENIZER_FILES)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


# configs and tokenizers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"pad_token_id": "x"}, "pad_token_id"),
        ({"pad_token_id": 999}, "Padding_idx must be within num_embeddings"),
        ({"dtype": "float99"}, "float99"),
        ({"model_type": ["bert"]}, "cannot read it"),
        ({"id2label": ["a"]}, "cannot read it|id2label"),
        ({"architectures": 5}, "architectures is 5|names 5"),
        ({"num_labels": 10**9}, r"num_labels is 1,000,000,000; with .* tensors, at most 100,000 is allowed"),
        ({"num_hidden_layers": 100_000}, r"num_hidden_layers is 100,000; with .* tensors, at most \d+ is allowed"),
        ({"max_position_embeddings": 10**12}, r"describes a model of [\d,]+ parameters|differs from"),
        ({"hidden_act": "nope"}, "nope"),
        ({"attn_implementation": "nope"}, "nope"),
        ({"attn_implementation": 3}, "cannot"),
        ({"chunk_size_feed_forward": "8"}, "chunk_size_feed_forward is '8'"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1"),
        ({"attention_probs_dropout_prob": math.nan}, "attention_probs_dropout_prob is nan"),
        ({"dtype": 1.5}, "dtype is 1.5"),
    ],
)
@pytest.mark.parametrize("folder_kind", ["base", "full"])
def test_invalid_config_is_refused_quickly(copy_folder, bases, tuned_outcomes, folder_kind, changes, message):
    started = time.monotonic()
    with pytest.raises(RegraftError, match=message):
        if folder_kind == "base":
            fresh_model(Base.open(copy_folder(bases["bert"][0], **changes)), make_head("a", "b"), 0)
        else:
            full = load_adaptation(copy_folder(tuned_outcomes["bert", "full"] / "adaptation", **changes))
            load_model(full, Base.open(bases["bert"][0]), HEAD)
    assert time.monotonic() - started < 5


def test_large_widths_are_accepted(copy_folder, bases):
    sizes = {"shared_expert_intermediate_size": 20_480, "vocab_size_per_layer_input": 262_144}  # Qwen2-57B, Gemma 3n
    assert Base.open(copy_folder(bases["llama"][0], **sizes)).config.num_hidden_layers == 2


def test_config_that_returns_tuples_changes_no_result(copy_folder, bases, tuned_outcomes, task_file):
    old, new = bases["bert"]
    lora = tuned_outcomes["bert", "lora"]
    expected = check(Upgrade(Base.open(old), Base.open(new)), lora, task_file)
    unused = {"max_window_layers": 80}  # Qwen's configs with 24 layers have this value
    new_copy = copy_folder(new, return_dict=False, output_attentions=True, output_hidden_states=True, **unused)
    assert check(Upgrade(Base.open(old), Base.open(new_copy)), lora, task_file) == expected


def test_nonfinite_predictions_are_refused(copy_folder, bases, tuned_outcomes, task_file):
    old, new = bases["bert"]
    folder = copy_folder(new, layer_norm_eps=math.nan)
    with pytest.raises(MismatchError, match=f"{re.escape(str(folder))}: what the weights on it predict is infinite"):
        check(Upgrade(Base.open(old), Base.open(folder)), tuned_outcomes["bert", "lora"], task_file)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"a":' * 100_000, '{"a": 1, "a": 2}', "\ud800"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_file_without_a_json_object_is_refused(copy_folder, bases, file, text):
    folder = copy_folder(bases["bert"][0])
    (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=re.escape(f"{folder}/{file}: not ")):
        _ = Base.open(folder).tokenizer


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/a.jinja"])
def test_huge_tokenizer_file_is_not_read(copy_folder, bases, file):
    folder = copy_folder(bases["bert"][0])
    (folder / file).parent.mkdir(exist_ok=True)
    with (folder / file).open("wb") as stream:
        stream.truncate(10**9)
    with pytest.raises(CheckpointError, match=re.escape(f"{folder / file}: has 1,000,000,000 bytes")):
        _ = Base.open(folder).tokenizer


def test_tokenizer_that_inflates_texts_is_refused(copy_folder, bases):
    folder = copy_folder(bases["bert"][0])
    content = json.loads((folder / "tokenizer.json").read_text())
    tenfold = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}

    def repeat_tenfold(count):
        content["normalizer"] = {"type": "Sequence", "normalizers": [tenfold] * count}
        (folder / "tokenizer.json").write_text(json.dumps(content))

    repeat_tenfold(3)
    assert Base.open(folder).tokenizer("a")["input_ids"]
    repeat_tenfold(4)
    with pytest.raises(CheckpointError, match=r"makes texts up to 10,000 times as long"):
        _ = Base.open(folder).tokenizer


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_tokenizer_without_padding_token_makes_the_same_batches(tmp_path, copy_folder, bases, task_file, architecture):
    source = bases[architecture][0]
    data = load_data(task_file, 0)
    expected = encode(Base.open(source), data.with_settings(max_length=32), data.dev)
    for changes in (
        {"pad_token": ...},
        {"pad_token": ..., "eos_token": ...},
        {"pad_token": ..., "eos_token": ..., "unk_token": ...},
        {"pad_token": "[PAD]"},  # a new token, for which the embeddings have no row
    ):
        base = Base.open(copy_folder(source, "tokenizer_config.json", **changes))
        encoded = encode(base, data.with_settings(max_length=32), data.dev)
        assert encoded.columns["input_ids"] == expected.columns["input_ids"]
        assert 0 <= encoded.pad["input_ids"] < base.vocabulary_size
        assert encoded.batch([0, 1])["attention_mask"].equal(expected.batch([0, 1])["attention_mask"])


def test_tokens_beyond_the_embeddings_are_refused(copy_folder, bases, task_file):
    folder = copy_folder(bases["bert"][0], "tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["good"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"produces token 'good' \(500\), but its embeddings have 43 rows"):
        data = load_data(task_file, 0)
        encode(Base.open(folder), data, data.dev)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer_config\.json, and transformers assumes special tokens"
    ):
        _ = Base.open(folder).tokenizer


def test_text_without_tokens_is_refused(copy_folder, bases, task_file):
    folder = copy_folder(bases["llama"][0], "tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "\x01"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    data = load_data(task_file, 0)
    dev = data.dev
    dev.texts[3] = ("\x01",)
    with pytest.raises(DataError, match=rf"dev\.csv, row {dev.row_numbers[3]}: .* makes no token of the text"):
        encode(Base.open(folder), data, dev)


@pytest.mark.parametrize("length", [0, -5, "64", True, 1.5, math.nan, [1], 2])
def test_invalid_model_max_length_is_refused(copy_folder, bases, length):
    base = Base.open(copy_folder(bases["bert"][0], "tokenizer_config.json", model_max_length=length))
    with pytest.raises(CheckpointError, match="model_max_length"):
        _ = base.max_input_length


def test_model_max_length_may_be_a_float(copy_folder, bases):
    for length, expected in ((1e30, 66), (40.0, 40)):
        base = Base.open(copy_folder(bases["bert"][0], "tokenizer_config.json", model_max_length=length))
        assert base.max_input_length == expected


def test_outcomes_have_the_unchanged_tokenizer_of_their_base(tmp_path, bases, tuned_outcomes, task_file):
    expected = json.loads((bases["bert"][0] / "tokenizer.json").read_text())
    upgrade = Upgrade(*bases["bert"])
    outcome = recycle(upgrade, tuned_outcomes["bert", "lora"], task_file, "direct", tmp_path / "out")
    for folder in (tuned_outcomes["bert", "full"], outcome.path):
        assert json.loads((folder / "adaptation" / "tokenizer.json").read_text()) == expected


# adapters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "("}, r"'\(' is not a regular expression"),
        ({"exclude_modules": "("}, r"'\(' is not a regular expression"),
        ({"layers_pattern": ["("]}, r"'\(' is not a regular expression"),
        ({"rank_pattern": {"(": 4}}, r"'\(' is not a regular expression"),
        ({"alpha_pattern": {"(": 4}}, r"'\(' is not a regular expression"),
        ({"target_modules": "(.*)*(.*)*X"}, "takes more than"),
        ({"rank_pattern": {f"a{i}": 4 for i in range(10_000)}}, "rank_pattern has 10,000 entries"),
        ({"r": 10**9}, "r is 1,000,000,000"),
    ],
)
def test_expensive_patterns_and_sizes_are_refused(monkeypatch, copy_folder, bases, tuned_outcomes, changes, message):
    monkeypatch.setattr("regraft.adaptation.patterns.TIMEOUT_SECONDS", 2)
    folder = copy_folder(tuned_outcomes["bert", "lora"] / "adaptation", "adapter_config.json", **changes)
    base = Base.open(bases["bert"][0])
    with pytest.raises(CheckpointError, match=message):
        load_tuned_model(folder, base)
    if "r" not in changes:
        config = json.loads((folder / "adapter_config.json").read_text())
        with pytest.raises(CheckpointError, match=message):
            merge_lora(Checkpoint.open(folder), config, base.checkpoint)


def test_regular_expressions_of_peft_are_accepted(copy_folder, bases, tuned_outcomes):
    changes = {
        "target_modules": r"(?:.*?(?:encoder|text).*?(?:attention|output|intermediate).*?(?:query|key|value|dense))",
        "exclude_modules": r"^(cls|classifier)\..*",
        "alpha_pattern": {r"layer\.\d+\.attention\.self\.query": 16},
    }
    adaptation = load_adaptation(
        copy_folder(tuned_outcomes["bert", "lora"] / "adaptation", "adapter_config.json", **changes)
    )
    load_model(adaptation, Base.open(bases["bert"][0]), make_head(*adaptation.labels))


def test_headers_and_labels_are_read_in_linear_time(copy_folder, tuned_outcomes):
    entries = ",".join(f'"{i}":{EMPTY_TENSOR_ENTRY}' for i in range(40_000))
    entry_7 = f'"7":{EMPTY_TENSOR_ENTRY}'
    lora = tuned_outcomes["bert", "lora"] / "adaptation"
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="the name '7' is repeated"):
        load_adaptation(write_header(copy_folder(lora, "adapter_config.json"), f"{{{entries},{entry_7}}}"))
    with pytest.raises(CheckpointError, match="'0' more than once"):
        load_adaptation(copy_folder(lora, "lineage.json", labels=[str(i % 39_999) for i in range(40_000)]))
    with pytest.raises(CheckpointError, match="its header has 40,000,002 bytes"):
        load_adaptation(write_header(copy_folder(lora, "adapter_config.json"), "{" + " " * 40_000_000 + "}"))
    assert time.monotonic() - started < 10


def test_unsupported_adapter_formats_are_refused_with_a_remedy(tmp_path, copy_folder, tuned_outcomes, bases):
    lora = tuned_outcomes["bert", "lora"] / "adaptation"
    for file in ("pytorch_adapter.bin", "adapter.safetensors"):
        folder = tmp_path / file.replace(".", "-")
        folder.mkdir()
        settings = {"config": {"mh_adapter": True}, "model_class": "BertAdapterModel", "name": "sentiment"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        (folder / file).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=r"of the adapters library \(AdapterHub"):
            load_adaptation(folder)
        merge = ["weights", "merge-lora", "--adapter", str(folder), "--base", "none", "--out", str(tmp_path / "out")]
        assert "of the adapters library" in str(CliRunner().invoke(app, merge).exception)
    with pytest.raises(CheckpointError, match=re.escape(f"is a file. Use its folder, {lora}")):
        load_adaptation(lora / "adapter_model.safetensors")
    (tmp_path / "peft").mkdir()
    shutil.copytree(lora, tmp_path / "peft" / "reviewer")
    with pytest.raises(CheckpointError, match=re.escape(f"Use {tmp_path / 'peft' / 'reviewer'}")):
        load_adaptation(tmp_path / "peft")
    with pytest.raises(CheckpointError, match="Its folder reviewer has one: use that"):
        Checkpoint.open(tmp_path / "peft")
    pickled = copy_folder(lora, "adapter_config.json")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.bin is a pickle, which can run code .* load it with PEFT"
    ):
        load_adaptation(pickled)


def test_command_in_the_message_adds_the_missing_pooler(tmp_path, bases, task_file):
    new = bases["bert"][1]
    AutoModel.from_pretrained(bases["bert"][0]).save_pretrained(tmp_path / "old")
    make_tokenizer("bert").save_pretrained(tmp_path / "old")
    old = Base.open(tmp_path / "old")
    lora = write_adaptation(old, "lora", tmp_path / "lora")
    with pytest.raises(MismatchError, match=r"lacks pooler\.dense\.bias, pooler\.dense\.weight") as error:
        recycle(Upgrade(old, new), lora, task_file, "direct", tmp_path / "out")
    command = str(error.value).split("regraft ")[1].rstrip(".").replace("FOLDER", str(tmp_path / "new"))
    run_command(*command.split())
    load_tuned_model(lora, Base.open(tmp_path / "new"))
    written = load_file(tmp_path / "new/model.safetensors")
    upgraded = load_file(new / "model.safetensors")
    for name, tensor in written.items():
        expected = old.checkpoint[name] if name.startswith("pooler") else upgraded[f"bert.{name}"]
        assert torch.equal(tensor, expected)


# refusals before any training


def test_base_with_a_regression_config_is_tuned_as_a_classifier(tmp_path, copy_folder, bases, task_file, quick_recipe):
    base = copy_folder(bases["bert"][0], problem_type="regression", output_attentions=True, output_hidden_states=True)
    recipe = dataclasses.replace(quick_recipe, steps=2, eval_every=2)
    outcome = tune(base, task_file, tmp_path / "out", recipe=recipe)
    assert load_adaptation(outcome.path).config.get("problem_type") in (None, "single_label_classification")


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_rank_above_the_layer_width_is_refused_before_training(tmp_path, bases, task_file, kind):
    with pytest.raises(RecipeError, match="rank 40 is more than"):
        tune(bases["bert"][0], task_file, tmp_path / "out", kind=kind, rank=40)
    assert not list(tmp_path.iterdir())
