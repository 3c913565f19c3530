"""What comes out loads elsewhere: the rules of servers, LoRAs of one rank and one scale, and plain PEFT."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import (
    EXPERTS,
    GROUPED,
    NUM_EXPERTS,
    SIZES,
    WORDS,
    add_noise,
    have_equal_tensors,
    make_tokenizer,
    read_weights,
    run_command,
    write_base,
)
from helpers import compute_logits as compute_classifier_logits
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig
from typer.testing import CliRunner

from regraft import Base, Upgrade, convert, load_outcome, recycle
from regraft.adaptation import (
    check_servable,
    extract_lora,
    set_served_base,
    uniform_lora,
    write_tokenizer,
    write_uniform,
)
from regraft.cli import app
from regraft.errors import CheckpointError, RecipeError
from regraft.progress import quiet

# PEFT says so when it corrects a setting for Conv1D, and when it stores embeddings that a LoRA adapts
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "fan_in_fan_out",
        "Setting `save_embedding_layers`",
        "Could not find a config file",
        "`lora_bias=True`",
    )
]

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
OTHER_TEMPLATE = "{% for message in messages %}this {{ message.content }} {% endfor %}"
ATTENTION = ["q_proj", "v_proj"]
PROMPT = "the film was very"

UNEVEN: dict[str, dict[str, Any]] = {
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "rslora with an alpha that is not whole": {"r": 3, "lora_alpha": 8, "use_rslora": True},
    "alpha pattern": {"r": 4, "lora_alpha": 7, "alpha_pattern": {"q_proj": 12}},
    "rank pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2, r"0\.self_attn\.q_proj": 6}},
    "patterns with regular expressions": {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {r"model\.layers\.[1-9].*_proj": 7},
        "alpha_pattern": {r".*\.(q|v)_proj": 11, r"layers\.0\..*": 2},
    },
    "rslora with patterns": {"r": 4, "use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 3}},
    "embeddings": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["embed_tokens", *ATTENTION],
        "rank_pattern": {"embed_tokens": 2},
    },
    "dora": {"r": 4, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "all linear": {"r": 2, "target_modules": "all-linear", "alpha_pattern": {"down_proj": 3}},
    "regular expression": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.1\.self_attn\.[qv]_proj"},
    "whole modules": {"r": 4, "use_rslora": True, "modules_to_save": ["lm_head"]},
}
GPT2: dict[str, dict[str, Any]] = {
    "conv1d": {"r": 4, "use_rslora": True, "rank_pattern": {"c_fc": 2}, "alpha_pattern": {r"h\.1\..*c_attn": 5}},
    "conv1d with biases": {"r": 4, "alpha_pattern": {"c_attn": 5}, "lora_bias": True},
}

# For adapters that PEFT writes, what blocks vLLM and SGLang; None if nothing does
VERDICTS: dict[str, tuple[dict[str, Any], tuple[str, str] | None, tuple[str, str] | None]] = {
    "all-linear": ({"target_modules": "all-linear"}, None, None),
    "regular expression": (
        {"target_modules": r".*\.(q|v)_proj"},
        None,
        ("refused", "target_modules are a regular expression"),
    ),
    "whole modules": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        ("refused", "modules_to_save: embed_tokens, lm_head"),
        ("wrong", "without modules_to_save"),
    ),
    "rows of tokens": (
        {"trainable_token_indices": [6, 7]},
        ("refused", "trainable_token_indices"),
        ("wrong", "without trainable_token_indices"),
    ),
    "rslora": ({"use_rslora": True}, None, ("wrong", "ignores use_rslora")),
    "dora": ({"use_dora": True}, ("refused", "DoRA"), ("refused", "DoRA")),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 3}}, ("wrong", "alpha_pattern"), ("refused", "alpha_pattern")),
    "rank pattern": ({"rank_pattern": {"q_proj": 3}}, ("wrong", "rank_pattern"), ("refused", "rank_pattern")),
    "pattern without effect": ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 8}}, None, None),
    "bias": ({"bias": "lora_only"}, ("refused", "biases"), None),
    "large rank": ({"r": 600}, ("refused", "rank is 600"), None),
    "pissa": ({"init_lora_weights": "pissa"}, ("wrong", "'pissa'"), ("wrong", "'pissa'")),
    "embeddings": ({"target_modules": ["embed_tokens", *ATTENTION]}, None, None),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A decoder with a chat template."""
    folder = write_base(tmp_path_factory.mktemp("base") / "base", "llama")
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A decoder of Conv1D layers."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=5 + len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return folder


