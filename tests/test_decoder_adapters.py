"""Adapters of language models as PEFT, TRL, Axolotl and Unsloth write them: taken whole, and grafted exactly."""

from __future__ import annotations

import copy
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from helpers import WORDS, add_noise, make_sentence, make_tokenizer, read_jsonl, update_json, write_upgrade
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from regraft import Base, Recipe, Upgrade, load_adaptation, recycle
from regraft.adaptation import load_model, write_graft
from regraft.adaptation.template import with_deployment_tokenizers
from regraft.adaptation.tokens import with_adaptation_tokens
from regraft.errors import CheckpointError, MismatchError
from regraft.model.outputs import forward
from regraft.progress import quiet, silent
from regraft.task import Head, TextGeneration

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    # PEFT and TRL use names that transformers changed
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
]

FP32 = Recipe(precision="fp32")
HEAD = Head(TextGeneration, ())
UNTIED = {"tie_word_embeddings": False}
VOCABULARY = 5 + len(WORDS)
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 66}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "vocab_size": VOCABULARY + 5, "tie_word_embeddings": True}),
}
"""The config class of each architecture, and settings that change or extend `COMMON`; Qwen3 has rows without tokens."""


@pytest.fixture(scope="module")
def upgrades(tmp_path_factory) -> dict[str, Upgrade]:
    folder = tmp_path_factory.mktemp("bases")
    pairs = {}
    for name, (config_class, settings) in SETTINGS.items():
        common = {} if name == "gpt2" else COMMON
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**{**common, **settings}))
        old = folder / f"{name} old"
        add_noise(model, 0.1, seed=0, is_changed=lambda _: True).save_pretrained(old)
        make_tokenizer("llama").save_pretrained(old)
        pairs[name] = Upgrade(Base.open(old), Base.open(write_upgrade(old, folder / f"{name} new", 0.3)))
    return pairs


Case = dict[str, Any]
CASES: dict[str, Case] = {
    "all linear layers": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*layers\.1\..*\.(q_proj|v_proj|down_proj)"},
    "embeddings and head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tied embeddings and head": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "rows of tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7, 6]},
    "rows of tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 7, 6], "lm_head": [9, 8]},
    },
    "tied rows of tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [5, 7, 6],
        "ensure_weight_tying": True,
    },
    "rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 3, r"layers\.0\..*down_proj": 1},
        "alpha_pattern": {"q_proj": 7, "down_proj": 1},
        "use_rslora": True,
    },
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "biases": {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
    "LoRA bias": {"target_modules": ["q_proj"], "lora_bias": True},  # which PEFT merges only into a bias
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "PiSSA": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
}
GPT2_NAMES = {
    "q_proj": "c_attn",
    "k_proj": "c_fc",
    "v_proj": "c_fc",
    "down_proj": "mlp.c_proj",
    "embed_tokens": "wte",
    "norm": "ln_f",
    r".*layers\.1\..*\.(q_proj|v_proj|down_proj)": r".*h\.1\..*\.(c_attn|c_fc|c_proj)",
    r"layers\.0\..*down_proj": r"h\.0\..*c_proj",
}
"""The names of modules and patterns in GPT-2."""
ADDED_TOKENS = ["<|im_start|>", "<|im_end|>"]
ADDED_CASES: dict[str, Case] = {
    "embeddings and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [43, 44], "lm_head": [43, 44]}},
    "rows of embeddings": {"trainable_token_indices": [43, 44]},
    "resized alone": {},
}
"""The settings of LoRAs that were tuned after the tokens `ADDED_TOKENS` were added, with ids 43 and 44."""
TOKEN_MATRICES = ("embed_tokens.weight", "wte.weight", "lm_head.weight")


