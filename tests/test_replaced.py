"""Graft the tensors that an adapter stores in place of its base's: their deltas are against the old base."""

from __future__ import annotations

import copy
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import (
    LABELS,
    ONE_STEP,
    add_noise,
    make_sentence,
    make_tokenizer,
    read_weights,
    update_json,
    write_base,
    write_table,
    write_upgrade,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from regraft import Upgrade, load_adaptation, recycle
from regraft.errors import RecipeError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*Norm"),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return the old and the new base of three architectures; GPT-2 stores its matrices as [in, out]."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("llama", "bert"):
        write_base(folder / f"{name}-old", name)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=43, n_embd=32, n_layer=1, n_head=2, n_positions=66, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2-old")
    make_tokenizer("llama").save_pretrained(folder / "gpt2-old")
    names = ("llama", "bert", "gpt2")
    return {
        name: (folder / f"{name}-old", write_upgrade(folder / f"{name}-old", folder / f"{name}-new", 0.3))
        for name in names
    }


@pytest.fixture(scope="module")
def small_task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    generator = random.Random(0)
    for split in ("train", "dev"):
        rows = [{"text": make_sentence(generator, bool(i % 2)), "label": LABELS[i % 2]} for i in range(8)]
        write_table(folder / f"{split}.csv", rows)
    (folder / "task.yaml").write_text("train: train.csv\ndev: dev.csv\ntext: text\nlabel: label\n")
    return folder / "task.yaml"


def lora(**settings):
    return LoraConfig(task_type="SEQ_CLS", r=2, **settings)


def identity(tensor):
    return tensor


def tuned_rows(tensor):
    return tensor[ROW_INDICES]


def row_norms(tensor):
    return tensor.norm(dim=1)


def column_norms(tensor):
    return tensor.norm(dim=0)


ROW_INDICES = [5, 7, 6]  # out of order, so that a sorted copy would be noticed
# For each case: the architecture, PEFT's config, and for the end of each stored name the tensor of the base that it
# replaces with the function that computes the stored value from it.
CASES = {
    "embeddings": (
        "llama",
        lora(target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"]),
        {"embed_tokens.weight": ("model.embed_tokens.weight", identity)},
    ),
    "norm": (
        "llama",
        lora(target_modules=["q_proj"], modules_to_save=["score", "norm"]),
        {"model.norm.weight": ("model.norm.weight", identity)},
    ),
    "rows of tokens": (
        "llama",
        lora(target_modules=["q_proj"], trainable_token_indices=ROW_INDICES),
        {"trainable_tokens_delta": ("model.embed_tokens.weight", tuned_rows)},
    ),
    "rows by module": (
        "llama",
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ROW_INDICES}),
        {"trainable_tokens_delta": ("model.embed_tokens.weight", tuned_rows)},
    ),
    "embeddings under a LoRA": (
        "llama",
        lora(target_modules=["q_proj", "embed_tokens"]),
        {"embed_tokens.base_layer.weight": ("model.embed_tokens.weight", identity)},
    ),
    "biases of the LoRA": (
        "bert",
        lora(target_modules=["query"], bias="lora_only", modules_to_save=["classifier", "pooler"]),
        {"0.attention.self.query.base_layer.bias": ("bert.encoder.layer.0.attention.self.query.bias", identity)},
    ),
    "LayerNorms": (
        "bert",
        LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"], modules_to_save=["classifier", "pooler"]),
        {
            "0.output.LayerNorm.ln_tuning_layers.weight": ("bert.encoder.layer.0.output.LayerNorm.weight", identity),
            "embeddings.LayerNorm.ln_tuning_layers.bias": ("bert.embeddings.LayerNorm.bias", identity),
        },
    ),
    "magnitudes": (
        "llama",
        lora(target_modules=["q_proj", "down_proj"], use_dora=True),
        {"0.mlp.down_proj.lora_magnitude_vector": ("model.layers.0.mlp.down_proj.weight", row_norms)},
    ),
    "magnitudes of embeddings": (
        "llama",
        lora(target_modules=["embed_tokens"], use_dora=True),
        {"lora_magnitude_vector": ("model.embed_tokens.weight", column_norms)},
    ),
    "magnitudes of transposed matrices": (
        "gpt2",
        lora(target_modules=["c_attn", "attn.c_proj"], use_dora=True),
        {
            "attn.c_proj.lora_magnitude_vector": ("transformer.h.0.attn.c_proj.weight", column_norms),
            "c_attn.lora_magnitude_vector": ("transformer.h.0.attn.c_attn.weight", column_norms),
        },
    ),
}


