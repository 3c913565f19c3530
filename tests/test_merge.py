"""LoRAs merged into checkpoints and extracted from them, against the outputs of PEFT and of the tuned model."""

import functools
import itertools
import json

import pytest
import torch
import transformers
from helpers import (
    EXPERTS,
    GROUPED,
    LORA_RANK,
    NUM_EXPERTS,
    SIZES,
    add_noise,
    make_head,
    make_tokenizer,
    run_command,
    update_json,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from regraft import Base, convert, load_adaptation
from regraft.adaptation import extract_lora, load_model, merge_lora, read_lora_config
from regraft.checkpoint import Checkpoint
from regraft.cli import app
from regraft.errors import CheckpointError, MismatchError, OutcomeError
from regraft.naming import class_of
from regraft.progress import quiet

MODEL_SIZES = SIZES | {"vocab_size": 40}
DISTILBERT_SIZES = {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
GPT2_SIZES = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
T5_SIZES = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
MIXTURE = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "moe_intermediate_size": 24}
# The auto class of a base, the stem of its config class, and the settings of its config.
MODELS = {
    "bert": (AutoModelForMaskedLM, "Bert", MODEL_SIZES),
    "bert-bare": (AutoModel, "Bert", MODEL_SIZES),
    "deberta": (
        AutoModelForMaskedLM,
        "DebertaV2",
        MODEL_SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "distilbert": (AutoModelForMaskedLM, "DistilBert", DISTILBERT_SIZES),
    "gemma3": (AutoModelForCausalLM, "Gemma3Text", MODEL_SIZES | GROUPED),
    "gpt2": (AutoModelForCausalLM, "GPT2", GPT2_SIZES),
    "llama": (AutoModelForCausalLM, "Llama", MODEL_SIZES),
    "llama-tied": (AutoModelForCausalLM, "Llama", MODEL_SIZES | {"tie_word_embeddings": True}),
    "mixtral": (
        AutoModelForCausalLM,
        "Mixtral",
        MODEL_SIZES | {"num_key_value_heads": 2, "num_local_experts": NUM_EXPERTS},
    ),
    "neox": (AutoModelForCausalLM, "GPTNeoX", MODEL_SIZES),
    "nomic": (AutoModelForMaskedLM, "NomicBert", MODEL_SIZES),
    "qwen3-moe": (AutoModelForCausalLM, "Qwen3Moe", MODEL_SIZES | GROUPED | MIXTURE),
    "roberta": (AutoModelForMaskedLM, "Roberta", MODEL_SIZES),
    "t5": (AutoModelForSeq2SeqLM, "T5", T5_SIZES | {"decoder_start_token_id": 0}),
}
TASK_TYPES = {AutoModelForCausalLM: "CAUSAL_LM", AutoModelForSeq2SeqLM: "SEQ_2_SEQ_LM", AutoModel: "FEATURE_EXTRACTION"}
CASES = [
    ("bert-bare", {"target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler"]}),
    ("gpt2", {"target_modules": ["attn.c_proj", "lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens", "norm"]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4, 5], "lm_head": [3]}}),
    ("nomic", {"target_modules": "all-linear", "use_rslora": True}),
    ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    ("qwen3-moe", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    ("t5", {"target_modules": ["q", "shared"], "modules_to_save": ["lm_head"]}),
    ("t5", {"target_modules": ["q", "shared"], "task_type": None}),
    ("gpt2", {"target_modules": ["c_attn"], "task_type": None}),
]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::peft.utils.warning.PeftWarning")


def write_base(folder, name):
    auto_class, stem, settings = MODELS[name]
    torch.manual_seed(0)
    model = auto_class.from_config(getattr(transformers, f"{stem}Config")(**settings))
    add_noise(model, 0.05)  # biases start at 0
    model.save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return folder