def rename(value: Any, names: dict[str, str]) -> Any:
    """Replace names of modules in settings of a LoRA."""
    if isinstance(value, dict):
        return {names.get(key, key): rename(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return list(dict.fromkeys(rename(item, names) for item in value))
    return names.get(value, value) if isinstance(value, str) else value


def lora_settings(architecture: str, case: str) -> dict[str, Any]:
    """Return the settings of a case's LoRA on an architecture."""
    settings = {"r": 2, "lora_alpha": 5, "task_type": "CAUSAL_LM", **CASES[case]}
    if architecture == "gpt2":
        settings = {key: rename(value, GPT2_NAMES) for key, value in settings.items()}
        settings["fan_in_fan_out"] = True
    return settings


def write_adapter(base: Path, folder: Path, settings: dict[str, Any], rows: int | None = None) -> Any:
    """Write a LoRA with noise in all trained numbers, and return PEFT's model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = add_noise(get_peft_model(model, LoraConfig(**settings)), 0.2, seed=2)
    model.save_pretrained(folder)
    return model


def load_with_peft(base: Path, adapter: Path, rows: int | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a model with or without a LoRA, whose parameters may be tied, in float64."""
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    return {name: tensor.detach().double() for name, tensor in model.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def compute_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Compute the logits of a model of transformers or PEFT."""
    return model.eval()(input_ids=ids).logits


@torch.no_grad()
def compute_rows(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Compute the logits of a model as regraft does for losses."""
    examples, tokens = (indices.flatten() for indices in torch.meshgrid(*map(torch.arange, ids.shape), indexing="ij"))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "example": examples,
        "token": tokens,
    }
    return forward(model.eval(), batch).logits.dense().reshape(*ids.shape, -1)


def draw_ids(highest: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, highest, (4, 9), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def covered(cases: dict[str, Case]) -> list[Any]:
    """Pair each case with Llama, tied or not, and another architecture; `make contract` runs all pairs."""
    first, tied, *others = SETTINGS
    cells = []
    for i, case in enumerate(cases):
        chosen = {first if i % 2 else tied, others[i % len(others)]}
        if {"modules_to_save", "trainable_token_indices"} & cases[case].keys():
            chosen |= {first, tied}
        cells += [
            pytest.param(name, case, marks=[] if name in chosen else [pytest.mark.contract])
            for name in SETTINGS
            if case != "LoRA bias" or name == "gpt2"
        ]
    return cells


def grafted_weights(upgrade: Upgrade, tuned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return new + (tuned − old) for each weight; rows that the bases lack are the tuned ones."""
    old, new = (weights_of(AutoModelForCausalLM.from_pretrained(base.path)) for base in (upgrade.old, upgrade.new))
    return {
        name: torch.cat([new[name] + tuned[name][: len(new[name])] - old[name], tuned[name][len(new[name]) :]])
        for name in old
    }


def dora_weights(upgrade: Upgrade, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a DoRA's layers on the new base, whose magnitudes change as on the old one."""
    old, new = (weights_of(AutoModelForCausalLM.from_pretrained(base.path)) for base in (upgrade.old, upgrade.new))
    stored = {name: tensor.double() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] / 2
    weights = {}
    for name, magnitude in stored.items():
        if not name.endswith(".lora_magnitude_vector"):
            continue
        module = name.removesuffix(".lora_magnitude_vector")
        parameter = module.removeprefix("base_model.model.") + ".weight"
        is_transposed = "transformer.h." in name  # Conv1D
        old_weight, new_weight = (base[parameter].T if is_transposed else base[parameter] for base in (old, new))
        sums = new_weight + scale * stored[f"{module}.lora_B.weight"] @ stored[f"{module}.lora_A.weight"]
        target = new_weight.norm(dim=1) + magnitude - old_weight.norm(dim=1)
        weight = target[:, None] * sums / sums.norm(dim=1, keepdim=True)
        weights[parameter] = weight.T if is_transposed else weight
    return weights


@pytest.mark.parametrize(("architecture", "case"), covered(CASES))
def test_a_lora_is_taken_whole_and_grafted_exactly(upgrades, tmp_path, architecture, case):
    """Outputs are those of PEFT; on the new base, B·A is added, and stored tensors are new + (stored − old)."""
    upgrade = upgrades[architecture]
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    write_adapter(upgrade.old.path, adapter, lora_settings(architecture, case))
    adaptation = load_adaptation(adapter)
    reference = load_with_peft(upgrade.old.path, adapter)
    ids = draw_ids(VOCABULARY)
    expected = compute_logits(reference, ids)
    assert (expected - compute_logits(AutoModelForCausalLM.from_pretrained(upgrade.old.path), ids)).abs().max() > 1e-3
    assert_outputs(load_model(adaptation, upgrade.old, HEAD), ids, expected)

    write_graft(adaptation, upgrade, out, silent)
    grafted = load_with_peft(upgrade.new.path, out)
    actual = weights_of(grafted)
    targets = dora_weights(upgrade, adapter) if case == "DoRA" else grafted_weights(upgrade, weights_of(reference))
    assert targets
    for name, target in targets.items():
        assert_close(actual[name], target)
    assert_outputs(load_model(load_adaptation(out), upgrade.new, HEAD), ids, compute_logits(grafted, ids))


@pytest.mark.parametrize(("architecture", "case"), covered(ADDED_CASES))
def test_a_lora_with_added_tokens_is_grafted_by_token(upgrades, tmp_path, architecture, case):
    """Rows of added tokens are copied; Qwen3's embeddings have rows to take, the others were resized."""
    upgrade = upgrades[architecture]
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    settings = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **ADDED_CASES[case]}
    if architecture == "gpt2":
        settings = {key: rename(value, GPT2_NAMES) for key, value in settings.items()}
    tokenizer = AutoTokenizer.from_pretrained(upgrade.old.path)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED_TOKENS})
    rows = None if architecture == "qwen3" else len(tokenizer)
    write_adapter(upgrade.old.path, adapter, settings, rows)
    if rows:
        with pytest.raises(CheckpointError, match="has no tokenizer to match them by"):
            with_adaptation_tokens(load_adaptation(adapter), upgrade)
    tokenizer.save_pretrained(adapter)
    adaptation = load_adaptation(adapter)
    reference = load_with_peft(upgrade.old.path, adapter, rows)
    task = TextGeneration(name="t", train="t.jsonl", metric="loss")
    grown = with_deployment_tokenizers(adaptation, with_adaptation_tokens(adaptation, upgrade), task)
    ids = draw_ids(len(tokenizer))
    assert_outputs(load_model(adaptation, grown.old, HEAD), ids, compute_logits(reference, ids))

    write_graft(adaptation, grown, out, silent)
    grafted = load_with_peft(upgrade.new.path, out, rows)
    actual, tuned = weights_of(grafted), weights_of(reference)
    old = weights_of(AutoModelForCausalLM.from_pretrained(upgrade.old.path))
    for name, target in grafted_weights(upgrade, tuned).items():
        if not rows and name.endswith(TOKEN_MATRICES) and not torch.equal(tuned[name], old[name]):
            target[43:45] = tuned[name][43:45]  # the bases have no such tokens, although they have the rows
        assert_close(actual[name], target)
    assert_outputs(load_model(load_adaptation(out), grown.new, HEAD), ids, compute_logits(grafted, ids))
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(ADDED_TOKENS) == [43, 44]


def assert_outputs(model: Any, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Check the logits of a model, and those that losses compute from its states and its head."""
    assert_close(compute_logits(model, ids), expected)
    assert_close(compute_rows(model, ids), expected)


@pytest.mark.parametrize("architecture", SETTINGS)
def test_a_full_fine_tune_is_grafted_with_its_head(upgrades, tmp_path, architecture):
    upgrade = upgrades[architecture]
    model = AutoModelForCausalLM.from_pretrained(upgrade.old.path)
    add_noise(model, 0.2, seed=2, is_changed=lambda _: True).save_pretrained(tmp_path / "tuned")
    write_graft(load_adaptation(tmp_path / "tuned"), upgrade, tmp_path / "out", silent)
    grafted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    actual = weights_of(grafted)
    for name, target in grafted_weights(upgrade, weights_of(model)).items():
        assert_close(actual[name], target)
    ids = draw_ids(VOCABULARY)
    carried = load_model(load_adaptation(tmp_path / "out"), upgrade.new, HEAD)
    assert_outputs(carried, ids, compute_logits(grafted, ids))


def write_task(folder: Path, template: bool = False) -> Path:
    """Write a task whose prompts are sentences and whose completions are two words."""
    rng = random.Random(0)
    for split, count in (("train", 12), ("dev", 4), ("test", 4)):
        rows = []
        for i in range(count):
            prompt, completion = make_sentence(rng, bool(i % 2)), "good day" if i % 2 else "bad"
            if template:
                roles = (("user", prompt), ("assistant", completion))
                rows.append({"messages": [{"role": role, "content": content} for role, content in roles]})
            else:
                rows.append({"prompt": prompt, "completion": f" {completion}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = "".join(f"{split}: {split}.jsonl\n" for split in ("train", "dev", "test"))
    (folder / "task.yaml").write_text(f"type: text-generation\n{sources}metric: exact_match\nmax_new_tokens: 3\n")
    return folder / "task.yaml"


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
TRAINERS: dict[str, Case] = {
    "TRL": {"target_modules": "all-linear"},
    "Axolotl": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "Unsloth": {"target_modules": r"(?:.*?(?:model|layers).*?(?:self_attn|mlp).*?(?:q_proj|v_proj|down_proj).*?)"},
}
"""LoRAs as each trainer has them by default, or where its documentation adds chat tokens (Axolotl)."""


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("architecture", ["llama", "llama, tied"])
def test_an_adapter_of_trl_is_recycled(upgrades, tmp_path, architecture, trainer):
    """The old deployment is the trained model, and the new one generates the same answers on the same base."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    base = upgrades[architecture].old
    has_chat = trainer == "Axolotl"
    task = write_task(tmp_path, has_chat)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    if has_chat:
        tokenizer.add_special_tokens({"additional_special_tokens": ADDED_TOKENS})
        tokenizer.chat_template = CHAT_TEMPLATE
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "work"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    trained = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", **TRAINERS[trainer]),
    )
    with quiet():
        trained.train()
        trained.save_model(str(tmp_path / "adapter"))
    if trainer == "Unsloth":
        update_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="unsloth/tiny-llama-bnb-4bit")
    expected = compute_logits(trained.model, draw_ids(VOCABULARY))
    upgrade = with_adaptation_tokens(load_adaptation(tmp_path / "adapter"), Upgrade(base, base))
    assert_outputs(load_model(load_adaptation(tmp_path / "adapter"), upgrade.old, HEAD), draw_ids(VOCABULARY), expected)
    outcome = recycle(Upgrade(base, base), tmp_path / "adapter", task, "direct", tmp_path / "out", recipe=FP32)
    carried = load_model(load_adaptation(outcome.path), upgrade.new, HEAD)
    assert_outputs(carried, draw_ids(VOCABULARY), expected)
    assert AutoTokenizer.from_pretrained(outcome.path / "adaptation").get_vocab() == tokenizer.get_vocab()
    prompts = [row["messages"][:1] if has_chat else row["prompt"] for row in read_jsonl(tmp_path / "test.jsonl")]
    for prompt, prediction in zip(prompts, outcome.predictions("test"), strict=True):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) if has_chat else prompt
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        generated = trained.model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        answer = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert prediction["answer"] == answer.strip()


