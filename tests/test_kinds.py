"""What each kind of adaptation has of its own: heads, bottleneck adapters, prompts, and how it learns."""

import pytest
import torch
from helpers import HEAD, LABELS, write_base, write_upgrade
from safetensors.torch import load_file

from regraft import BottleneckConfig, Recipe, Upgrade, check, load_adaptation, recycle, tune
from regraft.adaptation import KINDS, fresh_model, load_model, new_config, prepare_for_tuning
from regraft.adaptation.bottleneck import attach_bottlenecks
from regraft.errors import MismatchError, RecipeError
from regraft.model import predict

LEARNING_RATES = {"full": 3e-3, **dict.fromkeys(("ia3", "prefix", "prompt", "layernorm"), 0.03)}  # of others: 0.01
FEW = Recipe(steps=4, batch_size=8, learning_rate=3e-3, eval_every=2, precision="fp32")


@pytest.mark.parametrize(
    ("architecture", "kind", "row"),
    [
        ("roberta", "full", "classifier.out_proj.weight"),
        ("llama", "lora", "base_model.model.score.weight"),
        ("bert", "prompt", "base_model.classifier.weight"),
    ],
)
def test_heads_are_resized_by_the_labels_names(
    tmp_path, saved_adaptations, opened_bases, task_file, architecture, kind, row
):
    (tmp_path / "task").mkdir()
    for split in ("train", "dev", "test"):
        text = (task_file.parent / f"{split}.csv").read_text()
        (tmp_path / "task" / f"{split}.csv").write_text(
            text.replace("negative", "worse") + "it was a day,neutral\n" * 4
        )
    task = tmp_path / "task" / "task.yaml"
    task.write_text(task_file.read_text())
    path = saved_adaptations[architecture, kind][0]
    upgrade = Upgrade(*opened_bases[architecture])
    with pytest.raises(MismatchError, match="worse"):
        recycle(upgrade, path, task, "direct", tmp_path / "copy", recipe=FEW)
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    for policy in ("resize", "fresh"):
        with pytest.raises(RecipeError, match="head must be copy"):
            recycle(upgrade, path, task, "init+distill", tmp_path / policy, recipe=FEW, head=policy)
        outcome = recycle(upgrade, path, task, "direct", tmp_path / policy, recipe=FEW, head=policy)
        assert outcome.record.labels == ("neutral", "positive", "worse")
        before, after = load_file(path / file)[row], load_file(outcome.path / "adaptation" / file)[row]
        assert after.shape == (3, before.shape[1])
        assert torch.equal(after[1], before[1]) == (policy == "resize")
        assert not torch.equal(after[2], before[0])
    tuned = recycle(upgrade, path, task, "init", tmp_path / "init", recipe=FEW, head="resize")
    assert tuned.record.cost.steps == 4


def test_labels_in_another_order_are_permuted(tmp_path, saved_adaptations, opened_bases, task_file):
    task = task_file.parent / "other-order.yaml"
    task.write_text(task_file.read_text() + "labels: [positive, negative]\n")
    upgrade = Upgrade(*opened_bases["bert"])
    path = saved_adaptations["bert", "lora"][0]
    as_tuned = recycle(upgrade, path, task_file, "direct", tmp_path / "as-tuned", recipe=FEW)
    permuted = recycle(upgrade, path, task, "direct", tmp_path / "permuted", recipe=FEW)
    assert permuted.scores == as_tuned.scores
    assert permuted.record.labels == LABELS


def test_bottlenecks_begin_as_the_identity_and_tune_what_is_wanted(opened_bases, encoded_dev):
    base = opened_bases["bert"][0]
    bare = predict(fresh_model(base, HEAD, 0), encoded_dev["bert"], "fp32")
    for config, expected in (
        (BottleneckConfig(), 4),
        (BottleneckConfig(placement="pfeiffer", activation="relu"), 2),
        (BottleneckConfig(inner_size=7, tune_norms=True, tune_head=False), 4),
    ):
        model = prepare_for_tuning(fresh_model(base, HEAD, 0), base, HEAD, config, 0)
        assert torch.equal(predict(model, encoded_dev["bert"], "fp32"), bare)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert sum(name.endswith("bottleneck.down.weight") for name in trained) == expected
        assert any("LayerNorm" in name for name in trained) == config.tune_norms
        assert ("classifier.weight" in trained) == config.tune_head
        assert not any("query" in name for name in trained)
    for wrong in ({"inner_size": 0}, {"activation": "tanh"}, {"placement": "everywhere"}):
        with pytest.raises(RecipeError, match=str(next(iter(wrong.values())))):
            BottleneckConfig(**wrong)
    with pytest.raises(MismatchError, match="matches 0 layers"):
        prepare_for_tuning(fresh_model(base, HEAD, 0), base, HEAD, BottleneckConfig(after_attention="nothing"), 0)


