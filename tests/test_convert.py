"""Conversions of adaptations, and kinds that were made elsewhere."""

import pytest
import torch
from helpers import ARCHITECTURES, HEAD, LABELS, compute_logits
from safetensors.torch import load_file

from regraft import Base, Upgrade, convert, load_adaptation
from regraft.adaptation import KINDS, fresh_model, load_model, new_config, prepare_for_tuning, save_model, write_graft
from regraft.errors import OutcomeError, RecipeError, RegraftError
from regraft.model import encode, predict
from regraft.progress import quiet, silent
from regraft.task import load_data

CELLS = [(a, k) for a in ARCHITECTURES for k in KINDS if (a, k) != ("distilbert", "prefix")]
UNMERGEABLE = ("prefix", "prompt", "bottleneck", "pfeiffer")


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_conversion_to_full_gives_the_same_outputs(
    tmp_path, saved_adaptations, opened_bases, encoded_dev, architecture, kind
):
    path, _ = saved_adaptations[architecture, kind]
    base = opened_bases[architecture][0]
    if kind in UNMERGEABLE or kind == "full":
        with pytest.raises(RecipeError, match="does not change the weights" if kind != "full" else "already"):
            convert(path, base, tmp_path / "full", "full")
        assert not list(tmp_path.iterdir())
        return
    convert(path, base, tmp_path / "full", "full")
    adaptation = load_adaptation(tmp_path / "full")
    assert (adaptation.kind, adaptation.labels, adaptation.base) == ("full", LABELS, base.fingerprint)
    expected = compute_logits(path, base, encoded_dev[architecture])
    torch.testing.assert_close(
        compute_logits(tmp_path / "full", base, encoded_dev[architecture]), expected, atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_full_fine_tune_becomes_a_lora_within_its_energy(
    tmp_path, saved_adaptations, opened_bases, encoded_dev, architecture
):
    """Head and nested head survive; what is kept is what was asked for."""
    path, _ = saved_adaptations[architecture, "full"]
    old, new = opened_bases[architecture]
    done = convert(path, old, tmp_path / "most", "lora", energy=0.9)
    assert 0.9 * (1 - done.excluded) <= done.preserved < 1
    convert(saved_adaptations[architecture, "lora"][0], old, tmp_path / "full", "full")
    again = convert(tmp_path / "full", old, tmp_path / "again", "lora", rank=3)
    assert again.preserved == pytest.approx(1, abs=1e-6)
    expected = compute_logits(saved_adaptations[architecture, "lora"][0], old, encoded_dev[architecture])
    torch.testing.assert_close(
        compute_logits(tmp_path / "again", old, encoded_dev[architecture]), expected, atol=2e-5, rtol=1e-4
    )
    convert(tmp_path / "full", old, tmp_path / "there", "lora", rank=3, new=new)
    expected = compute_logits(saved_adaptations[architecture, "lora"][0], new, encoded_dev[architecture])
    torch.testing.assert_close(
        compute_logits(tmp_path / "there", new, encoded_dev[architecture]), expected, atol=2e-5, rtol=1e-4
    )
    assert load_adaptation(tmp_path / "there").base == new.fingerprint


def test_the_same_conversion_again_does_nothing(tmp_path, saved_adaptations, opened_bases):
    path, _ = saved_adaptations["bert", "lora"]
    first = convert(path, opened_bases["bert"][0], tmp_path / "full", "full")
    before = (tmp_path / "full/model.safetensors").stat().st_mtime_ns
    assert convert(path, opened_bases["bert"][0], tmp_path / "full", "full") == first
    assert (tmp_path / "full/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutcomeError, match="made from other inputs"):
        convert(saved_adaptations["bert", "ia3"][0], opened_bases["bert"][0], tmp_path / "full", "full")


def test_weighing_by_inputs_keeps_the_outputs_better(tmp_path, saved_adaptations, opened_bases, task_file):
    """At the same rank, a layer's outputs on the texts are nearer to those of the fine-tune."""
    from regraft.model import input_moments

    path, _ = saved_adaptations["bert", "full"]
    old = opened_bases["bert"][0]
    convert(path, old, tmp_path / "plain", "lora", rank=2)
    convert(path, old, tmp_path / "weighed", "lora", rank=2, task=task_file)
    data = load_data(task_file, 0)
    model = load_model(load_adaptation(path), old, HEAD)
    moments = input_moments(model, encode(old, data, data.train))
    tuned, base = load_file(path / "model.safetensors"), load_file(old.path / "model.safetensors")

    def error(folder, layer):
        stored = load_file(folder / "adapter_model.safetensors")
        a, b = (stored[f"base_model.model.{layer}.lora_{part}.weight"].double() for part in "AB")
        left = (tuned[f"{layer}.weight"] - base[f"{layer}.weight"]).double() - b @ a
        return float(torch.trace(left @ moments[layer] @ left.T))

    layers = [
        n.removesuffix(".weight") for n in tuned if n in base and n.endswith("dense.weight") and "pooler" not in n
    ]
    assert len(layers) == 6
    assert all(error(tmp_path / "weighed", layer) < error(tmp_path / "plain", layer) for layer in layers)


def test_a_multiplicative_kind_on_a_new_base_is_the_change_it_made_to_the_old_one(
    tmp_path, saved_adaptations, opened_bases
):
    old, new = opened_bases["bert"]
    path, _ = saved_adaptations["bert", "ia3"]
    convert(path, old, tmp_path / "old", "full")
    convert(path, old, tmp_path / "new", "full", new=new)
    on_old, on_new = (load_file(tmp_path / side / "model.safetensors") for side in ("old", "new"))
    before, after = (load_file(side.path / "model.safetensors") for side in (old, new))
    name = "bert.encoder.layer.0.attention.self.key.weight"
    assert (on_old[name] - before[name]).abs().max() > 1e-3
    torch.testing.assert_close(on_new[name] - after[name], on_old[name] - before[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_foreign_lora_that_took_its_start_from_its_base_is_folded(tmp_path, opened_bases, encoded_dev, init):
    """Saved by PEFT as it is, it is right on the old base only; direct makes it the same change on any base."""
    from peft import LoraConfig, get_peft_model

    old, new = opened_bases["bert"]
    model = fresh_model(old, HEAD, 0)
    with quiet():
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "dense"], init_lora_weights=init,
            modules_to_save=["pooler"], rank_pattern={"query": 2},
        )  # fmt: skip
        model = get_peft_model(model, config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.1)
        model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
        change = {
            name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer
            for name, layer in model.merge_and_unload().named_modules()
        }
    write_graft(load_adaptation(tmp_path / "made"), Upgrade(old, new), tmp_path / "out", silent)
    adaptation = load_adaptation(tmp_path / "out")
    assert adaptation.config["init_lora_weights"] is True
    assert (adaptation.config["r"], adaptation.config["rank_pattern"]) == (8, {"query": 4})
    merged = load_model(adaptation, new, HEAD).merge_and_unload()
    before, after = (load_file(side.path / "model.safetensors") for side in (old, new))
    for layer in ("query", "key"):
        name = f"bert.encoder.layer.1.attention.self.{layer}"
        moved = change[name].weight - before[f"{name}.weight"]
        assert (moved.abs().max() > 1e-3) == (layer == "query")
        torch.testing.assert_close(
            merged.get_submodule(name).weight - after[f"{name}.weight"], moved, atol=1e-5, rtol=0
        )


FOREIGN = {
    "AdaLora": {"init_r": 4, "target_r": 2, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FourierFT": {"n_frequency": 20},
    "HRA": {"r": 2},
    "LoHa": {"r": 2},
    "LoKr": {"r": 2},
    "Lora bias": {"lora_bias": True},
    "Lora beside biases": {"bias": "all"},
    "Lora of a layer": {"layers_to_transform": [1]},
    "Lora of layers twice": {"layer_replication": [(0, 2), (1, 2)]},
    "Lora of parameters": {"target_parameters": ["key.weight"]},
    "Lora of the head": {"target_modules": ["query", "word_embeddings", "classifier"]},
    "Lora with tokens": {"trainable_token_indices": {"word_embeddings": [5, 6]}},
    "Miss": {"r": 2},
    "OFT": {"r": 4, "oft_block_size": 0},
    "PrefixTuning": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
    "PromptEncoder": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "RandLora": {"r": 2},
    "Vera": {"r": 2},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_that_peft_saved_are_read_and_put_on_a_base(tmp_path, opened_bases, encoded_dev, name):
    import peft

    old = opened_bases["bert"][0]
    targets = {} if name.startswith("Pr") else {"target_modules": ["query", "value"]}
    given = {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"], **targets, **FOREIGN[name]}
    with quiet():
        model = peft.get_peft_model(fresh_model(old, HEAD, 0), getattr(peft, f"{name.split()[0]}Config")(**given))
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    expected = predict(model, encoded_dev["bert"], "fp32")
    made = load_adaptation(tmp_path / "made")
    for further in (False, True):
        model = load_model(made, old, HEAD, trainable=further)
        assert further <= any(parameter.requires_grad for parameter in model.parameters())
        found = predict(model, encoded_dev["bert"], "fp32")
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    write_graft(made, Upgrade(old, old), tmp_path / "out", silent)
    torch.testing.assert_close(compute_logits(tmp_path / "out", old, encoded_dev["bert"]), found, atol=1e-6, rtol=0)
    if not targets or "twice" in name:
        with pytest.raises(RecipeError, match="recycled, but not converted"):
            convert(made, old, tmp_path / "full", "full")
        return
    convert(made, old, tmp_path / "full", "full")
    torch.testing.assert_close(compute_logits(tmp_path / "full", old, encoded_dev["bert"]), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "mpnet", "modernbert", "mixtral"])
def test_conversions_in_other_architectures(tmp_path, task_file, kind):
    """GPT-2's turned layers, MPNet's biases by distance, ModernBERT's second head; and experts, which have no LoRA."""
    from helpers import WORDS, make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"mixtral": {"num_local_experts": 2, "num_key_value_heads": 2}}.get(kind, {})
    given = AutoConfig.for_model(
        kind, vocab_size=5 + len(WORDS), pad_token_id=0, max_position_embeddings=66, eos_token_id=2, **size
    )
    decoder = kind in ("gpt2", "mixtral")
    torch.manual_seed(0)
    (AutoModelForCausalLM if decoder else AutoModelForMaskedLM).from_config(given).save_pretrained(tmp_path / "base")
    make_tokenizer("llama" if decoder else "bert").save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    data = load_data(task_file, 20)
    dev = encode(base, data, data.dev)
    model = fresh_model(base, HEAD, 1)
    if kind == "mixtral":
        save_model(model, base, HEAD, tmp_path / "made")
        assert load_adaptation(tmp_path / "made").check_base(base) == "proven"
        with pytest.raises(RegraftError):
            convert(tmp_path / "made", base, tmp_path / "lora", "lora", rank=2)
        assert not (tmp_path / "lora").exists()
        return
    with quiet():
        model = prepare_for_tuning(model, base, HEAD, new_config("lora", base, HEAD, rank=3), 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    save_model(model, base, HEAD, tmp_path / "made")
    expected = predict(model, dev, "fp32")
    convert(tmp_path / "made", base, tmp_path / "full", "full")
    torch.testing.assert_close(compute_logits(tmp_path / "full", base, dev), expected, atol=2e-5, rtol=1e-4)
    assert convert(tmp_path / "full", base, tmp_path / "lora", "lora", rank=3).preserved == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(compute_logits(tmp_path / "lora", base, dev), expected, atol=2e-5, rtol=1e-4)
