"""LoRAs merged into a base and drawn out of a fine-tune, as PEFT and transformers see them."""

import json

import pytest
import torch
from conftest import HEAD, LABELS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from regraft import Base, load_adaptation
from regraft.adaptation import extract_lora, load_model, lora_settings, merge_lora, write_lora
from regraft.checkpoint import Checkpoint
from regraft.cli import app
from regraft.errors import CheckpointError, MismatchError, OutcomeError, RecipeError
from regraft.progress import quiet

ARCHITECTURES = ("bert", "roberta", "distilbert", "llama")
IDS = torch.tensor([[7, 9, 12, 20, 8], [11, 30, 6, 15, 22]])


def invoke(*arguments):
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["weights", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_fine_tune_that_changed_in_one_number_is_another(tmp_path):
    sides = {"old": torch.zeros(64, 64), "tuned": torch.randn(64, 64)}
    for side, weight in sides.items():
        (tmp_path / side).mkdir()
        save_file({"layer.weight": weight}, tmp_path / side / "model.safetensors")
    given = "extract-lora", "--tuned", tmp_path / "tuned", "--old", tmp_path / "old", "--rank", 2, "--out"
    invoke(*given, tmp_path / "out")
    sides["tuned"][1, 3] += 1  # between the places of which a fingerprint hashes a sample
    save_file({"layer.weight": sides["tuned"]}, tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(OutcomeError, match="made from something else"):
        invoke(*given, tmp_path / "out")


def logits(model):
    model.config.pad_token_id = 0
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_lora_is_the_model_it_was(tmp_path, bases, tuned, architecture):
    base, adaptation = Base.open(bases[architecture][0]), load_adaptation(tuned[architecture, "lora"])
    invoke("merge-lora", "--adapter", adaptation.path, "--base", base.path, "--out", tmp_path / "out")
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] | report["mismatched_keys"]
    assert report["unexpected_keys"] <= Checkpoint.open(base.path).tensors.keys()  # the head of its pre-training
    assert tuple(model.config.id2label[i] for i in range(2)) == LABELS
    torch.testing.assert_close(logits(model), logits(load_model(adaptation, base, HEAD)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 5, "layer.1.output.dense": 1}},
    ],
    ids=["rslora", "dora", "patterns"],
)
def test_relatives_are_merged_as_peft_does(tmp_path, bases, given):
    base = bases["bert"][0]
    torch.manual_seed(0)
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(base, dtype="float32")
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=4,
            lora_alpha=6,
            target_modules=["query", "output.dense"],
            modules_to_save=["pooler"],
            **given,
        )
        model = get_peft_model(plain, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
    adapter, source = Checkpoint.open(tmp_path / "adapter"), Checkpoint.open(base)
    merged = merge_lora(adapter, lora_settings(tmp_path / "adapter"), source).tensors
    wanted = model.merge_and_unload().state_dict()
    assert wanted.keys() <= merged.keys()
    compared = 0
    for name, tensor in wanted.items():
        tensor = merged[name]
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-5)
        compared += not torch.equal(tensor, source[name]) if name in source else 0
    assert compared == 6


