"""Properties of single kinds of adaptation: heads, bottleneck adapters, prompts, and learning."""

import dataclasses

import pytest
import torch
from helpers import (
    FEW_STEPS,
    HEAD,
    LABELS,
    NINE_STEPS,
    InterruptedRunError,
    have_equal_tensors,
    interrupt_at,
    load_tuned_model,
    read_weights,
    run_command,
    write_base,
    write_upgrade,
)
from safetensors.torch import load_file

from regraft import BottleneckConfig, Recipe, Upgrade, check, load_adaptation, recycle, tune
from regraft.adaptation import KINDS, fresh_model, new_config, prepare_for_tuning
from regraft.adaptation.bottleneck import attach_bottlenecks
from regraft.errors import MismatchError, RecipeError
from regraft.model import predict

# with these and the default, each kind learns the task in 120 steps
LEARNING_RATES = {"full": 3e-3, **dict.fromkeys(("ia3", "prefix", "prompt", "layernorm"), 0.03)}
DEFAULT_LEARNING_RATE = 0.01


@pytest.mark.parametrize(
    ("architecture", "kind", "weight"),
    [
        ("roberta", "full", "classifier.out_proj.weight"),
        ("llama", "lora", "base_model.model.score.weight"),
        ("bert", "prompt", "base_model.classifier.weight"),
    ],
)
def test_heads_are_resized_by_the_names_of_labels(
    tmp_path, saved_adaptations, opened_bases, task_file, architecture, kind, weight
):
    (tmp_path / "task").mkdir()
    for split in ("train", "dev", "test"):
        text = (task_file.parent / f"{split}.csv").read_text().replace("negative", "worse")
        (tmp_path / "task" / f"{split}.csv").write_text(text + "it was a day,neutral\n" * 4)
    task = tmp_path / "task" / "task.yaml"
    task.write_text(task_file.read_text())
    path = saved_adaptations[architecture, kind][0]
    upgrade = Upgrade(*opened_bases[architecture])
    with pytest.raises(MismatchError, match="worse"):
        recycle(upgrade, path, task, "direct", tmp_path / "copy", recipe=FEW_STEPS)
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    for policy in ("resize", "fresh"):
        with pytest.raises(RecipeError, match="head must be copy"):
            recycle(upgrade, path, task, "init+distill", tmp_path / policy, recipe=FEW_STEPS, head=policy)
        outcome = recycle(upgrade, path, task, "direct", tmp_path / policy, recipe=FEW_STEPS, head=policy)
        assert outcome.record.labels == ("neutral", "positive", "worse")
        before, after = load_file(path / file)[weight], load_file(outcome.path / "adaptation" / file)[weight]
        assert after.shape == (3, before.shape[1])
        assert torch.equal(after[1], before[1]) == (policy == "resize")
        assert not torch.equal(after[2], before[0])
    tuned = recycle(upgrade, path, task, "init", tmp_path / "init", recipe=FEW_STEPS, head="resize")
    assert tuned.record.cost.steps == 4


def test_labels_in_a_different_order_are_permuted(tmp_path, saved_adaptations, opened_bases, task_file):
    task = task_file.parent / "other-order.yaml"
    task.write_text(task_file.read_text() + "labels: [positive, negative]\n")
    upgrade = Upgrade(*opened_bases["bert"])
    path = saved_adaptations["bert", "lora"][0]
    as_tuned = recycle(upgrade, path, task_file, "direct", tmp_path / "as-tuned", recipe=FEW_STEPS)
    permuted = recycle(upgrade, path, task, "direct", tmp_path / "permuted", recipe=FEW_STEPS)
    assert permuted.scores == as_tuned.scores
    assert permuted.record.labels == LABELS


def test_bottlenecks_start_as_the_identity_and_tune_the_parameters_of_their_config(opened_bases, encoded_dev):
    base = opened_bases["bert"][0]
    bare = predict(fresh_model(base, HEAD, 0), encoded_dev["bert"], "fp32")
    for config, num_bottlenecks in (
        (BottleneckConfig(), 4),
        (BottleneckConfig(placement="pfeiffer", activation="relu"), 2),
        (BottleneckConfig(inner_size=7, tune_norms=True, tune_head=False), 4),
    ):
        model = prepare_for_tuning(fresh_model(base, HEAD, 0), base, HEAD, config, 0)
        assert torch.equal(predict(model, encoded_dev["bert"], "fp32"), bare)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert sum(name.endswith("bottleneck.down.weight") for name in trained) == num_bottlenecks
        assert any("LayerNorm" in name for name in trained) == config.tune_norms
        assert ("classifier.weight" in trained) == config.tune_head
        assert not any("query" in name for name in trained)
    for field, value in (("inner_size", 0), ("activation", "tanh"), ("placement", "everywhere")):
        with pytest.raises(RecipeError, match=str(value)):
            BottleneckConfig(**{field: value})
    with pytest.raises(MismatchError, match="matches 0 layers"):
        prepare_for_tuning(fresh_model(base, HEAD, 0), base, HEAD, BottleneckConfig(after_attention="nothing"), 0)


