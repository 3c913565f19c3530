"""Outputs at rows compared with transformers, deployments that run each split once, and task types of plugins."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, LABELS, load_tuned_model, make_config
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from regraft import RegraftError, Task
from regraft.adaptation import load_adaptation, load_model
from regraft.errors import DataError, MismatchError
from regraft.model import Deployment, predict
from regraft.model.outputs import forward
from regraft.progress import quiet
from regraft.task import load_data, score
from regraft.task.types import Examples, TextClassification, task_types
from regraft.task.types.likelihood import CATEGORICAL
from regraft.task.types.token_logits import TokenLogits
from regraft.tuning.units import fresh_scaled_model, restore_output_units, standardised_outputs

TOKENS = [[1, 7, 8, 9, 2], [1, 5, 2], [1, 6, 7, 8, 9, 10, 11, 2]]
ROW_TOKENS = [[1, 3], [], [4, 1, 6]]


def make_examples(num_classes):
    """Build three examples with a row at each of `ROW_TOKENS`."""
    targets = np.arange(sum(map(len, ROW_TOKENS)), dtype=np.int64) % num_classes
    return Examples({"input_ids": TOKENS}, targets, {"input_ids": 0}, ROW_TOKENS)


@pytest.mark.parametrize(
    ("architecture", "has_prefix"),
    # DistilBERT supports no prefix
    [
        (name, has_prefix)
        for name in ARCHITECTURES
        for has_prefix in ([False] if name == "distilbert" else [False, True])
    ],
)
def test_outputs_at_rows_equal_the_outputs_of_a_token_classifier(architecture, has_prefix):
    from peft import PrefixTuningConfig, get_peft_model

    model = AutoModelForTokenClassification.from_config(make_config(architecture, num_labels=3)).eval()
    if has_prefix:
        with quiet():
            model = get_peft_model(model, PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=4)).eval()
    check_rows(model, 3)


@pytest.mark.parametrize("num_virtual_tokens", [0, 3])
def test_outputs_at_rows_equal_the_outputs_of_a_language_model(num_virtual_tokens):
    from peft import PromptTuningConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(make_config("llama")).eval()
    if num_virtual_tokens:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
        with quiet():
            model = get_peft_model(model, config).eval()
    check_rows(model, model.config.vocab_size, num_virtual_tokens)


def as_dense(logits):
    """Return logits as a tensor, those of a language model too."""
    return logits.dense() if isinstance(logits, TokenLogits) else logits


def check_rows(model, num_classes, num_virtual_tokens=0):
    """Compare logits and gradients of a batch with a forward pass over each example alone."""
    examples = make_examples(num_classes)
    indices = [2, 0, 1]
    batch = examples.batch(indices)
    output = forward(model, batch)
    logits = as_dense(output.logits)
    example_logits = [model(input_ids=torch.tensor([ids])).logits[0][num_virtual_tokens:] for ids in TOKENS]
    row_logits = [logits[tokens] for logits, tokens in zip(example_logits, ROW_TOKENS, strict=True)]
    expected = torch.cat([row_logits[i] for i in indices])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert batch["row"].tolist() == [2, 3, 4, 0, 1]
    assert batch["targets"].tolist() == examples.targets[[2, 3, 4, 0, 1]].tolist()
    torch.testing.assert_close(as_dense(predict(model, examples, "fp32")), torch.cat(row_logits))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, expected_gradients = (
        torch.autograd.grad(CATEGORICAL.loss(outputs, batch["targets"], "mean"), parameters, allow_unused=True)
        for outputs in (logits, expected)
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_hidden_states_at_rows_equal_the_states_of_transformers():
    model = AutoModelForTokenClassification.from_config(make_config("bert", num_labels=3)).eval()
    states = forward(model, make_examples(3).batch([0, 2]), hidden=True).row_states()
    for row, (example, token) in enumerate([(0, 1), (0, 3), (2, 4), (2, 1), (2, 6)]):
        layers = model(input_ids=torch.tensor([TOKENS[example]]), output_hidden_states=True).hidden_states
        expected = torch.stack([layer[0, token] for layer in layers[:-1]])
        torch.testing.assert_close(states[row], expected, rtol=1e-4, atol=1e-5)


def test_selected_examples_keep_their_rows():
    selected = make_examples(3).take([2, 1])
    assert selected.tokens == [[4, 1, 6], []]
    assert selected.targets.tolist() == [2, 0, 1]
    assert selected.lengths.tolist() == [8, 3]
    assert selected.rows([1, 0]).tolist() == [0, 1, 2]


def test_a_deployment_runs_each_split_once(opened_bases, tuned_outcomes, task_file):
    base = opened_bases["bert"][0]
    data = load_data(task_file, 20).relabel(LABELS)
    model = load_model(load_adaptation(tuned_outcomes["bert", "lora"]), base, data.head)
    num_batches = 0

    def count_batch(module, inputs):
        nonlocal num_batches
        num_batches += 1

    model.register_forward_pre_hook(count_batch)
    deployment = Deployment(model, base, data, "fp32")
    logits = deployment.outputs(data.dev)
    dev_batches = num_batches
    predictions = deployment.predictions(data.dev)
    assert predictions == logits.argmax(dim=1).tolist()
    is_right = [prediction == label for prediction, label in zip(predictions, data.dev.labels, strict=True)]
    assert deployment.right(data.dev) == is_right
    assert deployment.score(data.dev) == score("accuracy", data.dev.labels, logits.argmax(dim=1)) == np.mean(is_right)
    assert deployment.loss(data.dev) == pytest.approx(float(deployment.losses(data.dev).mean()))
    assert deployment.confidence(data.dev) == pytest.approx(logits.softmax(dim=1).max(dim=1).values.tolist())
    overlap, divergence = deployment.similarity_to(data.dev, deployment.signal(data.dev))
    assert (overlap, divergence) == (pytest.approx(1), pytest.approx(0, abs=1e-7))
    assert num_batches == dev_batches
    deployment.clear_outputs()
    deployment.outputs(data.dev)
    assert num_batches == 2 * dev_batches
    mismatched = Deployment(model, base, dataclasses.replace(data, labels=(*LABELS, "mixed")), "fp32")
    with pytest.raises(MismatchError, match="2 outputs, task 'mood' 3 labels"):
        mismatched.outputs(data.dev)


def test_an_installed_package_can_add_a_task_type(tmp_path, monkeypatch, task_file):
    code = (
        "from typing import Literal\nfrom regraft.task import TextClassification\n"
        "class Stance(TextClassification):\n    type: Literal['stance'] = 'stance'\nNAME = 'no task type'\n"
    )
    (tmp_path / "stances.py").write_text(code)
    metadata = tmp_path / "stances-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stances\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)

    def declare_entry_point(entry):
        (metadata / "entry_points.txt").write_text(f"[regraft.task_types]\n{entry}\n")
        importlib.invalidate_caches()
        task_types.cache_clear()

    plain = load_data(task_file, 20)
    file = task_file.with_name("stance.yaml")
    file.write_text(f"type: stance\n{task_file.read_text()}")
    try:
        declare_entry_point("stance = stances:Stance")
        data = load_data(file, 20)
        assert data.task.type == "stance"
        assert data.train.inputs == plain.train.inputs
        assert data.digest() != plain.digest()  # the digest covers the type of the task
        for entry, message in (
            ("stance = stances:Nobody", "'stance' of stances cannot be loaded"),
            ("stance = stances:NAME", "is 'no task type', not a subclass of regraft.Task"),
            (
                "plain = regraft.task:TextClassification",
                "defines a task type 'text-classification', which already exists",
            ),
        ):
            declare_entry_point(entry)
            with pytest.raises(DataError, match=message):
                Task.load(task_file)
    finally:
        monkeypatch.undo()
        task_types.cache_clear()
    with pytest.raises(RegraftError, match=r"there is no task type 'stance'\. The types are: .*'text-classification'"):
        Task.load(file)
    file.write_text(f"type: text_classification\n{task_file.read_text()}")
    with pytest.raises(RegraftError, match="Did you mean 'text-classification'"):
        Task.load(file)
    assert "stance" not in task_types()
    assert task_types()["text-classification"] is TextClassification


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("kind", ["full", "lora", "bottleneck"])
def test_standardised_outputs_keep_predictions_and_units_are_restored(
    saved_adaptations, opened_bases, task_file, encoded_dev, monkeypatch, architecture, kind
):
    """The head has one layer (bert), two (roberta), or one without a bias (llama)."""
    folder, logits = saved_adaptations[architecture, kind]
    base = opened_bases[architecture][0]
    data = load_data(task_file, 20)
    model = load_tuned_model(folder, base, trainable=True)
    stored = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mean, scale = 3.0, 8.0
    monkeypatch.setattr(TextClassification, "target_scaling", lambda self, targets: (mean, scale))
    with standardised_outputs(model, base, data):
        changed = {name for name, parameter in model.named_parameters() if not parameter.equal(stored[name])}
        assert torch.allclose(predict(model, encoded_dev[architecture], "fp32"), logits, atol=1e-5)
    has_bias = architecture != "llama"
    assert {name.rpartition(".")[2] for name in changed} == ({"weight", "bias"} if has_bias else {"weight"})
    assert all("classifier" in name or "score" in name for name in changed)
    assert torch.allclose(predict(model, encoded_dev[architecture], "fp32"), logits, atol=1e-5)
    restore_output_units(model, base, data)
    expected = scale * logits + (mean if has_bias else 0)
    assert torch.allclose(predict(model, encoded_dev[architecture], "fp32"), expected, atol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_fresh_head_starts_from_the_mean_of_the_targets(opened_bases, task_file, monkeypatch, architecture):
    """Without a bias (llama), weights whose outputs are nearly constant stand for it."""
    base = opened_bases[architecture][0]
    data = load_data(task_file, 20)
    monkeypatch.setattr(TextClassification, "target_scaling", lambda self, targets: (30.0, 8.0))
    model = fresh_scaled_model(base, data, 0)
    logits = Deployment(model, base, data, "bf16").outputs(data.dev)
    assert torch.allclose(logits.mean(dim=0), torch.tensor(30.0), atol=4)
    for mean, scale in ((2000.0, 8.0), (0.25, 1e-4)) if architecture == "llama" else ():
        monkeypatch.setattr(TextClassification, "target_scaling", lambda self, targets, both=(mean, scale): both)
        with pytest.raises(MismatchError, match=f"Subtract {mean:g} from all targets"):
            fresh_scaled_model(base, data, 0)