def write_lora(folder, name, base, settings, vocab_size=None):
    """Write a LoRA whose every tuned tensor has noise, and return its model."""
    auto_class, _, _ = MODELS[name]
    config = LoraConfig(**{"task_type": TASK_TYPES.get(auto_class), "r": LORA_RANK, "lora_alpha": 5, **settings})
    with quiet():
        plain = auto_class.from_pretrained(base)
        if vocab_size:
            plain.resize_token_embeddings(vocab_size, mean_resizing=False)
        model = get_peft_model(plain, config)
        add_noise(model, seed=1)
        model.save_pretrained(folder)
    return model


def compute_outputs(name, model):
    """Run a model on two texts, T5 on one, and return its logits or, without a head, its last hidden states."""
    inputs = {"input_ids": torch.tensor([[7, 9, 12, 20, 8], [11, 30, 6, 15, 22]])}
    if name == "t5":
        inputs = {"input_ids": inputs["input_ids"][:1], "decoder_input_ids": torch.tensor([[0, 7, 8]])}
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def compute_stored_outputs(name, folder):
    """Return the outputs of a model that transformers loads from a folder without missing or unexpected tensors."""
    with quiet():
        model, report = MODELS[name][0].from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] | report["mismatched_keys"] | report["unexpected_keys"]
    return compute_outputs(name, model)


def compute_peft_outputs(name, base, adapter):
    """Return the outputs of an adapter that PEFT loads onto a base."""
    with quiet():
        model = PeftModel.from_pretrained(MODELS[name][0].from_pretrained(base), adapter)
    return compute_outputs(name, model)


def run_merge(adapter, base, out):
    run_command("weights", "merge-lora", "--adapter", adapter, "--base", base, "--out", out)


def merge_folder(adapter, base, **changes):
    """Merge the LoRA of a folder, with changes of its config, and return the tensors."""
    config = read_lora_config(adapter) | changes
    return merge_lora(Checkpoint.open(adapter), config, Checkpoint.open(base)).tensors


@pytest.fixture(scope="module")
def get_base(tmp_path_factory):
    """A function of a model's name, which returns the folder of its base and the base's outputs."""
    folder = tmp_path_factory.mktemp("bases")

    @functools.cache
    def build(name):
        return write_base(folder / name, name), compute_stored_outputs(name, folder / name)

    return build


def assert_merged_as_by_peft(tmp_path, get_base, name, settings):
    base, base_outputs = get_base(name)
    write_lora(tmp_path / "adapter", name, base, settings)
    if "task_type" in settings:  # then neither the adapter nor the base names a class
        update_json(base / "config.json", architectures=None)
    run_merge(tmp_path / "adapter", base, tmp_path / "out")
    expected = compute_peft_outputs(name, base, tmp_path / "adapter")
    assert (expected - base_outputs).abs().max() > 1e-3
    torch.testing.assert_close(compute_stored_outputs(name, tmp_path / "out"), expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_merged_checkpoint_has_the_outputs_of_the_tuned_model(tmp_path, get_base, name, settings):
    assert_merged_as_by_peft(tmp_path, get_base, name, settings)


# The values "linear", "embeddings", "head" and "ends" stand for the names of a model's modules.
SETTINGS = {
    "biases": {"target_modules": "linear", "bias": "lora_only"},
    "dora": {"target_modules": "linear", "use_dora": True},
    "a-layer": {"target_modules": "linear", "layers_to_transform": [1]},
    "embeddings": {"target_modules": "ends"},
    "whole-embeddings": {"target_modules": "linear", "modules_to_save": "embeddings"},
    "whole-head": {"target_modules": "linear", "modules_to_save": "head"},
}
TABLE = [  # every third cell, so that each architecture and each setting runs; `make contract` runs them all
    pytest.param(name, settings, id=f"{name}-{setting}", marks=[pytest.mark.contract] * bool((row + column) % 3))
    for row, name in enumerate(sorted(MODELS))
    for column, (setting, settings) in enumerate(SETTINGS.items())
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), TABLE)
def test_every_architecture_is_merged(tmp_path, get_base, name, settings):
    auto_class, stem, config_settings = MODELS[name]
    with torch.device("meta"):
        model = auto_class.from_config(getattr(transformers, f"{stem}Config")(**config_settings))
    paths = {id(module): path for path, module in model.named_modules()}
    layers = [path for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is None and "head" in settings.values():
        pytest.skip("the bare body has no output layer")
    modules = {
        "linear": sorted({path.rpartition(".")[2] for path in layers if ".0." in path}),
        "embeddings": [paths[id(embeddings)]],
        "head": [paths.get(id(head))],
        "ends": [paths[id(end)] for end in (embeddings, head) if end is not None],
    }
    named_settings = {key: modules.get(str(value), value) for key, value in settings.items()}
    assert_merged_as_by_peft(tmp_path, get_base, name, named_settings)


@pytest.mark.parametrize(
    ("settings", "is_tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"trainable_token_indices": [4, 5]}, True),
    ],
)
def test_tied_embeddings_and_head_are_separate_if_only_one_is_tuned(tmp_path, get_base, settings, is_tied):
    assert_merged_as_by_peft(tmp_path, get_base, "llama-tied", {"target_modules": ["q_proj"], **settings})
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in Checkpoint.open(tmp_path / "out")) is not is_tied


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_merged_checkpoint_has_the_added_tokens(tmp_path, get_base, name):
    base, _ = get_base(name)
    model = write_lora(tmp_path / "adapter", name, base, {"target_modules": ["q_proj"]}, vocab_size=45)
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    run_merge(tmp_path / "adapter", base, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 45
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)
    torch.testing.assert_close(
        compute_stored_outputs(name, tmp_path / "out"), compute_outputs(name, model), atol=2e-6, rtol=1e-4
    )


