"""The architectures of today's hub, as their transformers classes write them and as the hub stores them.

Every row of the table goes through the arithmetic that a user can ask for; each result is held against transformers'
and PEFT's own models in memory, and `ridge` against its closed form on activations read by plain hooks.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from conftest import LABELS, WORDS, make_tokenizer, sentence
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from regraft import Recipe, Upgrade, recycle
from regraft.methods.ridge import Ridge

SIZE = {
    "vocab_size": 5 + len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 66, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),  # PEFT asks for what transformers renamed
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT corrects it by itself for each layer
]
UNWRAPPED = {r"^_orig_mod\.": ""}
FAST = Recipe(steps=1, batch_size=8, precision="fp32")


@dataclasses.dataclass(frozen=True)
class Row:
    """An architecture: its class with a language-modelling head, its settings, and how the hub's files differ.

    Args:
        head: The transformers class.
        settings: What its config is made with, beside or in place of SIZE.
        stored: Changes the tensors of a folder into what the hub has, the same weights.
        config: What the hub's `config.json` says otherwise; None removes a key.
    """

    head: str
    settings: dict = dataclasses.field(default_factory=dict)
    stored: object = None
    config: dict = dataclasses.field(default_factory=dict)


def legacy_norms(tensors):
    return {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }


def compiled(tensors):
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def twice(target, source):
    return lambda tensors: tensors | {target: tensors[source].clone()}


def buffers(*templates):
    return lambda tensors: tensors | {t.format(i): torch.ones(1, 1, 8, 8) for t in templates for i in range(2)}


def bare(prefix):
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


FOUR = {"position_embedding_type": "absolute"}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 66}
TABLE = {
    "bert": Row("BertForMaskedLM", stored=legacy_norms, config=FOUR),
    "roberta": Row("RobertaForMaskedLM", stored=compiled, config=FOUR),
    "xlm-roberta": Row("XLMRobertaForMaskedLM", config=FOUR),
    "camembert": Row("CamembertForMaskedLM"),
    "electra": Row("ElectraForMaskedLM", {"embedding_size": 16}, config=FOUR),
    "distilbert": Row("DistilBertForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}),
    "albert": Row("AlbertForMaskedLM", {"embedding_size": 16}, config=FOUR),
    "mpnet": Row("MPNetForMaskedLM"),
    "roformer": Row("RoFormerForMaskedLM", {"embedding_size": 32}),
    "modernbert": Row("ModernBertForMaskedLM"),
    "deberta-v2": Row(
        "DebertaV2ForMaskedLM",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "nomic-bert": Row("NomicBertForMaskedLM"),
    "gpt2": Row("GPT2LMHeadModel", GPT2, stored=lambda t: buffers("h.{}.attn.bias")(bare("transformer.")(t))),
    "gpt-neox": Row(
        "GPTNeoXForCausalLM",
        stored=buffers("gpt_neox.layers.{}.attention.masked_bias", "gpt_neox.layers.{}.attention.rotary_emb.inv_freq"),
        config={"rope_parameters": None, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    ),
    "opt": Row("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": Row("BloomForCausalLM", {"n_layer": 2, "n_head": 2}),
    "falcon": Row("FalconForCausalLM", {"num_kv_heads": 2}),
    "phi": Row("PhiForCausalLM"),
    "phi-3": Row("Phi3ForCausalLM", {"num_key_value_heads": 2}),
    "llama": Row(
        "LlamaForCausalLM",
        stored=buffers("model.layers.{}.self_attn.rotary_emb.inv_freq"),
        config={"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
    ),
    "llama, tied": Row(
        "LlamaForCausalLM", {"tie_word_embeddings": True}, twice("lm_head.weight", "model.embed_tokens.weight")
    ),
    "mistral": Row("MistralForCausalLM", {"num_key_value_heads": 2}),
    "qwen2": Row("Qwen2ForCausalLM", {"num_key_value_heads": 2, "vocab_size": 5 + 256}),
    "qwen3": Row("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma": Row("GemmaForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma-2": Row("Gemma2ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma-3, text": Row("Gemma3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-moe": Row("Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16}),
    "mixtral": Row("MixtralForCausalLM", {**EXPERTS, "num_local_experts": 4}),
}


@dataclasses.dataclass
class Case:
    """A row, made: the folders, and the models that transformers makes of them."""

    row: Row
    old: Path
    new: Path
    tuned: Path
    task: Path


def model_of(folder: Path, head: str) -> torch.nn.Module:
    """Load a folder by transformers alone, which leaves the wrapper of torch.compile to its caller."""
    return getattr(transformers, head).from_pretrained(folder, key_mapping=UNWRAPPED).eval()


def state_of(folder: Path, head: str) -> dict[str, torch.Tensor]:
    return dict(model_of(folder, head).state_dict())


def jiggle(model, seed, amount=0.05, only=("",)):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in only):
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return model


def as_the_hub_has_it(folder: Path, row: Row) -> None:
    if row.stored:
        tensors = {n: t.clone() for n, t in row.stored(load_file(folder / "model.safetensors")).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | row.config
    (folder / "config.json").write_text(json.dumps({key: v for key, v in settings.items() if v is not None}))


def write_task(folder: Path) -> Path:
    folder.mkdir()
    chance = random.Random(0)
    for split, count in (("train", 48), ("dev", 8), ("test", 8)):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["text", "label"])
            rows.writerows([sentence(chance, bool(i % 2)), LABELS[i % 2]] for i in range(count))
    (folder / "task.yaml").write_text(
        "train: train.csv\ndev: dev.csv\ntest: test.csv\ntext: text\nlabel: label\nmax_length: 32\n"
    )
    return folder / "task.yaml"


def byte_tokenizer():
    """What AutoTokenizer makes of Qwen2's files is byte-level, whatever they say."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def cells(column: int, but: str = "") -> pytest.MarkDecorator:
    """Run every second row in turn, so that each row and each operation is met; `make contract` runs them all."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(name, marks=[pytest.mark.contract] * ((row + column) % 2))
            for row, name in enumerate(TABLE)
            if name != but
        ],
        indirect=True,
        scope="module",
    )


@pytest.fixture(scope="module")
def case(request, tmp_path_factory) -> Case:
    row = TABLE[request.param]
    folder = tmp_path_factory.mktemp("architecture")
    kind = getattr(transformers, row.head)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**SIZE, **row.settings}))
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin at 0 and norms at 1: a fault in them would not show
            parameter.add_(0.02 * torch.randn_like(parameter))
    decoder = "CausalLM" in row.head or "LMHead" in row.head
    tokenizer = byte_tokenizer() if request.param == "qwen2" else make_tokenizer("llama" if decoder else "bert")
    for name in ("old", "tuned", "new"):
        (folder / name).mkdir()
        tokenizer.save_pretrained(folder / name)
    model.save_pretrained(folder / "old")
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    torch.manual_seed(1)
    tuned = AutoModelForSequenceClassification.from_pretrained(folder / "old", num_labels=2, **labels)
    jiggle(tuned, 2).save_pretrained(folder / "tuned")
    jiggle(model, 3, 0.03).save_pretrained(folder / "new")
    before = state_of(folder / "old", row.head)
    as_the_hub_has_it(folder / "old", row)
    after = state_of(folder / "old", row.head)
    assert all(torch.equal(before[name], after[name]) for name in before)  # the same weights
    return Case(row, folder / "old", folder / "new", folder / "tuned", write_task(folder / "task"))


def texts_of(case: Case, split: str) -> list[str]:
    with (case.task.parent / f"{split}.csv").open() as stream:
        return [row["text"] for row in csv.DictReader(stream)]


def encoded(case: Case, text: str) -> dict[str, torch.Tensor]:
    inputs = AutoTokenizer.from_pretrained(case.new)(text, return_tensors="pt", truncation=True, max_length=32)
    return {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}


def is_matrix(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def close(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - expected[name]).abs().max()) for name in expected if expected[name].numel()}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong


def classifier_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForSequenceClassification.from_pretrained(folder).state_dict())


def grafted(new, tuned, old):
    """The arithmetic in memory: what both bases have is grafted, what neither has is copied."""
    return {n: new[n] + t - old[n] if n in old and n in new else t for n, t in tuned.items()}


def recycled(case: Case, method: str, adaptation: Path, out: Path, **options):
    return recycle(Upgrade(case.old, case.new), adaptation, case.task, method, out, recipe=FAST, **options)


def with_lora(model, folder: Path, seed=4, **settings):
    """Put a LoRA on every linear layer of the body, move every number of it, and save it with PEFT alone."""
    from peft import LoraConfig, get_peft_model

    layers = [
        name
        for name, module in model.named_modules()
        if is_matrix(module) and name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name
    ]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=layers, **settings))
    jiggle(adapted, seed, 0.1, ("lora_", "modules_to_save")).save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return adapted


def classifier_lora(case: Case, folder: Path) -> Path:
    base = AutoModelForSequenceClassification.from_pretrained(case.tuned)
    base.load_state_dict(state_of(case.old, case.row.head), strict=False)
    heads = [name for name, _ in base.named_children() if name not in (base.base_model_prefix, "dropout", "drop")]
    pooler = ["pooler"] if hasattr(base.base_model, "pooler") else []
    with_lora(base, folder, task_type="SEQ_CLS", modules_to_save=[*heads, *pooler])
    return folder


def plain_lora(base: Path, adapter: Path):
    """PEFT's own model of an adapter on a base."""
    from peft import PeftModel

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, key_mapping=UNWRAPPED)
    return PeftModel.from_pretrained(model, adapter)