def write_adapter(base, config, folder):
    """Write an adapter as PEFT saves it, with noise added to each trained parameter."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = get_peft_model(model, copy.deepcopy(config))
    add_noise(adapted, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_adapter(tmp_path_factory, pairs):
    """Return a function that writes the adapter of a case on its first call and returns the folder."""
    folder = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def write(case):
        architecture, config, _ = CASES[case]
        return write_adapter(pairs[architecture][0], config, folder / case.replace(" ", "-"))

    return write


def find_name(tensors, suffix):
    return next(name for name in tensors if name.endswith(suffix))


@pytest.mark.parametrize("case", CASES)
def test_replaced_tensors_are_grafted(tmp_path, pairs, open_adapter, small_task, case):
    architecture, _, replaced = CASES[case]
    old, new = pairs[architecture]
    source = open_adapter(case)
    outcome = recycle(Upgrade(old, new), source, small_task, "direct", tmp_path / "out", recipe=ONE_STEP)
    before, after = read_weights(source), read_weights(outcome.path / "adaptation")
    assert before.keys() == after.keys()
    grafted = outcome.record.notes["grafted_in_place_of_the_base"]
    for suffix, (base_name, compute_stored_value) in replaced.items():
        name = find_name(before, suffix)
        old_value, new_value = (compute_stored_value(read_weights(base)[base_name]) for base in (old, new))
        assert torch.allclose(after[name], new_value + before[name] - old_value, atol=1e-6), name
        assert name in grafted
    for name in after.keys() - set(grafted):
        assert torch.equal(before[name], after[name])  # A, B and the head
    model = AutoModelForSequenceClassification.from_pretrained(new, num_labels=2)
    PeftModel.from_pretrained(model, outcome.path / "adaptation")
    adaptation = load_adaptation(source)
    unchanged = adaptation.family.graft(adaptation, Upgrade(old, old)).tensors
    assert all(torch.equal(before[name], unchanged[name]) for name in before)


@pytest.mark.parametrize("method", ["direct", "trimmed"])
def test_replace_keeps_the_stored_tensors(tmp_path, pairs, open_adapter, small_task, method):
    upgrade = Upgrade(*pairs["llama"])
    source = open_adapter("norm")
    outcome = recycle(upgrade, source, small_task, method, tmp_path / "out", recipe=ONE_STEP, replace=True)
    assert outcome.record.inputs["replace"] is True
    assert "grafted_in_place_of_the_base" not in outcome.record.notes
    before, after = read_weights(source), read_weights(outcome.path / "adaptation")
    assert all(torch.equal(before[name], after[name]) for name in before if method == "direct" or "norm" in name)
    plain = recycle(upgrade, source, small_task, method, tmp_path / "grafted", recipe=ONE_STEP)
    assert "base_model.model.model.norm.weight" in plain.record.notes["grafted_in_place_of_the_base"]
    assert plain.record.inputs["replace"] is False  # tells the outcome from one of 0.1


def test_adapter_without_replaced_tensors_is_recycled_as_in_0_1(tmp_path, pairs, small_task):
    upgrade = Upgrade(*pairs["llama"])
    source = write_adapter(upgrade.old.path, lora(target_modules=["q_proj"]), tmp_path / "adapter")
    outcome = recycle(upgrade, source, small_task, "direct", tmp_path / "out", recipe=ONE_STEP)
    assert "replace" not in outcome.record.inputs
    with pytest.raises(RecipeError, match="stores nothing in place of its base's tensors"):
        recycle(upgrade, source, small_task, "direct", tmp_path / "other", recipe=ONE_STEP, replace=True)


def test_tuning_keeps_the_embeddings_that_an_adapter_stores(tmp_path, pairs, small_task):
    """PEFT stores the embeddings that a LoRA is on; here they differ from the base's."""
    old, new = pairs["llama"]
    source = write_adapter(old, CASES["embeddings under a LoRA"][1], tmp_path / "adapter")
    tensors = read_weights(source)
    name = find_name(tensors, "embed_tokens.base_layer.weight")
    tensors[name] = tensors[name] + 0.1
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    outcome = recycle(Upgrade(old, new), source, small_task, "init", tmp_path / "out", recipe=ONE_STEP)
    tuned = read_weights(outcome.path / "adaptation")
    assert torch.allclose(tuned[name], read_weights(new)["model.embed_tokens.weight"] + 0.1, atol=1e-6)
    assert json.loads((outcome.path / "outcome.json").read_text())["kind"] == "lora"