def test_settings_of_a_nested_text_model_are_written_into_its_config(tmp_path):
    """The class reads the vocabulary's size and whether the head is tied from `text_config`."""
    config = transformers.Gemma3Config(
        text_config={**MODEL_SIZES, "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 16},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    with quiet():
        model = transformers.Gemma3ForConditionalGeneration(config)
        model.save_pretrained(tmp_path / "base")
        model.resize_token_embeddings(45, mean_resizing=False)
        modules = ["embed_tokens", "lm_head"]
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules))
        add_noise(tuned, is_changed=lambda name: "modules_to_save" in name)
        tuned.save_pretrained(tmp_path / "adapter")
    run_merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    with quiet():
        merged = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert merged.config.text_config.vocab_size == 45
    state, expected = merged.state_dict(), tuned.merge_and_unload().state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_model_that_reads_no_tokens_is_merged(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    with quiet():
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=28, patch_size=14))
        model.save_pretrained(tmp_path / "base")
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=r".*(query|q_proj)", init_lora_weights=False))
        tuned.save_pretrained(tmp_path / "adapter")
        tuned.merge_and_unload().save_pretrained(tmp_path / "expected")
    expected = Checkpoint.open(tmp_path / "expected")
    merged = merge_folder(tmp_path / "adapter", tmp_path / "base")
    assert merged.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name], atol=1e-6, rtol=0)


