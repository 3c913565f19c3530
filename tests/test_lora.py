"""Merge LoRAs into a base and extract them from a fine-tune; the references are PEFT and transformers."""

import json

import pytest
import torch
from helpers import ARCHITECTURES, HEAD, LABELS, add_noise, load_tuned_model, run_command
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from regraft import Base, load_adaptation
from regraft.adaptation import extract_lora, load_model, merge_lora, read_lora_config, write_lora
from regraft.checkpoint import Checkpoint
from regraft.errors import CheckpointError, MismatchError, OutcomeError, RecipeError
from regraft.progress import quiet

INPUT_IDS = torch.tensor([[7, 9, 12, 20, 8], [11, 30, 6, 15, 22]])


def compute_logits(model):
    model.config.pad_token_id = 0
    with torch.no_grad():
        return model.eval()(INPUT_IDS).logits


def test_output_folder_is_refused_after_one_weight_of_the_fine_tune_changed(tmp_path):
    weights = {"old": torch.zeros(64, 64), "tuned": torch.randn(64, 64)}
    for folder, weight in weights.items():
        (tmp_path / folder).mkdir()
        save_file({"layer.weight": weight}, tmp_path / folder / "model.safetensors")
    command = "extract-lora", "--tuned", tmp_path / "tuned", "--old", tmp_path / "old", "--rank", 2, "--out"
    run_command("weights", *command, tmp_path / "out")
    weights["tuned"][1, 3] += 1  # an element that a fingerprint of sampled elements would miss
    save_file({"layer.weight": weights["tuned"]}, tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(OutcomeError, match="not made from the same inputs"):
        run_command("weights", *command, tmp_path / "out")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_lora_computes_the_same_logits(tmp_path, bases, tuned_outcomes, architecture):
    base = Base.open(bases[architecture][0])
    adaptation = load_adaptation(tuned_outcomes[architecture, "lora"])
    run_command("weights", "merge-lora", "--adapter", adaptation.path, "--base", base.path, "--out", tmp_path / "out")
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] | report["mismatched_keys"]
    assert report["unexpected_keys"] <= Checkpoint.open(base.path).tensors.keys()  # the head of pre-training
    assert tuple(model.config.id2label[i] for i in range(2)) == LABELS
    torch.testing.assert_close(
        compute_logits(model), compute_logits(load_model(adaptation, base, HEAD)), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 5, "layer.1.output.dense": 1}},
    ],
    ids=["rslora", "dora", "patterns"],
)
def test_variants_of_lora_are_merged_as_peft_does(tmp_path, bases, settings):
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
            **settings,
        )
        model = get_peft_model(plain, config)
        add_noise(model, 0.3, is_changed=lambda name: "lora_" in name)
        model.save_pretrained(tmp_path / "adapter")
    adapter, source = Checkpoint.open(tmp_path / "adapter"), Checkpoint.open(base)
    merged = merge_lora(adapter, read_lora_config(tmp_path / "adapter"), source).tensors
    expected = model.merge_and_unload().state_dict()
    assert expected.keys() <= merged.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=1e-5)
    changed = [name for name in expected if name in source and not torch.equal(merged[name], source[name])]
    assert len(changed) == 6  # query and the two output.dense of both layers


