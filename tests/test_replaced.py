"""What an adapter stores in place of its base's tensors is a delta against the old base, like all that was tuned."""

from __future__ import annotations

import copy
import csv
import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import LABELS, make_tokenizer, move_base, sentence, weights, write_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from regraft import Recipe, Upgrade, load_adaptation, recycle
from regraft.errors import RecipeError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*Norm"),
]
RECIPE = Recipe(steps=1, precision="fp32")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Old and new base of three architectures; GPT-2 keeps its matrices as [in, out]."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("llama", "bert"):
        write_base(folder / f"{name}-old", name)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=43, n_embd=32, n_layer=1, n_head=2, n_positions=66, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2-old")
    make_tokenizer("llama").save_pretrained(folder / "gpt2-old")
    names = ("llama", "bert", "gpt2")
    return {n: (folder / f"{n}-old", move_base(folder / f"{n}-old", folder / f"{n}-new", 0.3)) for n in names}


@pytest.fixture(scope="module")
def small_task(tmp_path_factory):
    import random

    folder, chance = tmp_path_factory.mktemp("small"), random.Random(0)
    for split in ("train", "dev"):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["text", "label"])
            rows.writerows([sentence(chance, bool(i % 2)), LABELS[i % 2]] for i in range(8))
    (folder / "task.yaml").write_text("train: train.csv\ndev: dev.csv\ntext: text\nlabel: label\n")
    return folder / "task.yaml"


def lora(**settings):
    return LoraConfig(task_type="SEQ_CLS", r=2, **settings)


ROWS = [5, 7, 6]
# the architecture, PEFT's config, and by the end of a stored name which tensor it replaces and how
CASES = {
    "embeddings": (
        "llama",
        lora(target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"]),
        {"embed_tokens.weight": "model.embed_tokens.weight"},
    ),
    "norm": (
        "llama",
        lora(target_modules=["q_proj"], modules_to_save=["score", "norm"]),
        {"model.norm.weight": "model.norm.weight"},
    ),
    "rows of tokens": (
        "llama",
        lora(target_modules=["q_proj"], trainable_token_indices=ROWS),
        {"trainable_tokens_delta": ("model.embed_tokens.weight", lambda t: t[ROWS])},
    ),
    "rows by module": (
        "llama",
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ROWS}),
        {"trainable_tokens_delta": ("model.embed_tokens.weight", lambda t: t[ROWS])},
    ),
    "embeddings under a LoRA": (
        "llama",
        lora(target_modules=["q_proj", "embed_tokens"]),
        {"embed_tokens.base_layer.weight": "model.embed_tokens.weight"},
    ),
    "biases of the LoRA": (
        "bert",
        lora(target_modules=["query"], bias="lora_only", modules_to_save=["classifier", "pooler"]),
        {"0.attention.self.query.base_layer.bias": "bert.encoder.layer.0.attention.self.query.bias"},
    ),
    "LayerNorms": (
        "bert",
        LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"], modules_to_save=["classifier", "pooler"]),
        {
            "0.output.LayerNorm.ln_tuning_layers.weight": "bert.encoder.layer.0.output.LayerNorm.weight",
            "embeddings.LayerNorm.ln_tuning_layers.bias": "bert.embeddings.LayerNorm.bias",
        },
    ),
    "magnitudes": (
        "llama",
        lora(target_modules=["q_proj", "down_proj"], use_dora=True),
        {"0.mlp.down_proj.lora_magnitude_vector": ("model.layers.0.mlp.down_proj.weight", lambda t: t.norm(dim=1))},
    ),
    "magnitudes of embeddings": (
        "llama",
        lora(target_modules=["embed_tokens"], use_dora=True),
        {"lora_magnitude_vector": ("model.embed_tokens.weight", lambda t: t.norm(dim=0))},
    ),
    "magnitudes of turned matrices": (
        "gpt2",
        lora(target_modules=["c_attn", "attn.c_proj"], use_dora=True),
        {
            "attn.c_proj.lora_magnitude_vector": ("transformer.h.0.attn.c_proj.weight", lambda t: t.norm(dim=0)),
            "c_attn.lora_magnitude_vector": ("transformer.h.0.attn.c_attn.weight", lambda t: t.norm(dim=0)),
        },
    ),
}


def write_adapter(base, config, folder):
    """What PEFT alone saves, every number of it moved."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = get_peft_model(model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory, pairs):
    """The adapter of a case, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def write(case):
        architecture, config, _ = CASES[case]
        return write_adapter(pairs[architecture][0], config, folder / case.replace(" ", "-"))

    return write