def test_pooler_that_one_base_lacks_is_copied_and_named(tmp_path, pairs, small_task):
    """Further pre-training of bert-base-uncased on masked language modelling alone drops its pooler."""
    new = pairs["bert"][1]
    old = shutil.copytree(pairs["bert"][0], tmp_path / "old")
    pooler = {"bert.pooler.dense.weight": torch.randn(32, 32), "bert.pooler.dense.bias": torch.randn(32)}
    save_file(read_weights(old) | pooler, old / "model.safetensors", metadata={"format": "pt"})
    source = write_adapter(old, CASES["biases of the LoRA"][1], tmp_path / "adapter")
    for first, second in ((old, new), (new, old)):
        upgrade = Upgrade(first, second)
        out = tmp_path / f"from-{first.name}"
        outcome = recycle(upgrade, source, small_task, "direct", out, recipe=ONE_STEP)
        before, after = read_weights(source), read_weights(outcome.path / "adaptation")
        names = [f"base_model.model.{name}" for name in sorted(pooler)]
        assert outcome.record.notes["copied_as_a_base_lacks_it"] == names
        assert all(torch.equal(before[name], after[name]) for name in names)


@pytest.fixture(scope="module")
def padded(tmp_path_factory, pairs):
    """Return a base with five rows of padding, and an adapter that stores the rows of tuned tokens."""
    folder = tmp_path_factory.mktemp("padded")
    model = AutoModelForCausalLM.from_pretrained(pairs["llama"][0])
    model.resize_token_embeddings(48, mean_resizing=False)
    model.save_pretrained(folder / "old")
    make_tokenizer("llama").save_pretrained(folder / "old")
    write_adapter(folder / "old", CASES["rows of tokens"][1], folder / "adapter")
    return folder / "old", folder / "adapter"


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_rows_of_tokens_follow_their_tokens(padded, data):
    """The new base has any tokens in any order; any were tuned, among them tokens that the adapter added."""
    old, source = padded
    tokens = json.loads((old / "tokenizer.json").read_text())["model"]["vocab"]
    words = [token for token in tokens if tokens[token] > 4]
    dropped = data.draw(st.sets(st.sampled_from(words), max_size=3))
    names = ["<a>", "<b>", *(word for word in words if word not in dropped)][data.draw(st.integers(0, 2)) :]
    new_tokens = [*list(tokens)[:5], *data.draw(st.permutations(names))]
    adapter_tokens = {f"<own{i}>": 43 + i for i in range(data.draw(st.integers(0, 3)))}
    tuned = data.draw(st.permutations([*data.draw(st.sets(st.sampled_from(words), min_size=1)), *adapter_tokens]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    with tempfile.TemporaryDirectory() as directory:
        new, folder = Path(directory) / "new", Path(directory) / "adapter"
        shutil.copytree(old, new)
        shutil.copytree(source, folder)
        write_vocabulary(new / "tokenizer.json", {token: i for i, token in enumerate(new_tokens)})
        num_rows = data.draw(st.integers(0, 3)) + len(new_tokens)
        tensors = {name: tensor.clone() for name, tensor in read_weights(old).items()}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.randn(num_rows, 32, generator=generator)
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        update_json(new / "config.json", vocab_size=num_rows)
        shutil.copy(old / "tokenizer_config.json", folder)
        write_vocabulary(folder / "tokenizer.json", tokens | adapter_tokens, old / "tokenizer.json")
        name = find_name(read_weights(folder), "trainable_tokens_delta")
        before = torch.randn(len(tuned), 32, generator=generator)
        save_file(
            read_weights(folder) | {name: before}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
        tuned_ids = [(tokens | adapter_tokens)[token] for token in tuned]
        update_json(folder / "adapter_config.json", trainable_token_indices=tuned_ids)
        upgrade = Upgrade(old, new)
        adaptation = load_adaptation(folder)
        grafted = adaptation.family.graft(adaptation, upgrade, replace=False)
        replaced = adaptation.family.graft(adaptation, upgrade, replace=True)
        kept_tokens = [token for token in tuned if token in new_tokens or token in adapter_tokens]
        ids = {token: i for i, token in enumerate([*new_tokens, *adapter_tokens])}
        expected_ids = [ids[token] for token in kept_tokens]
        assert grafted.config["trainable_token_indices"] == replaced.config["trainable_token_indices"]
        for adapter in (grafted, replaced):
            assert (name in adapter.tensors) == bool(kept_tokens)
            assert (adapter.config["trainable_token_indices"] or []) == expected_ids
        if not kept_tokens:
            return
        old_rows, new_rows = (read_weights(base)["model.embed_tokens.weight"] for base in (old, new))
        assert len(grafted.tensors[name]) == len(replaced.tensors[name]) == len(kept_tokens)
        for i, token in enumerate(kept_tokens):
            expected = stored_row = before[tuned.index(token)]
            if token not in adapter_tokens:
                expected = new_rows[ids[token]] + stored_row - old_rows[tokens[token]]
            torch.testing.assert_close(grafted.tensors[name][i], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(replaced.tensors[name][i], stored_row)


def write_vocabulary(file, vocabulary, template=None):
    """Write a tokenizer with this vocabulary, and all else as in `template` or the file itself."""
    settings = json.loads((template or file).read_text())
    settings["model"]["vocab"] = vocabulary
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(("has_padding", "method"), [(True, "direct"), (False, "trimmed")])
def test_token_in_a_row_of_padding_keeps_its_tuned_row(tmp_path, pairs, padded, small_task, has_padding, method):
    """A token added to a base with rows of padding is tuned in one of them: no embeddings are resized or stored."""
    old, source = padded
    folder = shutil.copytree(source, tmp_path / "adapter")
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens(["<own>"])
    tokenizer.save_pretrained(folder)
    update_json(folder / "adapter_config.json", trainable_token_indices=[5, 43, 6])
    new = write_upgrade(old, tmp_path / "new", 0.3) if has_padding else pairs["llama"][1]
    outcome = recycle(Upgrade(old, new), folder, small_task, method, tmp_path / "out", recipe=ONE_STEP)
    assert "'<own>'" in outcome.record.notes["vocabulary"]
    written = AutoTokenizer.from_pretrained(outcome.path / "adaptation")
    assert written.convert_tokens_to_ids("<own>") == 43
    name = find_name(read_weights(folder), "trainable_tokens_delta")
    assert torch.equal(read_weights(outcome.path / "adaptation")[name][1], read_weights(folder)[name][1])
