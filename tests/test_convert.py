"""Conversions between kinds of adaptation, also of kinds that PEFT alone saves."""

import pytest
import torch
from helpers import ARCHITECTURES, CELLS, HEAD, LABELS, UNMERGEABLE, add_noise, compute_logits, load_tuned_model
from safetensors.torch import load_file

from regraft import Base, Upgrade, convert, load_adaptation
from regraft.adaptation import fresh_model, load_model, new_config, prepare_for_tuning, save_model, write_graft
from regraft.errors import OutcomeError, RecipeError, RegraftError
from regraft.model import encode, predict
from regraft.progress import quiet, silent
from regraft.task import load_data


def assert_same_logits(folder, base, examples, expected):
    torch.testing.assert_close(compute_logits(folder, base, examples), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_conversion_to_full_gives_the_same_outputs(
    tmp_path, saved_adaptations, opened_bases, encoded_dev, architecture, kind
):
    path, _ = saved_adaptations[architecture, kind]
    base = opened_bases[architecture][0]
    if kind in UNMERGEABLE or kind == "full":
        with pytest.raises(RecipeError, match="already" if kind == "full" else "does not change the weights"):
            convert(path, base, tmp_path / "full", "full")
        assert not list(tmp_path.iterdir())
        return
    convert(path, base, tmp_path / "full", "full")
    adaptation = load_adaptation(tmp_path / "full")
    assert (adaptation.kind, adaptation.labels, adaptation.base) == ("full", LABELS, base.fingerprint)
    expected = compute_logits(path, base, encoded_dev[architecture])
    assert_same_logits(tmp_path / "full", base, encoded_dev[architecture], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_full_fine_tune_becomes_a_lora_that_preserves_the_energy_asked_for(
    tmp_path, saved_adaptations, opened_bases, encoded_dev, architecture
):
    old, new = opened_bases[architecture]
    examples = encoded_dev[architecture]
    conversion = convert(saved_adaptations[architecture, "full"][0], old, tmp_path / "energy", "lora", energy=0.9)
    assert 0.9 * (1 - conversion.excluded) <= conversion.preserved < 1
    lora = saved_adaptations[architecture, "lora"][0]
    convert(lora, old, tmp_path / "full", "full")
    conversion = convert(tmp_path / "full", old, tmp_path / "lora", "lora", rank=3)
    assert conversion.preserved == pytest.approx(1, abs=1e-6)
    assert_same_logits(tmp_path / "lora", old, examples, compute_logits(lora, old, examples))
    convert(tmp_path / "full", old, tmp_path / "on-new", "lora", rank=3, new=new)
    assert_same_logits(tmp_path / "on-new", new, examples, compute_logits(lora, new, examples))
    assert load_adaptation(tmp_path / "on-new").base == new.fingerprint


def test_repeating_a_conversion_does_nothing(tmp_path, saved_adaptations, opened_bases):
    path, _ = saved_adaptations["bert", "lora"]
    base = opened_bases["bert"][0]
    conversion = convert(path, base, tmp_path / "full", "full")
    time = (tmp_path / "full/model.safetensors").stat().st_mtime_ns
    assert convert(path, base, tmp_path / "full", "full") == conversion
    assert (tmp_path / "full/model.safetensors").stat().st_mtime_ns == time
    with pytest.raises(OutcomeError, match="not made from the same inputs"):
        convert(saved_adaptations["bert", "ia3"][0], base, tmp_path / "full", "full")


def test_weighting_by_inputs_brings_outputs_nearer_to_the_fine_tune(
    tmp_path, saved_adaptations, opened_bases, task_file
):
    """A layer's output on the task's texts has a smaller error at the same rank."""
    from regraft.model import input_moments

    path, _ = saved_adaptations["bert", "full"]
    old = opened_bases["bert"][0]
    convert(path, old, tmp_path / "plain", "lora", rank=2)
    convert(path, old, tmp_path / "weighted", "lora", rank=2, task=task_file)
    data = load_data(task_file, 0)
    model = load_tuned_model(path, old)
    moments = input_moments(model, encode(old, data, data.train))
    tuned, base = load_file(path / "model.safetensors"), load_file(old.path / "model.safetensors")

    def output_error(folder, layer):
        stored = load_file(folder / "adapter_model.safetensors")
        a, b = (stored[f"base_model.model.{layer}.lora_{factor}.weight"].double() for factor in "AB")
        residual = (tuned[f"{layer}.weight"] - base[f"{layer}.weight"]).double() - b @ a
        return float(torch.trace(residual @ moments[layer] @ residual.T))

    weights = [name for name in tuned if name in base and name.endswith("dense.weight") and "pooler" not in name]
    layers = [name.removesuffix(".weight") for name in weights]
    assert len(layers) == 6
    for layer in layers:
        assert output_error(tmp_path / "weighted", layer) < output_error(tmp_path / "plain", layer)


def test_a_multiplicative_kind_adds_its_old_delta_to_a_new_base(tmp_path, saved_adaptations, opened_bases):
    old, new = opened_bases["bert"]
    path, _ = saved_adaptations["bert", "ia3"]
    convert(path, old, tmp_path / "old", "full")
    convert(path, old, tmp_path / "new", "full", new=new)
    name = "bert.encoder.layer.0.attention.self.key.weight"

    def read_delta(folder, base):
        file = "model.safetensors"
        return load_file(folder / file)[name] - load_file(base.path / file)[name]

    old_delta = read_delta(tmp_path / "old", old)
    assert old_delta.abs().max() > 1e-3
    torch.testing.assert_close(read_delta(tmp_path / "new", new), old_delta, atol=1e-6, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_direct_folds_a_peft_lora_that_was_initialised_from_its_base(tmp_path, opened_bases, encoded_dev, init):
    """PEFT saves factors that fit the old base only; `direct` writes a plain LoRA with the same delta on any base."""
    from peft import LoraConfig, get_peft_model

    old, new = opened_bases["bert"]
    model = fresh_model(old, HEAD, 0)
    with quiet():
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=4,
            lora_alpha=6,
            target_modules=["query", "dense"],
            init_lora_weights=init,
            modules_to_save=["pooler"],
            rank_pattern={"query": 2},
        )
        model = get_peft_model(model, config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.1)
        model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
        tuned_layers = {
            name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer
            for name, layer in model.merge_and_unload().named_modules()
        }
    write_graft(load_adaptation(tmp_path / "made"), Upgrade(old, new), tmp_path / "out", silent)
    adaptation = load_adaptation(tmp_path / "out")
    assert adaptation.config["init_lora_weights"] is True
    assert (adaptation.config["r"], adaptation.config["rank_pattern"]) == (8, {"query": 4})
    merged = load_model(adaptation, new, HEAD).merge_and_unload()
    old_tensors, new_tensors = (load_file(base.path / "model.safetensors") for base in (old, new))
    for layer in ("query", "key"):
        name = f"bert.encoder.layer.1.attention.self.{layer}"
        old_delta = tuned_layers[name].weight - old_tensors[f"{name}.weight"]
        assert (old_delta.abs().max() > 1e-3) == (layer == "query")
        new_delta = merged.get_submodule(name).weight - new_tensors[f"{name}.weight"]
        torch.testing.assert_close(new_delta, old_delta, atol=1e-5, rtol=0)


# settings of PEFT's config classes, which the first words name
PEFT_ONLY = {
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
@pytest.mark.parametrize("name", PEFT_ONLY)
def test_kinds_that_peft_alone_saves_are_loaded_and_recycled(tmp_path, opened_bases, encoded_dev, name):
    import peft

    old = opened_bases["bert"][0]
    examples = encoded_dev["bert"]
    has_virtual_tokens = "num_virtual_tokens" in PEFT_ONLY[name]
    targets = {} if has_virtual_tokens else {"target_modules": ["query", "value"]}
    settings = {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"], **targets, **PEFT_ONLY[name]}
    config = getattr(peft, f"{name.split()[0]}Config")(**settings)
    with quiet():
        model = peft.get_peft_model(fresh_model(old, HEAD, 0), config)
        add_noise(model, seed=4)
        model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    expected = predict(model, examples, "fp32")
    adaptation = load_adaptation(tmp_path / "made")
    for trainable in (False, True):
        model = load_model(adaptation, old, HEAD, trainable=trainable)
        if trainable:
            assert any(parameter.requires_grad for parameter in model.parameters())
        logits = predict(model, examples, "fp32")
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)
    write_graft(adaptation, Upgrade(old, old), tmp_path / "out", silent)
    torch.testing.assert_close(compute_logits(tmp_path / "out", old, examples), logits, atol=1e-6, rtol=0)
    if has_virtual_tokens or "twice" in name:
        with pytest.raises(RecipeError, match="recycled, but not converted"):
            convert(adaptation, old, tmp_path / "full", "full")
        return
    convert(adaptation, old, tmp_path / "full", "full")
    torch.testing.assert_close(compute_logits(tmp_path / "full", old, examples), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "mpnet", "modernbert", "mixtral"])
def test_conversions_in_further_architectures(tmp_path, task_file, architecture):
    """GPT-2 has Conv1D layers, MPNet relative position biases, ModernBERT a second head, and Mixtral experts."""
    from helpers import WORDS, make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if architecture == "mixtral":
        sizes |= {"num_local_experts": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        architecture, vocab_size=5 + len(WORDS), pad_token_id=0, max_position_embeddings=66, eos_token_id=2, **sizes
    )
    is_decoder = architecture in ("gpt2", "mixtral")
    auto_class = AutoModelForCausalLM if is_decoder else AutoModelForMaskedLM
    torch.manual_seed(0)
    auto_class.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer("llama" if is_decoder else "bert").save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    data = load_data(task_file, 20)
    dev = encode(base, data, data.dev)
    model = fresh_model(base, HEAD, 1)
    if architecture == "mixtral":
        save_model(model, base, HEAD, tmp_path / "made")
        assert load_adaptation(tmp_path / "made").check_base(base) == "proven"
        with pytest.raises(RegraftError):
            convert(tmp_path / "made", base, tmp_path / "lora", "lora", rank=2)
        assert not (tmp_path / "lora").exists()
        return
    with quiet():
        model = prepare_for_tuning(model, base, HEAD, new_config("lora", base, HEAD, rank=3), 1)
    add_noise(model, seed=2)
    save_model(model, base, HEAD, tmp_path / "made")
    expected = predict(model, dev, "fp32")
    convert(tmp_path / "made", base, tmp_path / "full", "full")
    assert_same_logits(tmp_path / "full", base, dev, expected)
    assert convert(tmp_path / "full", base, tmp_path / "lora", "lora", rank=3).preserved == pytest.approx(1, abs=1e-6)
    assert_same_logits(tmp_path / "lora", base, dev, expected)