def write_lora(folder: Path, base: Path, tokenizer: Any = None, config: Any = None, **settings: Any) -> Path:
    """Write an adapter with PEFT, whose tensors are all moved, and a tokenizer beside it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **settings}
    with quiet():
        adapted = get_peft_model(model, config or LoraConfig(**lora))
        add_noise(adapted, 0.2).save_pretrained(folder)
    if tokenizer is None:
        tokenizer = make_tokenizer("llama")
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def load_peft(folder: Path, base: Path) -> Any:
    """Load an adapter with PEFT."""
    with quiet():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def compute_deltas(model: Any) -> dict[str, torch.Tensor]:
    """Return PEFT's own delta of each adapted layer."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def compute_logits(model: Any) -> torch.Tensor:
    """Return a model's logits on a text."""
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 14, 20, 27, 6]])).logits


def read_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's config."""
    return json.loads((folder / "adapter_config.json").read_text())


def blocking(folder: Path, base: Path, server: str, served_base: str | None = None) -> list[tuple[str, str]]:
    """Return the severity and the text of each problem that blocks a server."""
    problems = check_servable(folder, base, served_base)
    return [(problem.severity, problem.problem) for problem in problems if problem.server == server and problem.blocks]


def remedies(folder: Path, base: Path, server: str = "vLLM") -> str:
    """Return the settings that a server needs, line by line."""
    problems = check_servable(folder, base)
    return "\n".join(p.remedy for p in problems if p.server == server and p.severity == "setting")


# One rank and one scale


@pytest.mark.parametrize("name", [*UNEVEN, *GPT2])
def test_a_lora_of_one_rank_and_one_scale_has_the_deltas_that_peft_computes(tmp_path, base, gpt2, name):
    settings = UNEVEN.get(name) or {**GPT2[name], "target_modules": ["c_attn", "c_fc"]}
    base = base if name in UNEVEN else gpt2
    folder = write_lora(tmp_path / "lora", base, **settings)
    before = load_peft(folder, base)
    assert write_uniform(folder)
    after = load_peft(folder, base)
    expected, deltas = compute_deltas(before), compute_deltas(after)
    assert deltas.keys() == expected.keys()
    for module, delta in deltas.items():
        torch.testing.assert_close(delta, expected[module], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(compute_logits(after), compute_logits(before), atol=1e-5, rtol=1e-5)

    config, tensors = read_config(folder), read_weights(folder)
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert isinstance(config["lora_alpha"], int) and isinstance(config["target_modules"], list)
    for stored, tensor in tensors.items():  # as a server computes it, from the config's rank and alpha alone
        if ".lora_A." in stored:
            module = stored.removesuffix(".lora_A.weight")
            delta = config["lora_alpha"] / config["r"] * tensors[f"{module}.lora_B.weight"] @ tensor
            wanted = expected[module]
            torch.testing.assert_close(delta, wanted if wanted.shape == delta.shape else wanted.T, atol=1e-6, rtol=1e-6)
        if ".lora_A." in stored or stored.endswith("embedding_A"):
            assert len(tensor) == config["r"]
    assert not write_uniform(folder)


@pytest.mark.parametrize("rank", [3, 4])
def test_rslora_on_fused_experts_is_folded(tmp_path, rank):
    torch.manual_seed(0)
    sizes = {**SIZES, **GROUPED, "num_local_experts": NUM_EXPERTS}
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes)).save_pretrained(tmp_path / "base")
    make_tokenizer("llama").save_pretrained(tmp_path / "base")
    settings = {"r": rank, "use_rslora": True, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    folder = write_lora(tmp_path / "lora", tmp_path / "base", **settings)
    before = load_peft(folder, tmp_path / "base")
    assert write_uniform(folder)
    after = load_peft(folder, tmp_path / "base")
    expected = compute_deltas(before)
    for module, delta in compute_deltas(after).items():
        torch.testing.assert_close(delta, expected[module], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(compute_logits(after), compute_logits(before), atol=1e-5, rtol=1e-5)
    assert sorted(read_config(folder)["target_parameters"]) == sorted(EXPERTS)
    assert not blocking(folder, tmp_path / "base", "vLLM")


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_regraft_loads_a_lora_that_became_uniform(tmp_path, opened_bases, saved_adaptations, encoded_dev, kind):
    base, examples = opened_bases["llama"][0], encoded_dev["llama"]
    folder = shutil.copytree(saved_adaptations["llama", kind][0], tmp_path / "copy")
    expected = compute_classifier_logits(folder, base, examples)
    assert write_uniform(folder) == (kind == "rslora")
    torch.testing.assert_close(compute_classifier_logits(folder, base, examples), expected, atol=1e-5, rtol=1e-5)


def test_a_uniform_lora_is_left_byte_equal(tmp_path, base):
    folder = write_lora(tmp_path / "lora", base, lora_alpha=5)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert not write_uniform(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not write_uniform(base)


def test_rslora_of_a_square_rank_keeps_its_factors(tmp_path, base):
    folder = write_lora(tmp_path / "lora", base, r=4, lora_alpha=8, use_rslora=True)
    before = read_weights(folder)
    write_uniform(folder)
    assert have_equal_tensors(before, read_weights(folder))
    assert read_config(folder)["lora_alpha"] == 16  # 16 / 4 is 8 / √4


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["mlp.experts.down_proj"], "alpha_pattern": {"q_proj": 3}},
    ],
)
def test_what_cannot_be_folded_is_left_as_it_is(settings):
    config = {"peft_type": "LORA", "r": 2, "use_rslora": True, "target_modules": ["q_proj"], **settings}
    tensors = {"base_model.model.q_proj.lora_A.weight": torch.ones(2, 3)}
    assert uniform_lora(tensors, config) == (tensors, config)


