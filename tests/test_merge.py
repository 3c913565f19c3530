"""LoRAs merged as PEFT merges them, whatever they tune, and drawn out again: against the tuned model's own outputs."""

import functools
import json

import pytest
import torch
import transformers
from helpers import make_head, make_tokenizer, run_command
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

SIZE = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 66, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODELS = {
    "bert": (AutoModelForMaskedLM, "Bert", SIZE),
    "bert-bare": (AutoModel, "Bert", SIZE),
    "deberta": (AutoModelForMaskedLM, "DebertaV2", SIZE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "distilbert": (
        AutoModelForMaskedLM,
        "DistilBert",
        {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    ),
    "gemma3": (AutoModelForCausalLM, "Gemma3Text", SIZE | {"num_key_value_heads": 2, "head_dim": 16}),
    "gpt2": (
        AutoModelForCausalLM,
        "GPT2",
        {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "llama": (AutoModelForCausalLM, "Llama", SIZE),
    "llama-tied": (AutoModelForCausalLM, "Llama", SIZE | {"tie_word_embeddings": True}),
    "mixtral": (AutoModelForCausalLM, "Mixtral", SIZE | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "neox": (AutoModelForCausalLM, "GPTNeoX", SIZE),
    "nomic": (AutoModelForMaskedLM, "NomicBert", SIZE),
    "qwen3-moe": (AutoModelForCausalLM, "Qwen3Moe", SIZE | MOE | {"moe_intermediate_size": 24}),
    "roberta": (AutoModelForMaskedLM, "Roberta", SIZE),
    "t5": (
        AutoModelForSeq2SeqLM,
        "T5",
        {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0},
    ),
}
KINDS = {AutoModelForCausalLM: "CAUSAL_LM", AutoModelForSeq2SeqLM: "SEQ_2_SEQ_LM", AutoModel: "FEATURE_EXTRACTION"}
FAST = [
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


def write_base(folder, name):
    auto, family, sizes = MODELS[name]
    torch.manual_seed(0)
    model = auto.from_config(getattr(transformers, f"{family}Config")(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases begin as nothing
    model.save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return folder


def tune(folder, name, base, settings, rows=None):
    """Write a LoRA with something in every tensor that it tunes."""
    with quiet():
        plain = MODELS[name][0].from_pretrained(base)
        if rows:
            plain.resize_token_embeddings(rows, mean_resizing=False)
        kind = {"task_type": KINDS.get(MODELS[name][0]), "r": 3, "lora_alpha": 5}
        model = get_peft_model(plain, LoraConfig(**kind | settings))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return model


def outputs(name, model):
    more = {"decoder_input_ids": torch.tensor([[0, 7, 8]])} if name == "t5" else {}
    with torch.no_grad():
        output = model.eval()(
            input_ids=torch.tensor([[7, 9, 12, 20, 8], [11, 30, 6, 15, 22]])[: 1 if more else 2], **more
        )
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def reload(name, folder):
    with quiet():
        model, report = MODELS[name][0].from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] | report["mismatched_keys"] | report["unexpected_keys"]
    return outputs(name, model)


def as_peft_loads(name, base, adapter):
    with quiet():
        model = PeftModel.from_pretrained(MODELS[name][0].from_pretrained(base), adapter)
    return outputs(name, model)


@pytest.fixture(scope="module")
def get_base(tmp_path_factory):
    """The base of an architecture and its outputs, made when they are first asked for."""
    folder = tmp_path_factory.mktemp("bases")

    @functools.cache
    def build(name):
        return write_base(folder / name, name), reload(name, folder / name)

    return build


def check_merged(tmp_path, get_base, name, settings):
    base, plain = get_base(name)
    tune(tmp_path / "adapter", name, base, settings)
    if "task_type" in settings:  # nor does the base name its class
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"architectures": None}))
    run_command("weights", "merge-lora", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "out")
    expected = as_peft_loads(name, base, tmp_path / "adapter")
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(reload(name, tmp_path / "out"), expected, atol=2e-6, rtol=1e-4)


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::peft.utils.warning.PeftWarning")


@pytest.mark.parametrize(("name", "settings"), FAST)
def test_what_is_merged_is_the_tuned_model(tmp_path, get_base, name, settings):
    check_merged(tmp_path, get_base, name, settings)


SETTINGS = {
    "biases": {"target_modules": "linear", "bias": "lora_only"},
    "dora": {"target_modules": "linear", "use_dora": True},
    "a-layer": {"target_modules": "linear", "layers_to_transform": [1]},
    "embeddings": {"target_modules": "ends"},
    "whole-embeddings": {"target_modules": "linear", "modules_to_save": "embeddings"},
    "whole-head": {"target_modules": "linear", "modules_to_save": "head"},
}
TABLE = [  # every third cell in turn, so that each architecture and each setting is met; `make contract` runs them all
    pytest.param(name, settings, id=f"{name}-{setting}", marks=[pytest.mark.contract] * bool((row + column) % 3))
    for row, name in enumerate(sorted(MODELS))
    for column, (setting, settings) in enumerate(SETTINGS.items())
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), TABLE)
def test_every_architecture_is_merged(tmp_path, get_base, name, settings):
    auto, family, sizes = MODELS[name]
    with torch.device("meta"):
        model = auto.from_config(getattr(transformers, f"{family}Config")(**sizes))
    paths = {id(module): path for path, module in model.named_modules()}
    inside = [p for p, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and ".0." in p]
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is None and "head" in settings.values():
        pytest.skip("the bare body has no output layer")
    parts = {
        "linear": sorted({path.rpartition(".")[2] for path in inside}),
        "embeddings": [paths[id(embeddings)]],
        "head": [paths.get(id(head))],
        "ends": [paths[id(end)] for end in (embeddings, head) if end is not None],
    }
    check_merged(tmp_path, get_base, name, {key: parts.get(str(value), value) for key, value in settings.items()})


@pytest.mark.parametrize(
    ("settings", "is_tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"trainable_token_indices": [4, 5]}, True),
    ],
)
def test_tied_tensors_are_two_where_one_side_was_tuned(tmp_path, get_base, settings, is_tied):
    check_merged(tmp_path, get_base, "llama-tied", {"target_modules": ["q_proj"], **settings})
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in Checkpoint.open(tmp_path / "out")) is not is_tied


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_added_tokens_are_in_what_is_merged(tmp_path, get_base, name):
    base, _ = get_base(name)
    model = tune(tmp_path / "adapter", name, base, {"target_modules": ["q_proj"]}, rows=45)
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    run_command("weights", "merge-lora", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 45
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)
    torch.testing.assert_close(reload(name, tmp_path / "out"), outputs(name, model), atol=2e-6, rtol=1e-4)


def test_a_text_model_inside_another_has_its_settings_in_their_place(tmp_path):
    """Write the sizes of added tokens and of an untied head into `text_config`, where the class reads them."""
    text = {**SIZE, "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=5, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    with quiet():
        model = transformers.Gemma3ForConditionalGeneration(config)
        model.save_pretrained(tmp_path / "base")
        model.resize_token_embeddings(45, mean_resizing=False)
        modules = ["embed_tokens", "lm_head"]
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                parameter.add_(("modules_to_save" in name) * 0.1 * torch.randn_like(parameter))
        tuned.save_pretrained(tmp_path / "adapter")
    run_command(
        "weights",
        "merge-lora",
        "--adapter",
        tmp_path / "adapter",
        "--base",
        tmp_path / "base",
        "--out",
        tmp_path / "out",
    )
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
    expected, adapter = Checkpoint.open(tmp_path / "expected"), Checkpoint.open(tmp_path / "adapter")
    merged = merge_lora(adapter, read_lora_config(tmp_path / "adapter"), Checkpoint.open(tmp_path / "base")).tensors
    assert merged.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name], atol=1e-6, rtol=0)


def test_rows_that_were_not_saved_are_missed(tmp_path, get_base):
    base, _ = get_base("llama")
    model = tune(tmp_path / "adapter", "llama", base, {"target_modules": ["q_proj", "embed_tokens"]}, rows=45)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(MismatchError, match=r"embed_tokens\.weight' is \(40, 32\), expected \(45, 32\)"):
        merge_lora(
            Checkpoint.open(tmp_path / "adapter"), read_lora_config(tmp_path / "adapter"), Checkpoint.open(base)
        )  # fmt: skip


def test_experts_one_by_one_as_transformers_4_had_them(tmp_path, get_base):
    base, _ = get_base("qwen3-moe")
    tune(tmp_path / "adapter", "qwen3-moe", base, {"target_modules": ["q_proj"]})
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    names = ("gate_proj", "up_proj", "down_proj")
    for path in (f"layers.{layer}.mlp.experts.{expert}.{n}" for layer in (0, 1) for expert in range(4) for n in names):
        inside, outside = (24, 32) if "down" in path else (32, 24)
        tensors[f"base_model.model.model.{path}.lora_A.weight"] = 0.1 * torch.randn(3, inside)
        tensors[f"base_model.model.model.{path}.lora_B.weight"] = 0.1 * torch.randn(outside, 3)
    save_file(tensors, file)
    config = read_lora_config(tmp_path / "adapter") | {"target_modules": ["q_proj", *names]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    run_command("weights", "merge-lora", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "out")
    expected = as_peft_loads("qwen3-moe", base, tmp_path / "adapter")
    torch.testing.assert_close(reload("qwen3-moe", tmp_path / "out"), expected, atol=2e-6, rtol=1e-4)
    incomplete = {name: tensor for name, tensor in tensors.items() if "experts.2.up_proj" not in name}
    with pytest.raises(CheckpointError, match="PEFT cannot put the LoRA on a Qwen3MoeForCausalLM"):
        merge_lora(incomplete, config, Checkpoint.open(base))


def test_experts_as_peft_before_0_19_had_them(tmp_path, get_base):
    """A and B were exchanged: [experts, in, out] was taken for the order of the dimensions."""
    base, _ = get_base("qwen3-moe")
    tune(tmp_path / "adapter", "qwen3-moe", base, {"target_modules": ["q_proj"], "target_parameters": EXPERTS})
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    config = read_lora_config(tmp_path / "adapter")
    merged = merge_lora(adapter, config, Checkpoint.open(base)).tensors
    exchanged = dict(adapter)
    for name in (n for n in adapter if "experts" in n and "lora_A" in n):
        b_name = name.replace("lora_A", "lora_B")
        a, b = adapter[name].reshape(4, 3, -1), adapter[b_name].reshape(len(adapter[b_name]), 3, 4)
        exchanged |= {name: b.permute(2, 1, 0).flatten(0, 1), b_name: a.permute(2, 1, 0).flatten(1)}
    merged_exchanged = merge_lora(exchanged, config | {"peft_version": "0.18.1"}, Checkpoint.open(base)).tensors
    for name in merged:
        torch.testing.assert_close(merged_exchanged[name], merged[name], atol=1e-6, rtol=0)


def test_a_refusal_leaves_nothing_behind(tmp_path, get_base):
    base, _ = get_base("llama")
    tune(tmp_path / "adapter", "llama", base, {"target_modules": ["q_proj"], "lora_bias": True})
    options = ["weights", "merge-lora", "--adapter", str(tmp_path / "adapter"), "--base", str(base), "--out"]
    result = CliRunner().invoke(app, [*options, str(tmp_path / "out")])
    assert isinstance(result.exception, CheckpointError)
    assert "biases to 2 layers of a LlamaForCausalLM that have none" in str(result.exception)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter"]
    tune(tmp_path / "adapter", "llama", base, {"target_modules": ["q_proj"]})
    adapter = Checkpoint.open(tmp_path / "adapter")
    state = {name.replace(".weight", ".default.weight"): adapter[name] for name in adapter}  # that of PEFT's model
    with pytest.raises(CheckpointError, match=r"remove `\.default`"):
        merge_lora(state, read_lora_config(tmp_path / "adapter"), Checkpoint.open(base))
    result = CliRunner().invoke(app, [*options, str(base)])
    assert isinstance(result.exception, OutcomeError)
    assert "is the folder of --base" in str(result.exception)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"lora_alpha": float("nan")}, "scaling of .* is nan"),
        ({"trainable_token_indices": [4, 40]}, r"are not distinct rows of 40: \[40\]"),
        ({"trainable_token_indices": [4, 4]}, "are not distinct rows"),
        ({"target_modules": ["k_proj"]}, "lacks 4 tensors .*k_proj"),
        ({"r": "3"}, "not a number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, get_base, setting, reason):
    base, _ = get_base("llama")
    tune(tmp_path / "adapter", "llama", base, {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5]})
    config = read_lora_config(tmp_path / "adapter") | setting
    with pytest.raises(CheckpointError, match=reason):
        merge_lora(Checkpoint.open(tmp_path / "adapter"), config, Checkpoint.open(base))


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt2", "nomic"])
def test_a_lora_drawn_out_is_one_that_peft_loads(tmp_path, get_base, name):
    """At any energy, experts of one parameter have one rank; at the whole energy it is the fine-tune."""
    base, _ = get_base(name)
    with quiet():
        model = MODELS[name][0].from_pretrained(base)
        layers = {path for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
        torch.manual_seed(2)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "layers" in path or ".h." in path:
                    is_matrix = path.removesuffix(".weight") in layers or "experts" in path
                    parameter.add_(is_matrix * 0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "tuned")
    for energy in (1.0, 0.7):
        out = tmp_path / f"lora-{energy}"
        arguments = ("extract-lora", "--tuned", tmp_path / "tuned", "--old", base, "--energy", energy, "--out", out)
        run_command("weights", *arguments)
        expected = as_peft_loads(name, base, out)
        merged = merge_lora(Checkpoint.open(out), read_lora_config(out), Checkpoint.open(base)).tensors
        if energy == 1:
            torch.testing.assert_close(expected, outputs(name, model), atol=5e-6, rtol=1e-3)
            tuned = Checkpoint.open(tmp_path / "tuned")
            for tensor in tuned:
                torch.testing.assert_close(merged[tensor], tuned[tensor], atol=1e-5, rtol=0)
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    run_command("weights", *arguments)  # the same again: nothing is result
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before
    result = CliRunner().invoke(app, ["weights", *map(str, arguments[:-3]), "0.5", "--out", str(out)])
    assert "made from other inputs" in str(result.exception)


def test_experts_that_peft_fuses_from_no_names_are_drawn_out_fused(tmp_path):
    """GPT-OSS keeps its experts in one tensor, [experts, in, out], on disk too."""
    sizes = SIZE | {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    old = AutoModelForCausalLM.from_config(transformers.GptOssConfig(**sizes, layer_types=["full_attention"] * 2))
    old.save_pretrained(tmp_path / "old")
    with torch.no_grad():
        for path, parameter in old.named_parameters():
            parameter.add_(path.endswith(("_proj", "q_proj.weight")) * 0.05 * torch.randn_like(parameter))
    old.save_pretrained(tmp_path / "tuned")
    tuned, before = Checkpoint.open(tmp_path / "tuned"), Checkpoint.open(tmp_path / "old")
    lora = extract_lora(tuned, before, energy=1.0, architecture=class_of(tuned))
    merged = merge_lora(lora.tensors, lora.config, before).tensors
    for name in tuned:
        torch.testing.assert_close(merged[name], tuned[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_lora_of_experts_is_converted_both_ways(tmp_path, get_base):
    base = Base.open(get_base("qwen3-moe")[0])
    labels = ("negative", "positive")
    with quiet():
        auto = transformers.AutoModelForSequenceClassification
        plain = auto.from_pretrained(base.path, num_labels=2, id2label=dict(enumerate(labels)), pad_token_id=0)
        model = get_peft_model(
            plain, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], target_parameters=EXPERTS)
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter")
    expected = outputs("qwen3-moe", model)
    convert(tmp_path / "adapter", base, tmp_path / "full", "full")
    convert(tmp_path / "full", base, tmp_path / "lora", "lora", energy=1.0)
    for folder in ("full", "lora"):
        converted = load_model(load_adaptation(tmp_path / folder), base, make_head("LABEL_0", "LABEL_1"))
        torch.testing.assert_close(outputs("qwen3-moe", converted), expected, atol=2e-6, rtol=1e-3)