@pytest.mark.parametrize(
    "kind", ["deberta-v2", "electra", "gpt2", "gpt_neox", "mistral", "modernbert", "mpnet", "opt", "phi", "qwen3"]
)
def test_bottlenecks_find_their_places_in_other_architectures(kind):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}.get(kind, {})
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(kind, vocab_size=50, pad_token_id=0, **size)
        )
    attach_bottlenecks(model, BottleneckConfig(inner_size=3))
    assert sum(name.endswith("bottleneck.up.weight") for name, _ in model.named_parameters()) == 4


def test_a_prompt_before_a_decoder_reads_the_last_token_whatever_the_padding(
    saved_adaptations, opened_bases, encoded_dev
):
    path, together = saved_adaptations["llama", "prompt"]
    model = load_model(load_adaptation(path), opened_bases["llama"][0], HEAD)
    for i in range(5):
        alone = predict(model, encode_one(encoded_dev["llama"], i), "fp32")
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)


def encode_one(examples, i):
    import dataclasses

    return dataclasses.replace(
        examples, columns={n: [c[i]] for n, c in examples.columns.items()}, targets=examples.targets[i : i + 1]
    )


def test_kinds_that_cannot_be(opened_bases):
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
    old = write_base(tmp_path / "old-base", architecture, initializer_range=0.2)  # heads see more than their own token
    new = write_upgrade(old, tmp_path / "new-base", 0.02)
    rate = LEARNING_RATES.get(kind, 0.01)
    recipe = Recipe(steps=120, batch_size=16, learning_rate=rate, eval_every=20, precision="fp32")
    outcome = tune(old, task_file, tmp_path / "old", kind=kind, recipe=recipe)
    assert outcome.scores["dev"] > outcome.scores["dev_majority"] + 0.1
    checked = check(Upgrade(old, new), outcome.path, task_file, recipe=recipe)
    assert checked.effect > 1e-4
    assert checked.old == outcome.scores["test"]
    assert checked.new > checked.floor


def test_the_command_line_shows_and_converts(tmp_path, saved_adaptations, bases, capsys, monkeypatch):
    from regraft.cli import app

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        assert not ended.value.code
        return " ".join(capsys.readouterr().out.split())

    old = bases["bert"][0]
    output = run("adaptation", "show", saved_adaptations["bert", "bottleneck"][0], "--base", old)
    assert "kind bottleneck" in output
    assert "inner_size 5" in output
    assert "loads wholly, lineage proven" in output
    arguments = ("--old-base", old, "--to", "lora", "--rank", 2, "--out", tmp_path / "lora")
    output = run("adaptation", "convert", saved_adaptations["bert", "full"][0], *arguments)
    assert "of the delta's squared norm preserved" in output
    assert load_adaptation(tmp_path / "lora").config["r"] == 2


@pytest.mark.parametrize("kind", ["bottleneck", "prefix", "prompt", "ia3", "dora", "pissa", "layernorm"])
def test_an_interrupted_tuning_goes_on_to_the_same_weights(tmp_path, bases, task_file, kind):
    recipe = Recipe(steps=9, batch_size=8, learning_rate=3e-3, eval_every=3, save_every=3, precision="fp32")

    class Stopped(Exception):
        pass

    def interrupt(stage, step, total, figures):
        if (stage, step) == ("tune", 7):
            raise Stopped

    with pytest.raises(Stopped):
        tune(bases["bert"][0], task_file, tmp_path / "resumed", kind=kind, recipe=recipe, progress=interrupt)
    assert not (tmp_path / "resumed").exists()
    steps = []
    for name in ("resumed", "uninterrupted"):
        tune(
            bases["bert"][0], task_file, tmp_path / name, kind=kind, recipe=recipe,
            progress=lambda stage, step, *_: steps.append(step) if stage == "tune" else None,
        )  # fmt: skip
    assert steps == [7, 8, 9, *range(1, 10)]
    resumed, uninterrupted = (
        load_file(tmp_path / name / "adaptation" / "adapter_model.safetensors") for name in ("resumed", "uninterrupted")
    )
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