def test_half_precision_factors_are_folded_without_loss():
    name = "base_model.model.q_proj"
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(5, 3).bfloat16()
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj"]}
    folded, new_config = uniform_lora(tensors, config)
    scale = new_config["lora_alpha"] / new_config["r"]
    delta = scale * folded[f"{name}.lora_B.weight"].double() @ folded[f"{name}.lora_A.weight"].double()
    torch.testing.assert_close(delta, 7 / 3**0.5 * b.double() @ a.double(), atol=1e-6, rtol=1e-6)


def test_a_pattern_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("regraft.adaptation.patterns.TIMEOUT_SECONDS", 0.5)
    name = "base_model.model." + "a" * 40
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 3), f"{name}.lora_B.weight": torch.ones(3, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"(a+)+b": 3}}
    with pytest.raises(CheckpointError, match="seconds"):
        uniform_lora(tensors, config)


# The rules of servers


@pytest.mark.parametrize("name", VERDICTS)
def test_adapters_that_peft_writes_have_the_expected_verdicts(tmp_path, base, name):
    settings, *expected = VERDICTS[name]
    folder = write_lora(tmp_path / "lora", base, **settings)
    for server, verdict in zip(("vLLM", "SGLang"), expected, strict=True):
        problems = blocking(folder, base, server)
        if verdict is None:
            assert problems == []
        else:
            severity, text = verdict
            assert [severity] == [found for found, _ in problems]
            assert text in problems[0][1]


@pytest.mark.parametrize(
    "config", [IA3Config(task_type="CAUSAL_LM"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)]
)
def test_other_types_of_adapters_are_refused(tmp_path, base, config):
    folder = write_lora(tmp_path / "adapter", base, config=config)
    for server in ("vLLM", "SGLang"):
        assert [severity for severity, _ in blocking(folder, base, server)] == ["refused"]


def test_uneven_loras_are_servable_once_they_are_uniform(tmp_path, base):
    for name in ("rslora with patterns", "regular expression", "rank pattern"):
        folder = write_lora(tmp_path / name, base, **UNEVEN[name])
        write_uniform(folder)
        assert not blocking(folder, base, "vLLM") and not blocking(folder, base, "SGLang")


def test_modules_that_a_server_cannot_adapt_are_refused(tmp_path, gpt2):
    tokenizer = make_tokenizer("llama")
    folder = write_lora(tmp_path / "lora", gpt2, tokenizer, target_modules=["c_attn"])
    assert blocking(folder, gpt2, "SGLang") == [("refused", "it cannot adapt c_attn")]
    assert not blocking(folder, gpt2, "vLLM")
    folder = write_lora(tmp_path / "embeddings", gpt2, tokenizer, target_modules=["wte"])
    assert ("refused", "it cannot adapt wte") in blocking(folder, gpt2, "vLLM")


def test_the_flag_for_the_rank_is_the_smallest_that_vllm_knows(tmp_path, base):
    for rank, flag in ((16, None), (17, "32"), (200, "256"), (300, "320")):
        needed = remedies(write_lora(tmp_path / str(rank), base, r=rank), base)
        assert f"--max-lora-rank {flag}" in needed if flag else "--max-lora-rank" not in needed