def test_an_adapter_without_a_task_type_is_taken(upgrades, tmp_path):
    """Its task type follows from the task; its tokenizer from the base."""
    upgrade = upgrades["llama"]
    write_adapter(upgrade.old.path, tmp_path / "adapter", {"r": 2, "target_modules": ["q_proj"]})
    outcome = recycle(upgrade, tmp_path / "adapter", write_task(tmp_path), "direct", tmp_path / "out", recipe=FP32)
    ids = draw_ids(VOCABULARY)
    expected = compute_logits(load_with_peft(upgrade.new.path, tmp_path / "adapter"), ids)
    assert_outputs(load_model(load_adaptation(outcome.path), upgrade.new, HEAD), ids, expected)


def test_tuned_embeddings_need_the_same_ties_on_both_bases(upgrades, tmp_path):
    old = upgrades["llama, tied"].old
    model = AutoModelForCausalLM.from_pretrained(old.path)
    untied = AutoModelForCausalLM.from_config(type(model.config)(**{**model.config.to_dict(), **UNTIED}))
    untied.load_state_dict(model.state_dict())
    untied.save_pretrained(tmp_path / "new")
    AutoTokenizer.from_pretrained(old.path).save_pretrained(tmp_path / "new")
    upgrade = Upgrade(old, Base.open(tmp_path / "new"))
    for case, is_refused in (("all linear layers", False), ("embeddings", True), ("LoRA on the embeddings", True)):
        write_adapter(old.path, tmp_path / case, lora_settings("llama, tied", case))
        if is_refused:
            with pytest.raises(MismatchError, match="ties its head"):
                write_graft(load_adaptation(tmp_path / case), upgrade, tmp_path / f"{case} out", silent)
        else:
            write_graft(load_adaptation(tmp_path / case), upgrade, tmp_path / f"{case} out", silent)