def stored(base):
    return load_file(base / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_what_an_adapter_replaces_is_grafted(tmp_path, pairs, adapter_of, small_task, case):
    architecture, _, replaced = CASES[case]
    old, new = pairs[architecture]
    source = adapter_of(case)
    outcome = recycle(Upgrade(old, new), source, small_task, "direct", tmp_path / "out", recipe=RECIPE)
    before, after = weights(source), weights(outcome.path / "adaptation")
    assert before.keys() == after.keys()
    for end, what in replaced.items():
        name, rule = what if isinstance(what, tuple) else (what, lambda t: t)
        full = next(n for n in before if n.endswith(end))
        expected = rule(stored(new)[name]) + before[full] - rule(stored(old)[name])
        assert torch.allclose(after[full], expected, atol=1e-6), full
        assert full in outcome.record.notes["grafted_in_place_of_the_base"]
    for name in after.keys() - set(outcome.record.notes["grafted_in_place_of_the_base"]):
        assert torch.equal(before[name], after[name])  # A, B and the head
    model = AutoModelForSequenceClassification.from_pretrained(new, num_labels=2)
    PeftModel.from_pretrained(model, outcome.path / "adaptation")
    adaptation = load_adaptation(source)
    same = adaptation.family.graft(adaptation, Upgrade(old, old)).tensors
    assert all(torch.equal(before[name], same[name]) for name in before)


@pytest.mark.parametrize("method", ["direct", "trimmed"])
def test_replace_puts_the_stored_tensors_back(tmp_path, pairs, adapter_of, small_task, method):
    upgrade, source = Upgrade(*pairs["llama"]), adapter_of("norm")
    outcome = recycle(upgrade, source, small_task, method, tmp_path / "out", recipe=RECIPE, replace=True)
    assert outcome.record.inputs["replace"] is True
    assert "grafted_in_place_of_the_base" not in outcome.record.notes
    before, after = weights(source), weights(outcome.path / "adaptation")
    assert all(torch.equal(before[name], after[name]) for name in before if method == "direct" or "norm" in name)
    plain = recycle(upgrade, source, small_task, method, tmp_path / "grafted", recipe=RECIPE)
    assert "base_model.model.model.norm.weight" in plain.record.notes["grafted_in_place_of_the_base"]
    assert plain.record.inputs["replace"] is False  # so that what 0.1 made of it is not taken for this


def test_an_adapter_that_replaces_nothing_is_what_it_was_in_0_1(tmp_path, pairs, small_task):
    upgrade = Upgrade(*pairs["llama"])
    source = write_adapter(upgrade.old.path, lora(target_modules=["q_proj"]), tmp_path / "adapter")
    outcome = recycle(upgrade, source, small_task, "direct", tmp_path / "out", recipe=RECIPE)
    assert "replace" not in outcome.record.inputs
    with pytest.raises(RecipeError, match="stores nothing in place of its base's tensors: leave out replace"):
        recycle(upgrade, source, small_task, "direct", tmp_path / "other", recipe=RECIPE, replace=True)


def test_embeddings_that_came_with_an_adapter_stay_with_it_when_it_is_tuned(tmp_path, pairs, small_task):
    """PEFT stores the embeddings under a LoRA; where they are others than the base's, tuning on must not lose them."""
    old, new = pairs["llama"]
    source = write_adapter(old, CASES["embeddings under a LoRA"][1], tmp_path / "adapter")
    tensors = weights(source)
    name = next(n for n in tensors if n.endswith("embed_tokens.base_layer.weight"))
    moved = {n: (t + 0.1 if n == name else t).contiguous() for n, t in tensors.items()}
    save_file(moved, source / "adapter_model.safetensors", metadata={"format": "pt"})
    outcome = recycle(Upgrade(old, new), source, small_task, "init", tmp_path / "out", recipe=RECIPE)
    found = weights(outcome.path / "adaptation")
    assert torch.allclose(found[name], stored(new)["model.embed_tokens.weight"] + 0.1, atol=1e-6)
    assert json.loads((outcome.path / "outcome.json").read_text())["kind"] == "lora"


def test_a_pooler_that_one_base_lacks_is_copied_and_named(tmp_path, pairs, small_task):
    """As of bert-base-uncased, pre-trained further with its masked language modelling alone."""
    new = pairs["bert"][1]
    old = shutil.copytree(pairs["bert"][0], tmp_path / "old")
    pooler = {f"bert.pooler.dense.{part}": torch.randn(32, *shape) for part, shape in (("weight", (32,)), ("bias", ()))}
    save_file({**stored(old), **pooler}, old / "model.safetensors", metadata={"format": "pt"})
    source = write_adapter(old, CASES["biases of the LoRA"][1], tmp_path / "adapter")
    for sides in ((old, new), (new, old)):
        outcome = recycle(
            Upgrade(*sides), source, small_task, "direct", tmp_path / f"from-{sides[0].name}", recipe=RECIPE
        )
        before, after = weights(source), weights(outcome.path / "adaptation")
        names = [f"base_model.model.{name}" for name in sorted(pooler)]
        assert outcome.record.notes["copied_as_a_base_lacks_it"] == names
        assert all(torch.equal(before[name], after[name]) for name in names)


@pytest.fixture(scope="module")
def padded(tmp_path_factory, pairs):
    """A base with five rows that no token has, and an adapter with rows for tokens."""
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
    """Whatever tokens the new base has, in any order, and whichever were tuned, own ones in free rows among them."""
    old, source = padded
    tokens = json.loads((old / "tokenizer.json").read_text())["model"]["vocab"]
    words = [token for token in tokens if tokens[token] > 4]
    dropped = data.draw(st.sets(st.sampled_from(words), max_size=3))
    names = ["<a>", "<b>", *(word for word in words if word not in dropped)][data.draw(st.integers(0, 2)) :]
    order = [*list(tokens)[:5], *data.draw(st.permutations(names))]
    own = {f"<own{i}>": 43 + i for i in range(data.draw(st.integers(0, 3)))}
    tuned = data.draw(st.permutations([*data.draw(st.sets(st.sampled_from(words), min_size=1)), *own]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    with tempfile.TemporaryDirectory() as directory:
        new, folder = Path(directory) / "new", Path(directory) / "adapter"
        shutil.copytree(old, new)
        shutil.copytree(source, folder)
        spell(new / "tokenizer.json", {token: i for i, token in enumerate(order)})
        rows = data.draw(st.integers(0, 3)) + len(order)
        tensors = {name: t.clone() for name, t in stored(old).items()}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.randn(rows, 32, generator=generator)
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        change(new / "config.json", vocab_size=rows)
        shutil.copy(old / "tokenizer_config.json", folder)
        spell(folder / "tokenizer.json", tokens | own, old / "tokenizer.json")
        name = next(name for name in weights(folder) if name.endswith("trainable_tokens_delta"))
        before = torch.randn(len(tuned), 32, generator=generator)
        save_file(weights(folder) | {name: before}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        change(folder / "adapter_config.json", trainable_token_indices=[(tokens | own)[token] for token in tuned])
        upgrade, adaptation = Upgrade(old, new), load_adaptation(folder)
        both = [adaptation.family.graft(adaptation, upgrade, replace=replace) for replace in (False, True)]
        (grafted, config), (replaced, again) = ((carried.tensors, carried.settings) for carried in both)
        carried = [token for token in tuned if token in order or token in own]
        assert (name in grafted) == bool(carried)
        ids = {token: i for i, token in enumerate([*order, *own])}
        assert config["trainable_token_indices"] == again["trainable_token_indices"]
        assert (config["trainable_token_indices"] or []) == [ids[token] for token in carried]
        base, after = (stored(side)["model.embed_tokens.weight"] for side in (old, new))
        rows_of = [tensors[name] if carried else () for tensors in (grafted, replaced)]
        for row, as_stored, token in zip(*rows_of, carried, strict=True):
            saved = before[tuned.index(token)]
            expected = saved if token in own else after[ids[token]] + saved - base[tokens[token]]
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(as_stored, saved)


def spell(file, vocabulary, like=None):
    """Write a tokenizer with another vocabulary."""
    settings = json.loads((like or file).read_text())
    settings["model"]["vocab"] = vocabulary
    file.write_text(json.dumps(settings))


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(("has_free_rows", "method"), [(True, "direct"), (False, "trimmed")])
def test_a_token_in_a_free_row_is_read_where_it_was_tuned(tmp_path, pairs, padded, small_task, has_free_rows, method):
    """Added to a tokenizer whose base has rows to spare, and tuned there: no embeddings were resized or stored."""
    old, source = padded
    folder = shutil.copytree(source, tmp_path / "adapter")
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens(["<own>"])
    tokenizer.save_pretrained(folder)
    change(folder / "adapter_config.json", trainable_token_indices=[5, 43, 6])
    new = move_base(old, tmp_path / "new", 0.3) if has_free_rows else pairs["llama"][1]
    outcome = recycle(Upgrade(old, new), folder, small_task, method, tmp_path / "out", recipe=RECIPE)
    assert "'<own>'" in outcome.record.notes["vocabulary"]
    again = AutoTokenizer.from_pretrained(outcome.path / "adaptation")
    assert again.convert_tokens_to_ids("<own>") == 43
    name = next(name for name in weights(folder) if name.endswith("trainable_tokens_delta"))
    assert torch.equal(weights(outcome.path / "adaptation")[name][1], weights(folder)[name][1])