@cells(0)
def test_a_full_fine_tune_is_grafted_as_in_memory(case, tmp_path):
    recycled(case, "direct", case.tuned, tmp_path / "out")
    old, new = (state_of(folder, case.row.head) for folder in (case.old, case.new))
    close(classifier_of(tmp_path / "out" / "adaptation"), grafted(new, classifier_of(case.tuned), old))


@cells(1)
def test_a_lora_is_carried_as_it_is(case, tmp_path):
    adapter = classifier_lora(case, tmp_path / "adapter")
    recycled(case, "direct", adapter, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adaptation" / "adapter_model.safetensors")
    close(found, load_file(adapter / "adapter_model.safetensors"))
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    model = plain_lora(case.new, tmp_path / "out" / "adaptation").eval()
    for text, entry in zip(texts_of(case, "test"), [p for p in predictions if p["split"] == "test"], strict=True):
        assert int(model(**encoded(case, text)).logits.argmax()) == entry["prediction"]


@cells(2)
def test_checkpoints_are_grafted_on_disk_as_in_memory(case, tmp_path):
    model = model_of(case.old, case.row.head)
    jiggle(model, 6).save_pretrained(tmp_path / "tuned")
    tuned = dict(model.state_dict())
    run(
        "weights",
        "graft",
        "--new",
        case.new,
        "--tuned",
        tmp_path / "tuned",
        "--old",
        case.old,
        "--out",
        tmp_path / "out",
    )
    old, new = (state_of(folder, case.row.head) for folder in (case.old, case.new))
    close(state_of(tmp_path / "out", case.row.head), grafted(new, tuned, old))


@cells(3)
def test_a_lora_is_merged_as_peft_merges_it(case, tmp_path):
    adapted = with_lora(model_of(case.old, case.row.head), tmp_path / "adapter")
    run("weights", "merge-lora", "--adapter", tmp_path / "adapter", "--base", case.old, "--out", tmp_path / "out")
    close(state_of(tmp_path / "out", case.row.head), dict(adapted.merge_and_unload().state_dict()))


@cells(4)
def test_a_lora_of_full_rank_is_the_fine_tune(case, tmp_path):
    from peft import PeftModel

    model = model_of(case.old, case.row.head)
    matrices = {f"{n}.weight" for n, m in model.named_modules() if is_matrix(m)}
    tied = {id(model.get_input_embeddings().weight)}
    chosen = [
        n
        for n, p in model.base_model.named_parameters(prefix=model.base_model_prefix)
        if n in matrices and id(p) not in tied
    ]
    jiggle(model, 7, only=chosen).save_pretrained(tmp_path / "tuned")
    tuned = dict(model.state_dict())
    run(
        "weights",
        "extract-lora",
        "--tuned",
        tmp_path / "tuned",
        "--old",
        case.old,
        "--rank",
        48,
        "--out",
        tmp_path / "out",
    )
    merged = PeftModel.from_pretrained(model_of(case.old, case.row.head), tmp_path / "out").merge_and_unload()
    close(dict(merged.state_dict()), tuned, 2e-5)


@cells(5)
def test_an_adaptation_is_converted_both_ways(case, tmp_path):
    adapter = classifier_lora(case, tmp_path / "adapter")
    convert = ("adaptation", "convert")
    run(*convert, adapter, "--to", "full", "--old-base", case.old, "--out", tmp_path / "full")
    merged = plain_lora(case.old, adapter).merge_and_unload()
    close(classifier_of(tmp_path / "full"), dict(merged.state_dict()))
    run(*convert, tmp_path / "full", "--to", "lora", "--old-base", case.old, "--rank", 4, "--out", tmp_path / "lora")
    again = plain_lora(case.old, tmp_path / "lora").merge_and_unload()
    close(dict(again.state_dict()), dict(merged.state_dict()), 2e-5)


@cells(6, but="albert")  # its layers are one: what it is fed changes with its own refit
def test_ridge_is_its_closed_form(case, tmp_path):
    outcome = recycled(case, "ridge", case.tuned, tmp_path / "out", options=Ridge(head=False))
    tuned, refitted = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for folder in (case.tuned, outcome.path / "adaptation")
    )
    old, new = (state_of(folder, case.row.head) for folder in (case.old, case.new))
    names = {
        name: name
        for name, module in tuned.named_modules()
        if is_matrix(module) and f"{name}.weight" in old and name.startswith(tuned.base_model_prefix)
    }
    assert names
    examples = [encoded(case, text) for text in texts_of(case, "train")]
    inputs = [inputs_of(model, names, examples) for model in (tuned, refitted)]
    state, states = refitted.state_dict(), tuned.state_dict()
    for name in names:
        weight = f"{name}.weight"
        turned = isinstance(tuned.get_submodule(name), Conv1D)
        delta, found = (
            t.double().T if turned else t.double() for t in (states[weight] - old[weight], state[weight] - new[weight])
        )
        if name not in inputs[0]:  # a layer that the classifier never runs
            continue
        before, after = (torch.cat(side[name]).double() for side in inputs)
        second = after.T @ after
        strength = 0.3 * second.diagonal().mean()
        eye = torch.eye(len(second), dtype=torch.float64)
        expected = (delta @ (before.T @ after) + strength * delta) @ torch.linalg.inv(second + strength * eye)
        assert float((found - expected).abs().max()) < 2e-4 * max(1, float(expected.abs().max())), name


def inputs_of(model, names, examples) -> dict[str, list[torch.Tensor]]:
    """What each layer is fed on texts run one by one, without padding: read by hooks."""
    rows: dict[str, list[torch.Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for example in examples:
            model(**example)
    for handle in handles:
        handle.remove()
    return rows


def run(*arguments):
    """The command line, in this process."""
    from typer.testing import CliRunner

    from regraft.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