def test_a_layer_that_keeps_its_weight_turned(tmp_path):
    """GPT-2's Conv1D holds [in, out]."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    plain = GPT2ForSequenceClassification(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, pad_token_id=0))
    plain.save_pretrained(tmp_path / "base")
    with quiet():
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = get_peft_model(plain, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
    merged = merge_lora(
        Checkpoint.open(tmp_path / "adapter"), lora_settings(tmp_path / "adapter"), Checkpoint.open(tmp_path / "base")
    ).tensors
    wanted = model.merge_and_unload().state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(merged[name], wanted[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_lora_of_full_rank_is_the_fine_tune_in_its_linear_layers(tmp_path, bases, tuned, architecture):
    old, source = bases[architecture][0], tuned[architecture, "full"] / "adaptation"
    found = extract_lora(Checkpoint.open(source), Checkpoint.open(old), energy=1.0)
    assert found.kept + found.left_out == pytest.approx(1)
    write_lora(found, tmp_path / "lora", str(old), source, {})
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(old, num_labels=2, dtype="float32")
        model = PeftModel.from_pretrained(plain, tmp_path / "lora").merge_and_unload()
    fine_tune, state = Checkpoint.open(source), model.state_dict()
    linear = [
        name for name in fine_tune if f"base_model.model.{name.removesuffix('weight')}lora_A.weight" in found.tensors
    ]
    assert len(linear) >= 12
    for name in linear:
        torch.testing.assert_close(state[name], fine_tune[name], atol=1e-5, rtol=1e-4)
    for name in ("classifier.weight", "score.weight", "pre_classifier.weight"):
        if name in fine_tune:
            assert torch.equal(state[name], fine_tune[name])


def test_the_rank_bounds_the_error(tmp_path, bases, tuned):
    old, source = (Checkpoint.open(p) for p in (bases["bert"][0], tuned["bert", "full"] / "adaptation"))
    kept = [extract_lora(source, old, rank=rank).kept for rank in (1, 4, 16)]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] < 1
    some = extract_lora(source, old, energy=0.8)
    assert {len(t) for n, t in some.tensors.items() if "lora_A" in n} > {some.config["r"]}
    write_lora(some, tmp_path / "some", "base", tmp_path, {})
    merged = merge_lora(Checkpoint.open(tmp_path / "some"), some.config, old).tensors
    for name in (n for n in merged if n in old and n in source and "dense.weight" in n):
        change, wanted = merged[name].double() - old[name].double(), source[name].double() - old[name].double()
        assert (change - wanted).square().sum() <= 0.2 * wanted.square().sum() + 1e-9


def test_extract_on_the_command_line(tmp_path, bases, tuned):
    old, source = bases["bert"][0], tuned["bert", "full"] / "adaptation"
    said = invoke("extract-lora", "--tuned", source, "--old", old, "--rank", 4, "--out", tmp_path / "lora")
    assert "of the squared norm of what tuning changed" in said
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(old)
    load_model(load_adaptation(tmp_path / "lora"), Base.open(old), HEAD)
    for given in ({}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(RecipeError, match="either a rank or the energy"):
            extract_lora(Checkpoint.open(source), Checkpoint.open(old), **given)


def test_what_cannot_be_merged_is_refused(bases, tuned):
    source = tuned["bert", "lora"] / "adaptation"
    adapter, config, base = dict(Checkpoint.open(source)), lora_settings(source), Checkpoint.open(bases["bert"][0])
    name = "base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"
    with pytest.raises(CheckpointError, match=r"tunes 1 tensors .* does not hold: .*layer\.1\.output\.dense\.lora_B"):
        merge_lora({n: t for n, t in adapter.items() if n != name}, config, base)
    with pytest.raises(CheckpointError, match=r"no place .* would be lost: .*lora_embedding_A"):
        merge_lora(adapter | {name.replace("lora_B.weight", "lora_embedding_A"): adapter[name]}, config, base)
    with pytest.raises(CheckpointError, match=r"2 tensors of the LoRA have no place .*bert\.nothing"):
        more = {f"base_model.model.bert.{part}.weight": torch.ones(2) for part in ("nothing", "nowhere")}
        merge_lora(adapter | more, config, base)
    for setting, remedy in (
        ({"alora_invocation_tokens": [5]}, "PEFT merges no such adapter"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "Merge it with PEFT"),
    ):
        with pytest.raises(CheckpointError, match=f"{next(iter(setting))}.* {remedy}"):
            merge_lora(adapter, config | setting, base)
    with pytest.raises(CheckpointError, match=r"novelty.* not known to the installed PEFT"):
        merge_lora(adapter, config | {"novelty": 1}, base)
    with pytest.raises(MismatchError, match=r"do not fit the base: .*layer\.1\.output\.dense\.lora_B"):
        merge_lora(adapter | {name: adapter[name][:-1]}, config, base)


def test_what_a_merged_model_would_lack_is_refused(tmp_path, bases):
    """BERT's pooler is drawn at random where the base has none: a LoRA that did not save it cannot be merged."""
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(bases["bert"][0])
        get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"drawn at random: bert\.pooler\.dense\.weight"):
        merge_lora(Checkpoint.open(tmp_path), lora_settings(tmp_path), Checkpoint.open(bases["bert"][0]))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_took_its_start_out_of_its_base(tmp_path, bases, init):
    """Its true change is against the original base: folded, it gives what PEFT's model computes."""
    base = bases["bert"][0]
    torch.manual_seed(0)
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(base, dtype="float32")
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, target_modules=["query"], modules_to_save=["pooler"], init_lora_weights=init
        )
        model = get_peft_model(plain, config)
        model.save_pretrained(tmp_path / "start")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.peft_config["default"].init_lora_weights = init
        model.save_pretrained(tmp_path / "adapter")
    wanted = model.merge_and_unload().state_dict()
    invoke(
        "merge-lora", "--adapter", tmp_path / "adapter", "--start", tmp_path / "start", "--base", base,
        "--out", tmp_path / "out",
    )  # fmt: skip
    merged = Checkpoint.open(tmp_path / "out")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(merged[name], wanted[name], atol=1e-5, rtol=1e-5)
    settings = lora_settings(tmp_path / "adapter")
    assert str(settings["init_lora_weights"]) == init
    with pytest.raises(CheckpointError, match="took its start out of its base"):
        merge_lora(Checkpoint.open(tmp_path / "adapter"), settings, Checkpoint.open(base))
