"""Tests of `ariadne` against a dense second implementation, and of its limits."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    GROUPED,
    SIZES,
    assert_mentions,
    make_adapted_model,
    make_sentence,
    make_tokenizer,
    read_weights,
    write_base,
    write_sentences,
    write_upgrade,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from regraft import Base, Recipe, Upgrade, recycle
from regraft.adaptation import save_model
from regraft.errors import KindError, RecipeError, RegraftError
from regraft.methods.ariadne import Ariadne
from regraft.model.examples import encode
from regraft.progress import quiet
from regraft.task import load_data
from regraft.tuning import learning_rate

CONFIGS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=SIZES["vocab_size"], n_positions=66, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    ),
    "gemma2": lambda: Gemma2Config(**SIZES, **GROUPED),
}
PROJECTIONS = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}
RECIPE = Recipe(precision="fp32")


def write_decoder(folder, architecture):
    """Write a small decoder with random weights."""
    if architecture == "llama":
        return write_base(folder, "llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[architecture]()).save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return folder


def write_prompts(folder):
    """Write a task of text generation, scored by its loss, so that no answers have to be generated."""
    rng = random.Random(0)
    for split, count in (("train", 60), ("dev", 6)):
        rows = []
        for index in range(count):
            answer = (" good", " bad")[index % 2]
            rows.append(json.dumps({"prompt": make_sentence(rng, index % 2 == 0), "completion": answer}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    file = folder / "task.yaml"
    file.write_text("type: text-generation\ntrain: train.jsonl\ndev: dev.jsonl\nmetric: loss\n")
    return file


def write_tuned(base, kind, task, folder):
    """Write an adaptation of a decoder whose every tuned number is moved."""
    head = load_data(task, 0).head
    model, start = make_adapted_model(Base.open(base), kind, head)
    folder.mkdir()
    save_model(model, Base.open(base), head, folder, start)
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def setting(request, tmp_path_factory):
    """An architecture with an old base, a new base and a task."""
    return request.param, *write_inputs(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """An old base, a new base, a LoRA on the old base, and a task."""
    folder = tmp_path_factory.mktemp("inputs")
    old, new, task = write_inputs(folder, "llama")
    return old, new, write_tuned(old, "lora", task, folder / "tuned"), task


def write_inputs(folder, architecture):
    """Write an old base, a new base and a task."""
    old = write_decoder(folder / "old", architecture)
    return old, write_upgrade(old, folder / "new", 0.2), write_prompts(folder)


def capture(model, blocks, projections, texts):
    """Run a model in float64 on one text after another; return states after the blocks and inputs of projections."""
    states = [[] for _ in blocks]
    inputs = [[] for _ in blocks]
    model.double().eval()
    for index, (block, projection) in enumerate(zip(blocks, projections, strict=True)):
        block.register_forward_hook(
            lambda _m, _a, output, index=index: states[index].append(
                (output[0] if isinstance(output, tuple) else output).reshape(-1, 32).numpy()
            )
        )
        projection.register_forward_pre_hook(
            lambda _m, args, index=index: inputs[index].append(args[0].reshape(-1, args[0].shape[-1]).numpy())
        )
    with torch.no_grad():
        for ids in texts:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return [np.concatenate(rows) for rows in states], [np.concatenate(rows) for rows in inputs]


def fit_densely(architecture, old, tuned, new, task, num_texts=256):
    """Compute the changes of each block's weight and bias from all rows at once, with the penalty as further rows."""
    data = load_data(task, 0)
    texts = encode(Base.open(old), data, data.train).columns["input_ids"][:num_texts]
    runs = []
    for folder in (old, tuned, new):
        is_adapter = (folder / "adapter_config.json").exists()
        model = AutoModelForCausalLM.from_pretrained(old if is_adapter else folder, dtype="float32")
        body = model.model.layers if architecture == "llama" else model.transformer.h
        projections = [model.get_submodule(PROJECTIONS[architecture].format(i)) for i in range(len(body))]
        if is_adapter:
            with quiet():
                model = PeftModel.from_pretrained(model, folder)
            name = f"base_model.model.{PROJECTIONS[architecture]}"
            projections = [model.get_submodule(name.format(i)) for i in range(len(body))]
        runs.append(capture(model, list(body), projections, texts))
    (old_states, _), (tuned_states, _), (new_states, inputs) = runs
    fits = []
    for s_b, s_f, t_b, h in zip(old_states, tuned_states, new_states, inputs, strict=True):
        u, _, vt = np.linalg.svd((s_b - s_b.mean(0)).T @ (t_b - t_b.mean(0)))
        d = (s_f - s_b) @ u @ vt
        h_mean, d_mean = (h.mean(0), d.mean(0)) if architecture == "gpt2" else (0 * h[0], 0 * d[0])
        damping = np.square(h - h_mean).sum() / (len(h) - 1)
        rows = np.concatenate([h - h_mean, np.sqrt(damping) * np.eye(h.shape[1])])
        targets = np.concatenate([d - d_mean, np.zeros((h.shape[1], d.shape[1]))])
        weight = np.linalg.lstsq(rows, targets)[0]
        error = np.square((h - h_mean) @ weight - (d - d_mean)).sum()
        fits.append((weight, d_mean - h_mean @ weight, error, np.square(d - d_mean).sum(), u @ vt))
    return fits