def test_missing_rows_of_added_tokens_are_refused(tmp_path, get_base):
    base, _ = get_base("llama")
    model = write_lora(
        tmp_path / "adapter", "llama", base, {"target_modules": ["q_proj", "embed_tokens"]}, vocab_size=45
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(MismatchError, match=r"embed_tokens\.weight' is \(40, 32\), expected \(45, 32\)"):
        merge_folder(tmp_path / "adapter", base)


def test_experts_stored_one_by_one_as_in_transformers_4_are_merged(tmp_path, get_base):
    base, _ = get_base("qwen3-moe")
    write_lora(tmp_path / "adapter", "qwen3-moe", base, {"target_modules": ["q_proj"]})
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    layer_sizes = {"gate_proj": (32, 24), "up_proj": (32, 24), "down_proj": (24, 32)}  # inputs, outputs
    for layer, expert, name in itertools.product(range(2), range(NUM_EXPERTS), layer_sizes):
        path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
        num_inputs, num_outputs = layer_sizes[name]
        tensors[f"{path}.lora_A.weight"] = 0.1 * torch.randn(LORA_RANK, num_inputs)
        tensors[f"{path}.lora_B.weight"] = 0.1 * torch.randn(num_outputs, LORA_RANK)
    save_file(tensors, file)
    config = read_lora_config(tmp_path / "adapter") | {"target_modules": ["q_proj", *layer_sizes]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    run_merge(tmp_path / "adapter", base, tmp_path / "out")
    expected = compute_peft_outputs("qwen3-moe", base, tmp_path / "adapter")
    torch.testing.assert_close(compute_stored_outputs("qwen3-moe", tmp_path / "out"), expected, atol=2e-6, rtol=1e-4)
    incomplete = {name: tensor for name, tensor in tensors.items() if "experts.2.up_proj" not in name}
    with pytest.raises(CheckpointError, match="PEFT cannot put the LoRA on a Qwen3MoeForCausalLM"):
        merge_lora(incomplete, config, Checkpoint.open(base))


def test_experts_with_exchanged_factors_as_in_peft_before_0_19_are_merged(tmp_path, get_base):
    """Older versions took [experts, in, out] for the order of the dimensions, which exchanges A and B."""
    base, _ = get_base("qwen3-moe")
    write_lora(tmp_path / "adapter", "qwen3-moe", base, {"target_modules": ["q_proj"], "target_parameters": EXPERTS})
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    config = read_lora_config(tmp_path / "adapter")
    merged = merge_lora(adapter, config, Checkpoint.open(base)).tensors
    exchanged = dict(adapter)
    for a_name in [name for name in adapter if "experts" in name and "lora_A" in name]:
        b_name = a_name.replace("lora_A", "lora_B")
        a = adapter[a_name].reshape(NUM_EXPERTS, LORA_RANK, -1)
        b = adapter[b_name].reshape(-1, LORA_RANK, NUM_EXPERTS)
        exchanged |= {a_name: b.permute(2, 1, 0).flatten(0, 1), b_name: a.permute(2, 1, 0).flatten(1)}
    merged_exchanged = merge_lora(exchanged, config | {"peft_version": "0.18.1"}, Checkpoint.open(base)).tensors
    for name in merged:
        torch.testing.assert_close(merged_exchanged[name], merged[name], atol=1e-6, rtol=0)


def test_a_refused_merge_writes_nothing(tmp_path, get_base):
    base, _ = get_base("llama")
    write_lora(tmp_path / "adapter", "llama", base, {"target_modules": ["q_proj"], "lora_bias": True})
    options = ["weights", "merge-lora", "--adapter", str(tmp_path / "adapter"), "--base", str(base), "--out"]
    result = CliRunner().invoke(app, [*options, str(tmp_path / "out")])
    assert isinstance(result.exception, CheckpointError)
    assert "biases to 2 layers of a LlamaForCausalLM that have none" in str(result.exception)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter"]
    write_lora(tmp_path / "adapter", "llama", base, {"target_modules": ["q_proj"]})
    adapter = Checkpoint.open(tmp_path / "adapter")
    state = {
        name.replace(".weight", ".default.weight"): adapter[name] for name in adapter
    }  # the state dict of PEFT's model
    with pytest.raises(CheckpointError, match=r"remove `\.default`"):
        merge_lora(state, read_lora_config(tmp_path / "adapter"), Checkpoint.open(base))
    result = CliRunner().invoke(app, [*options, str(base)])
    assert isinstance(result.exception, OutcomeError)
    assert "is the folder of --base" in str(result.exception)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": float("nan")}, "scaling of .* is nan"),
        ({"trainable_token_indices": [4, 40]}, r"are not distinct rows of 40: \[40\]"),
        ({"trainable_token_indices": [4, 4]}, "are not distinct rows"),
        ({"target_modules": ["k_proj"]}, "lacks 4 tensors .*k_proj"),
        ({"r": "3"}, "Correct it to a number"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, get_base, changes, message):
    base, _ = get_base("llama")
    write_lora(tmp_path / "adapter", "llama", base, {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5]})
    with pytest.raises(CheckpointError, match=message):
        merge_folder(tmp_path / "adapter", base, **changes)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt2", "nomic"])
def test_peft_loads_an_extracted_lora(tmp_path, get_base, name):
    """At any energy, all experts of a parameter have one rank; at the whole energy, the LoRA is the fine-tune."""
    base, _ = get_base(name)
    with quiet():
        model = MODELS[name][0].from_pretrained(base)
        layers = {path for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}

        def is_matrix_of_a_layer(path):
            in_layer = "layers" in path or ".h." in path
            return in_layer and (path.removesuffix(".weight") in layers or "experts" in path)

        add_noise(model, 0.05, 2, is_matrix_of_a_layer)
        model.save_pretrained(tmp_path / "tuned")

    def extract(energy, out):
        options = ("--tuned", tmp_path / "tuned", "--old", base, "--energy", energy, "--out", out)
        run_command("weights", "extract-lora", *options)

    for energy in (1.0, 0.7):
        out = tmp_path / f"lora-{energy}"
        extract(energy, out)
        loaded_outputs = compute_peft_outputs(name, base, out)
        merged = merge_folder(out, base)
        if energy == 1:
            torch.testing.assert_close(loaded_outputs, compute_outputs(name, model), atol=5e-6, rtol=1e-3)
            tuned = Checkpoint.open(tmp_path / "tuned")
            for tensor in tuned:
                torch.testing.assert_close(merged[tensor], tuned[tensor], atol=1e-5, rtol=0)
    time = (out / "adapter_model.safetensors").stat().st_mtime_ns
    extract(energy, out)  # repeating an extraction does nothing
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == time
    with pytest.raises(OutcomeError, match="not made from the same inputs"):
        extract(0.5, out)


def test_experts_that_are_stored_fused_are_extracted_fused(tmp_path):
    """GPT-OSS stores its experts in one tensor, [experts, in, out]."""
    sizes = MODEL_SIZES | GROUPED | {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.GptOssConfig(**sizes, layer_types=["full_attention"] * 2))
    model.save_pretrained(tmp_path / "old")
    add_noise(model, 0.05, is_changed=lambda name: name.endswith(("_proj", "q_proj.weight")))
    model.save_pretrained(tmp_path / "tuned")
    tuned, old = Checkpoint.open(tmp_path / "tuned"), Checkpoint.open(tmp_path / "old")
    lora = extract_lora(tuned, old, energy=1.0, architecture=class_of(tuned))
    merged = merge_lora(lora.tensors, lora.config, old).tensors
    for name in tuned:
        torch.testing.assert_close(merged[name], tuned[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_lora_of_experts_is_converted_to_full_and_back(tmp_path, get_base):
    base = Base.open(get_base("qwen3-moe")[0])
    labels = {"num_labels": 2, "id2label": {0: "negative", 1: "positive"}}
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], target_parameters=EXPERTS)
    with quiet():
        auto_class = transformers.AutoModelForSequenceClassification
        model = get_peft_model(auto_class.from_pretrained(base.path, **labels, pad_token_id=0), config)
        add_noise(model, seed=1, is_changed=lambda name: "lora_" in name)
        model.save_pretrained(tmp_path / "adapter")
    expected = compute_outputs("qwen3-moe", model)
    convert(tmp_path / "adapter", base, tmp_path / "full", "full")
    convert(tmp_path / "full", base, tmp_path / "lora", "lora", energy=1.0)
    for folder in ("full", "lora"):
        converted = load_model(load_adaptation(tmp_path / folder), base, make_head("LABEL_0", "LABEL_1"))
        torch.testing.assert_close(compute_outputs("qwen3-moe", converted), expected, atol=2e-6, rtol=1e-3)