@pytest.mark.parametrize(
    "architecture",
    ["deberta-v2", "electra", "gpt2", "gpt_neox", "mistral", "modernbert", "mpnet", "opt", "phi", "qwen3"],
)
def test_bottlenecks_find_their_layers_in_further_architectures(architecture):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if architecture == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
    config = AutoConfig.for_model(architecture, vocab_size=50, pad_token_id=0, **sizes)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    attach_bottlenecks(model, BottleneckConfig(inner_size=3))
    assert sum(name.endswith("bottleneck.up.weight") for name, _ in model.named_parameters()) == 4


def test_a_decoder_with_a_prompt_reads_the_last_token_whatever_the_padding(
    saved_adaptations, opened_bases, encoded_dev
):
    path, batch_logits = saved_adaptations["llama", "prompt"]
    model = load_tuned_model(path, opened_bases["llama"][0])
    for i in range(5):
        logits = predict(model, take_example(encoded_dev["llama"], i), "fp32")
        torch.testing.assert_close(logits[0], batch_logits[i], atol=1e-5, rtol=1e-4)


def take_example(examples, i):
    columns = {name: [column[i]] for name, column in examples.columns.items()}
    return dataclasses.replace(examples, columns=columns, targets=examples.targets[i : i + 1])


def test_unknown_and_unsuitable_kinds_are_refused(opened_bases):
    with pytest.raises(RecipeError, match="Did you mean 'lora'"):
        new_config("loora", opened_bases["bert"][0], HEAD)
    with pytest.raises(RecipeError, match="take no prefix"):
        new_config("prefix", opened_bases["distilbert"][0], HEAD)
    with pytest.raises(RecipeError, match="leave no room"):
        new_config("prompt", opened_bases["bert"][0], HEAD, virtual_tokens=100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*(("bert", kind) for kind in KINDS), ("llama", "bottleneck"), ("roberta", "prefix")],
)
def test_every_kind_learns_and_is_checked(tmp_path, task_file, architecture, kind):
    # larger weights than the default, so that attention looks beyond the token itself
    old = write_base(tmp_path / "old-base", architecture, initializer_range=0.2)
    new = write_upgrade(old, tmp_path / "new-base", 0.02)
    rate = LEARNING_RATES.get(kind, DEFAULT_LEARNING_RATE)
    recipe = Recipe(steps=120, batch_size=16, learning_rate=rate, eval_every=20, precision="fp32")
    outcome = tune(old, task_file, tmp_path / "old", kind=kind, recipe=recipe)
    assert outcome.scores["dev"] > outcome.scores["dev_majority"] + 0.1
    checked = check(Upgrade(old, new), outcome.path, task_file, recipe=recipe)
    assert checked.effect > 1e-4
    assert checked.old == outcome.scores["test"]
    assert checked.new > checked.floor


def test_commands_show_and_convert_adaptations(tmp_path, saved_adaptations, bases):
    old = bases["bert"][0]
    output = " ".join(
        run_command("adaptation", "show", saved_adaptations["bert", "bottleneck"][0], "--base", old).split()
    )
    assert "kind bottleneck" in output
    assert "inner_size 5" in output
    assert "loads wholly, lineage proven" in output
    arguments = ("--old-base", old, "--to", "lora", "--rank", 2, "--out", tmp_path / "lora")
    output = " ".join(run_command("adaptation", "convert", saved_adaptations["bert", "full"][0], *arguments).split())
    assert "of the delta's squared norm preserved" in output
    assert load_adaptation(tmp_path / "lora").config["r"] == 2


@pytest.mark.parametrize("kind", ["bottleneck", "prefix", "prompt", "ia3", "dora", "pissa", "layernorm"])
def test_an_interrupted_tuning_resumes_to_the_same_weights(tmp_path, bases, task_file, kind):
    base = bases["bert"][0]
    steps = []

    def record_step(stage, step, total, figures):
        if stage == "tune":
            steps.append(step)

    with pytest.raises(InterruptedRunError):
        tune(base, task_file, tmp_path / "resumed", kind=kind, recipe=NINE_STEPS, progress=interrupt_at("tune", 7))
    assert not (tmp_path / "resumed").exists()
    for name in ("resumed", "uninterrupted"):
        tune(base, task_file, tmp_path / name, kind=kind, recipe=NINE_STEPS, progress=record_step)
    assert steps == [7, 8, 9, *range(1, 10)]
    resumed, uninterrupted = (read_weights(tmp_path / name / "adaptation") for name in ("resumed", "uninterrupted"))
    assert have_equal_tensors(resumed, uninterrupted)