def test_a_full_fine_tune_is_served_alone(bases, saved_adaptations):
    folder = saved_adaptations["llama", "full"][0]
    problems = check_servable(folder, bases["llama"][0])
    assert [problem.severity for problem in problems] == ["setting", "setting"]
    assert f"vllm serve {folder}" in problems[0].remedy


def test_the_resolver_compares_the_recorded_base_as_a_string(tmp_path, base):
    folder = write_lora(tmp_path / "lora", base)
    assert f"vllm serve {base}" in remedies(folder, base)
    assert [severity for severity, _ in blocking(folder, base, "vLLM", "org/base")] == ["refused"]
    assert not blocking(folder, base, "SGLang", "org/base")
    set_served_base(folder, "org/base")
    assert check_servable(folder, base, "org/base") == []


def test_added_chat_tokens_are_refused(tmp_path, base):
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = "<|im_start|>" + TEMPLATE
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    whole = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    with quiet():
        add_noise(get_peft_model(model, LoraConfig(**whole))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for server in ("vLLM", "SGLang"):
        assert any("2 tokens that the base lacks" in text for _, text in blocking(tmp_path, base, server))
    assert "--chat-template" in remedies(tmp_path, base)


def test_tokens_for_rows_that_the_base_does_not_use_need_a_tokenizer(tmp_path):
    base = write_base(tmp_path / "base", "llama", vocab_size=48)  # five more rows than tokens
    tokenizer = make_tokenizer("llama")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    folder = write_lora(tmp_path / "padded", base, tokenizer)
    assert "--tokenizer" not in remedies(folder, base)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    folder = write_lora(tmp_path / "chat", base, tokenizer)
    assert f"--tokenizer (SGLang: --tokenizer-path) {folder}" in remedies(folder, base)
    assert not blocking(folder, base, "vLLM")


def test_embeddings_that_a_lora_changed_and_stored_are_ignored_by_servers(tmp_path, base):
    settings = {"target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    with quiet():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        add_noise(model, is_changed=lambda name: "embed_tokens" in name).save_pretrained(tmp_path)
    assert any("embed_tokens.base_layer.weight" in text for _, text in blocking(tmp_path, base, "vLLM"))


def test_another_chat_template_needs_a_setting_that_names_its_file(tmp_path, base):
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = OTHER_TEMPLATE
    folder = write_lora(tmp_path / "lora", base, tokenizer)
    for server in ("vLLM", "SGLang"):
        assert f"--chat-template {folder / 'chat_template.jinja'}" in remedies(folder, base, server)
        assert not blocking(folder, base, server)

    # older versions of transformers write it into the tokenizer's config
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OTHER_TEMPLATE}))
    assert f"write chat_template of {folder / 'tokenizer_config.json'} to a file" in remedies(folder, base)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    assert "chat" not in remedies(folder, base)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "/v1/completions" in remedies(folder, base)


def test_another_end_or_beginning_of_text_needs_a_setting(tmp_path, base):
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token = TEMPLATE, "<mask>", "<unk>"
    needed = remedies(write_lora(tmp_path / "lora", base, tokenizer), base)
    assert '"stop_token_ids": [4]' in needed
    assert "--tokenizer" in needed


def test_tokens_with_other_ids_make_answers_wrong(tmp_path, base):
    folder = write_lora(tmp_path / "lora", base)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    file.write_text(json.dumps(content))
    assert blocking(folder, base, "vLLM") == [("wrong", "2 tokens have other ids than in the base ('bad', 'good')")]


def test_a_folder_without_a_tokenizer_is_mentioned(tmp_path, base):
    folder = write_lora(tmp_path / "lora", base)
    for pattern in ("tokenizer*", "*.jinja"):
        for file in folder.glob(pattern):
            file.unlink()
    assert "copy the tokenizer" in remedies(folder, base)