def read_change(outcome, base):
    """Return the change of each parameter in an outcome, and the parameters that are not equal to the base's."""
    before, after = read_weights(base), read_weights(outcome.path / "adaptation")
    assert before.keys() == after.keys()
    return {
        name: (after[name] - before[name]).double().numpy() for name in before if not after[name].equal(before[name])
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_change_equals_a_dense_fit(setting, kind, tmp_path):
    architecture, old, new, task = setting
    tuned = write_tuned(old, kind, task, tmp_path / "tuned")
    outcome = recycle(Upgrade(old, new), tuned, task, "ariadne", tmp_path / "out", recipe=RECIPE)
    assert outcome.record.kind == "full"
    fits = fit_densely(architecture, old, tuned, new, task)
    changes = read_change(outcome, new)
    suffixes = ("weight", "bias") if architecture == "gpt2" else ("weight",)
    names = [f"{PROJECTIONS[architecture].format(i)}.{suffix}" for i in range(2) for suffix in suffixes]
    assert sorted(changes) == sorted(names)
    for index, (weight, bias, *_) in enumerate(fits):
        name = PROJECTIONS[architecture].format(index)
        expected = weight if architecture == "gpt2" else weight.T
        np.testing.assert_allclose(changes[f"{name}.weight"], expected, atol=2e-4 * np.abs(expected).max())
        if architecture == "gpt2":
            np.testing.assert_allclose(changes[f"{name}.bias"], bias, atol=2e-4 * np.abs(bias).max())
    explained = 1 - sum(fit[2] for fit in fits) / sum(fit[3] for fit in fits)
    assert outcome.record.notes["explained"] == pytest.approx(explained, abs=1e-4)


def test_the_outcome_loads_in_transformers(setting, tmp_path):
    _, old, new, task = setting
    tuned = write_tuned(old, "lora", task, tmp_path / "tuned")
    outcome = recycle(Upgrade(old, new), tuned, task, "ariadne", tmp_path / "out", recipe=RECIPE)
    model, report = AutoModelForCausalLM.from_pretrained(outcome.path / "adaptation", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    data = load_data(task, 0)
    examples = encode(Base.open(new), data, data.dev)
    loss = 0.0
    for index in range(len(data.dev)):
        batch = examples.batch([index])
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0, batch["token"]]
        loss += torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum").item()
    assert outcome.record.scores.dev == pytest.approx(loss / len(examples.targets), rel=1e-4)


def test_on_an_equal_base_the_old_effect_is_fitted(setting, tmp_path):
    architecture, old, _, task = setting
    tuned = write_tuned(old, "full", task, tmp_path / "tuned")
    shutil.copytree(old, tmp_path / "new")
    outcome = recycle(Upgrade(old, tmp_path / "new"), tuned, task, "ariadne", tmp_path / "out", recipe=RECIPE)
    for *_, error, target, q in fit_densely(architecture, old, tuned, old, task):
        np.testing.assert_allclose(q, np.eye(32), atol=1e-6)
        assert error < target
    assert 0.05 < outcome.record.notes["explained"] < 1


def test_a_rotated_base_gets_the_rotated_change(tmp_path):
    """A Llama whose norms have no weights computes the same in any orthogonal basis of its residual stream."""
    old = write_decoder(tmp_path / "old", "llama")
    task = write_prompts(tmp_path)
    tuned = write_tuned(old, "lora", task, tmp_path / "tuned")
    same = shutil.copytree(old, tmp_path / "same")
    new = shutil.copytree(old, tmp_path / "new")
    r = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    tensors = load_file(old / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = (r.T @ tensor.double()).float()
        elif tensor.dim() == 2:
            tensors[name] = (tensor.double() @ r).float()
        else:
            assert tensor.eq(1).all()  # a norm
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    in_old_basis, in_new_basis = (
        recycle(Upgrade(old, base), tuned, task, "ariadne", tmp_path / f"out-{base.name}", recipe=RECIPE)
        for base in (same, new)
    )
    changes, rotated_changes = read_change(in_old_basis, old), read_change(in_new_basis, new)
    assert changes.keys() == rotated_changes.keys()
    for name, change in changes.items():
        expected = r.T.numpy() @ change
        np.testing.assert_allclose(rotated_changes[name], expected, atol=1e-3 * np.abs(expected).max())
    assert in_new_basis.record.scores.dev == pytest.approx(in_old_basis.record.scores.dev, rel=1e-4)


def test_fewer_texts_are_the_first_texts(inputs, tmp_path):
    old, new, tuned, task = inputs
    options = Ariadne(texts=20)
    outcome = recycle(Upgrade(old, new), tuned, task, "ariadne", tmp_path / "out", recipe=RECIPE, options=options)
    (weight, *_), _ = fit_densely("llama", old, tuned, new, task, options.texts)
    change = read_change(outcome, new)[f"{PROJECTIONS['llama'].format(0)}.weight"]
    np.testing.assert_allclose(change, weight.T, atol=5e-4 * np.abs(weight).max())
    with pytest.raises(RecipeError, match="texts must be at least 1"):
        Ariadne(texts=0)


def test_it_is_a_start_of_full_tuning(inputs, tmp_path):
    old, new, tuned, task = inputs
    upgrade = Upgrade(old, new)
    start = recycle(upgrade, tuned, task, "ariadne", tmp_path / "start", recipe=RECIPE)
    recipe = Recipe(steps=2, eval_every=1, precision="fp32")
    outcome = recycle(upgrade, tuned, task, "ariadne+labels", tmp_path / "out", recipe=recipe)
    assert outcome.record.kind == "full"
    assert outcome.record.recipe["learning_rate"] == learning_rate("full", load_data(task, 0).task)
    assert outcome.record.scores.dev_at_start == pytest.approx(start.record.scores.dev, rel=1e-4)
    assert outcome.record.scores.dev < start.record.scores.dev
    assert len(read_change(outcome, new)) > len(read_change(start, new))
    distilled = recycle(upgrade, tuned, task, "ariadne+distill", tmp_path / "distilled", recipe=recipe)
    assert distilled.record.scores.dev < start.record.scores.dev
    with pytest.raises(KindError, match="the start made a full fine-tune"):
        recycle(upgrade, tuned, task, "ariadne+interpolation", tmp_path / "line", recipe=recipe)
    with pytest.raises(RecipeError, match="ariadne makes a full fine-tune, which is served alone"):
        recycle(upgrade, tuned, task, "ariadne", tmp_path / "served", recipe=RECIPE, served_base="org/model")


def test_other_tasks_and_encoders_are_refused(inputs, tmp_path):
    old, new, tuned, task = inputs
    write_sentences(tmp_path / "train.csv", 20, 0)
    classification = tmp_path / "task.yaml"
    classification.write_text("train: train.csv\ndev: train.csv\ntext: text\nlabel: label\n")
    with pytest.raises(RecipeError) as error:
        recycle(Upgrade(old, new), tuned, classification, "ariadne", tmp_path / "out")
    assert_mentions(error, "ariadne", "text generation", "text-classification")
    encoder = write_base(tmp_path / "encoder", "bert")
    with pytest.raises(RegraftError) as error:
        recycle(Upgrade(encoder, encoder), tuned, task, "ariadne", tmp_path / "out")
    assert_mentions(error, "encoder")


def test_virtual_tokens_are_refused(inputs, tmp_path):
    old, new, _, task = inputs
    tuned = write_tuned(old, "prompt", task, tmp_path / "tuned")
    with pytest.raises(KindError) as error:
        recycle(Upgrade(old, new), tuned, task, "ariadne", tmp_path / "out", recipe=RECIPE)
    assert_mentions(error, tuned, "a prompt has virtual tokens", "direct")


def test_added_tokens_are_refused(inputs, tmp_path):
    old, new, _, task = inputs
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens(["<end>"])
    model = AutoModelForCausalLM.from_pretrained(old)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tuned")
    with pytest.raises(KindError) as error:
        recycle(Upgrade(old, new), tmp_path / "tuned", task, "ariadne", tmp_path / "out", recipe=RECIPE)
    assert_mentions(error, tmp_path / "tuned", f"tokens that {old} lacks", "direct")


def test_a_norm_after_the_projection_is_refused(tmp_path):
    old = write_decoder(tmp_path / "old", "gemma2")
    new = write_upgrade(old, tmp_path / "new", 0.02)
    task = write_prompts(tmp_path)
    tuned = write_tuned(old, "lora", task, tmp_path / "tuned")
    with pytest.raises(KindError) as error:
        recycle(Upgrade(old, new), tuned, task, "ariadne", tmp_path / "out", recipe=RECIPE)
    assert_mentions(error, "model.layers.0", "mlp.down_proj", "ridge")