def test_merge_into_a_transposed_weight(tmp_path):
    """GPT-2's Conv1D stores its weight as [in, out]."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    plain = GPT2ForSequenceClassification(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, pad_token_id=0))
    plain.save_pretrained(tmp_path / "base")
    with quiet():
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = get_peft_model(plain, config)
        add_noise(model, 1, is_changed=lambda name: "lora_" in name)
        model.save_pretrained(tmp_path / "adapter")
    merged = merge_lora(
        Checkpoint.open(tmp_path / "adapter"),
        read_lora_config(tmp_path / "adapter"),
        Checkpoint.open(tmp_path / "base"),
    ).tensors
    expected = model.merge_and_unload().state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(merged[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_extracted_lora_of_full_rank_equals_the_fine_tune_in_linear_layers(
    tmp_path, bases, tuned_outcomes, architecture
):
    old = bases[architecture][0]
    source = tuned_outcomes[architecture, "full"] / "adaptation"
    lora = extract_lora(Checkpoint.open(source), Checkpoint.open(old), energy=1.0)
    assert lora.preserved + lora.excluded == pytest.approx(1)
    write_lora(lora, tmp_path / "lora", str(old), source, {})
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(old, num_labels=2, dtype="float32")
        model = PeftModel.from_pretrained(plain, tmp_path / "lora").merge_and_unload()
    fine_tune = Checkpoint.open(source)
    state = model.state_dict()
    linear_weights = [
        name for name in fine_tune if f"base_model.model.{name.removesuffix('weight')}lora_A.weight" in lora.tensors
    ]
    assert len(linear_weights) >= 12
    for name in linear_weights:
        torch.testing.assert_close(state[name], fine_tune[name], atol=1e-5, rtol=1e-4)
    for name in ("classifier.weight", "score.weight", "pre_classifier.weight"):
        if name in fine_tune:
            assert torch.equal(state[name], fine_tune[name])


def test_rank_and_energy_bound_the_error_of_an_extracted_lora(tmp_path, bases, tuned_outcomes):
    old, source = map(Checkpoint.open, (bases["bert"][0], tuned_outcomes["bert", "full"] / "adaptation"))
    energy_by_rank = [extract_lora(source, old, rank=rank).preserved for rank in (1, 4, 16)]
    assert energy_by_rank == sorted(energy_by_rank)
    assert energy_by_rank[0] < energy_by_rank[-1] < 1
    lora = extract_lora(source, old, energy=0.8)
    assert {len(tensor) for name, tensor in lora.tensors.items() if "lora_A" in name} > {lora.config["r"]}
    write_lora(lora, tmp_path / "lora", "base", tmp_path, {})
    merged = merge_lora(Checkpoint.open(tmp_path / "lora"), lora.config, old).tensors
    for name in merged.keys() & set(old) & set(source):
        if "dense.weight" in name:
            delta, expected = merged[name].double() - old[name].double(), source[name].double() - old[name].double()
            assert (delta - expected).square().sum() <= 0.2 * expected.square().sum() + 1e-9


def test_extract_lora_command(tmp_path, bases, tuned_outcomes):
    old = bases["bert"][0]
    source = tuned_outcomes["bert", "full"] / "adaptation"
    output = run_command(
        "weights", "extract-lora", "--tuned", source, "--old", old, "--rank", 4, "--out", tmp_path / "lora"
    )
    assert "of the delta's squared norm preserved" in output
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(old)
    load_tuned_model(tmp_path / "lora", Base.open(old))
    for options in ({}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(RecipeError, match="either a rank or the energy"):
            extract_lora(Checkpoint.open(source), Checkpoint.open(old), **options)


def test_invalid_adapters_are_not_merged(bases, tuned_outcomes):
    source = tuned_outcomes["bert", "lora"] / "adaptation"
    adapter = dict(Checkpoint.open(source))
    config = read_lora_config(source)
    base = Checkpoint.open(bases["bert"][0])
    name = "base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* tunes: .*layer\.1\.output\.dense\.lora_B"):
        merge_lora({key: tensor for key, tensor in adapter.items() if key != name}, config, base)
    with pytest.raises(CheckpointError, match=r"unexpected .* would be ignored: .*lora_embedding_A"):
        merge_lora(adapter | {name.replace("lora_B.weight", "lora_embedding_A"): adapter[name]}, config, base)
    with pytest.raises(CheckpointError, match=r"2 tensors of the LoRA are unexpected .*bert\.nothing"):
        unknown = {f"base_model.model.bert.{module}.weight": torch.ones(2) for module in ("nothing", "nowhere")}
        merge_lora(adapter | unknown, config, base)
    for setting, remedy in (
        ({"alora_invocation_tokens": [5]}, "PEFT does not merge it either"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "Merge it with PEFT"),
    ):
        with pytest.raises(CheckpointError, match=f"{next(iter(setting))}.* {remedy}"):
            merge_lora(adapter, config | setting, base)
    with pytest.raises(CheckpointError, match=r"novelty.* unknown to the installed PEFT"):
        merge_lora(adapter, config | {"novelty": 1}, base)
    with pytest.raises(MismatchError, match=r"do not fit the base: .*layer\.1\.output\.dense\.lora_B"):
        merge_lora(adapter | {name: adapter[name][:-1]}, config, base)


def test_lora_that_lacks_a_randomly_initialised_weight_is_not_merged(tmp_path, bases):
    """The base has no pooler, so BERT's is drawn at random, and this LoRA did not save it."""
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(bases["bert"][0])
        get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"neither in .* nor in the LoRA: bert\.pooler\.dense\.weight"):
        merge_lora(Checkpoint.open(tmp_path), read_lora_config(tmp_path), Checkpoint.open(bases["bert"][0]))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_lora_initialised_from_its_base_is_merged_with_its_start_only(tmp_path, bases, init):
    """PEFT subtracts the initial LoRA from the base: a merge into the original base needs that LoRA too."""
    base = bases["bert"][0]
    torch.manual_seed(0)
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(base, dtype="float32")
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, target_modules=["query"], modules_to_save=["pooler"], init_lora_weights=init
        )
        model = get_peft_model(plain, config)
        model.save_pretrained(tmp_path / "start")
        add_noise(model, 0.1, is_changed=lambda name: "lora_" in name)
        model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    folders = "--adapter", tmp_path / "adapter", "--start", tmp_path / "start", "--base", base
    run_command("weights", "merge-lora", *folders, "--out", tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(merged[name], expected[name], atol=1e-5, rtol=1e-5)
    settings = read_lora_config(tmp_path / "adapter")
    assert str(settings["init_lora_weights"]) == init
    with pytest.raises(CheckpointError, match=f"was initialised by '{init}' from its base"):
        merge_lora(Checkpoint.open(tmp_path / "adapter"), settings, Checkpoint.open(base))