def test_the_command_prints_a_table_and_its_status_is_that_of_the_needed_servers(tmp_path, base):
    folder = write_lora(tmp_path / "lora", base, use_rslora=True)
    arguments = ["adaptation", "servable", str(folder), "--base", str(base)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "vLLM serves it, with the settings below" in result.output
    assert "SGLang does not serve it" in result.output
    assert "use_rslora" in result.output
    assert "SGLang" not in run_command(*arguments, "--server", "vllm")
    assert CliRunner().invoke(app, [*arguments, "--server", "sglang"]).exit_code == 1
    problems = json.loads(run_command(*arguments, "--server", "vLLM", "--json", "--served-base", str(base)))
    assert problems == []
    assert run_command(*arguments, "--server", "vllm", "--served-base", str(base)).strip() == "vLLM serves it"
    with pytest.raises(RecipeError, match="a server must be vllm or sglang, found 'tgi'"):
        run_command(*arguments, "--server", "tgi")


# The served base, and other tools


def test_recycling_records_the_served_base_if_it_is_passed(tmp_path, bases, saved_adaptations, task_file):
    upgrade = Upgrade(*bases["bert"])
    source = saved_adaptations["bert", "lora"][0]
    plain = recycle(upgrade, source, task_file, "direct", tmp_path / "plain")
    served = recycle(upgrade, source, task_file, "direct", tmp_path / "served", served_base="org/base")
    for outcome, name in ((plain, str(bases["bert"][1])), (served, "org/base")):
        assert read_config(outcome.path / "adaptation")["base_model_name_or_path"] == name
    assert have_equal_tensors(read_weights(plain.path / "adaptation"), read_weights(served.path / "adaptation"))
    _, metadata, _ = (served.path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["regraft", "lora"],
    }
    assert "served_base" not in plain.record.inputs
    assert "base_model" not in (plain.path / "README.md").read_text().split("---\n")[1]
    assert load_outcome(served.path).record.inputs["served_base"] == "org/base"
    full = saved_adaptations["bert", "full"][0]
    with pytest.raises(RecipeError, match="is served alone"):
        recycle(upgrade, full, task_file, "direct", tmp_path / "full", served_base="org/base")
    with pytest.raises(RecipeError, match="served_base"):
        set_served_base(full, "org/base")


def test_conversion_records_the_served_base(tmp_path, bases, saved_adaptations):
    full, old = saved_adaptations["bert", "full"][0], bases["bert"][0]
    convert(full, old, tmp_path / "lora", "lora", rank=2, served_base="org/base")
    assert read_config(tmp_path / "lora")["base_model_name_or_path"] == "org/base"
    with pytest.raises(RecipeError, match="served_base apply to a LoRA only"):
        convert(saved_adaptations["bert", "lora"][0], old, tmp_path / "full", "full", served_base="org/base")


def test_an_extracted_lora_of_uneven_ranks_becomes_uniform(tmp_path, base):
    uneven = {"target_modules": "all-linear", "rank_pattern": {"q_proj": 1, "down_proj": 2}}
    merged = load_peft(write_lora(tmp_path / "lora", base, **uneven), base).merge_and_unload()
    merged.save_pretrained(tmp_path / "full")
    lora = extract_lora(Base.open(tmp_path / "full").checkpoint, Base.open(base).checkpoint, None, 0.999)
    assert lora.config["rank_pattern"]
    tensors, config = uniform_lora(lora.tensors, lora.config)
    assert {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name} == {config["r"]}
    for name in (name for name in tensors if ".lora_A." in name):
        b_name = name.replace("lora_A", "lora_B")
        delta = config["lora_alpha"] / config["r"] * tensors[b_name] @ tensors[name]
        torch.testing.assert_close(delta, lora.tensors[b_name] @ lora.tensors[name], atol=1e-6, rtol=1e-6)


PLAIN_SCRIPT = """
import json, sys
sys.modules["regraft"] = None  # any import of it fails
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
folder, prompt = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
tokens = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=12, do_sample=False)
print(json.dumps([text, tokens[0].tolist()]))
"""


def test_plain_peft_and_transformers_generate_the_same_tokens(tmp_path, base):
    folder = write_lora(tmp_path / "lora", base, **UNEVEN["rslora with patterns"])
    expected_model = load_peft(folder, base)
    for file in (*folder.glob("tokenizer*"), folder / "chat_template.jinja"):
        file.unlink()
    opened = Base.open(base)
    write_tokenizer(opened, folder)
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    write_uniform(folder)
    set_served_base(folder, str(base))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", PLAIN_SCRIPT, str(folder), PROMPT],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    text, tokens = json.loads(process.stdout.splitlines()[-1])
    assert text == PROMPT + " "
    prompt = opened.tokenizer(text, return_tensors="pt")["input_ids"]
    expected = expected_model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    assert tokens == expected[0].tolist()


def test_a_tokenizer_that_replaces_the_base_s_brings_its_chat_template(tmp_path, base):
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = OTHER_TEMPLATE
    write_tokenizer(dataclasses.replace(Base.open(base), tokenizer_override=tokenizer), tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == OTHER_TEMPLATE
