"""Properties of every combination of an architecture, a kind of adaptation, a start, an objective and a task type.

The combinations form a table. `make test` runs a cover, in which every two values meet; `make contract`
(`pytest --contract whole`) runs every cell. A new architecture is a line of `ARCHITECTURES`; regraft's registries add
new kinds, starts, objectives and task types to the table.

The last section tests the arithmetic on each architecture against transformers and PEFT in memory.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from helpers import (
    BAD,
    FOLDED,
    GOOD,
    GROUPED,
    HEAD,
    LABELS,
    NAMED_LABELS,
    SIZES,
    add_noise,
    compute_logits,
    make_adapted_model,
    make_sentence,
    make_tokenizer,
    read_csv,
    read_test_predictions,
    run_command,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from regraft import Base, Recipe, Upgrade, load_adaptation, recycle
from regraft.adaptation import KINDS, fresh_model, save_model
from regraft.errors import KindError, MismatchError
from regraft.methods import Objective, Start, methods, parse_options, parts
from regraft.methods.registry import find_part_or_method
from regraft.methods.ridge import Ridge
from regraft.model.batches import predict
from regraft.model.examples import encode
from regraft.progress import quiet
from regraft.task import Head, MultiLabelClassification, TextGeneration, TextRegression, TokenClassification, load_data
from regraft.task.types import task_types
from regraft.task.types.token_logits import TokenLogits

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from regraft.task.types import Examples

pytestmark = [
    pytest.mark.slow,
    # PEFT uses a property that transformers renamed
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT corrects this setting for each layer
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::peft.utils.warning.PeftWarning"),
]
SETTINGS = {**SIZES, "bos_token_id": 1, "eos_token_id": 2}
ROUTED_EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
WITHOUT_COMPILE_PREFIX = {r"^_orig_mod\.": ""}  # transformers does not remove the prefix of torch.compile itself
ONE_STEP = Recipe(steps=1, batch_size=8, precision="fp32")
add_noise_everywhere = functools.partial(add_noise, is_changed=lambda name: True)  # also to what is not trained


Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of the hub.

    Args:
        head: The transformers class with a language-modelling head.
        settings: Settings of its config, which extend or replace SETTINGS.
        hub_tensors: A function from the tensors that transformers writes to those that the hub stores for the same
            weights, by name; None if both are the same.
        hub_config: Settings that differ in the hub's `config.json`; None removes a key.
    """

    head: str
    settings: dict = dataclasses.field(default_factory=dict)
    hub_tensors: Callable[[Tensors], Tensors] | None = None
    hub_config: dict = dataclasses.field(default_factory=dict)

    @property
    def is_decoder(self) -> bool:
        """Whether the model reads from left to right."""
        return "CausalLM" in self.head or "LMHead" in self.head


# Functions for `hub_tensors`, or that make such a function


def use_legacy_norm_names(tensors: Tensors) -> Tensors:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }


def add_compile_prefix(tensors: Tensors) -> Tensors:
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def add_copy(copy: str, name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {copy: tensors[name].clone()}


def add_buffers(*templates: str) -> Callable[[Tensors], Tensors]:
    """Return a function that adds the buffers that each of the two layers once had."""
    names = [template.format(layer) for template in templates for layer in range(2)]
    return lambda tensors: tensors | {name: torch.ones(1, 1, 8, 8) for name in names}


def store_gpt2_body(tensors: Tensors) -> Tensors:
    body = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return add_buffers("h.{}.attn.bias")(body)


TRANSFORMERS_4 = {"position_embedding_type": "absolute"}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 66}
ARCHITECTURES = {
    "bert": Architecture("BertForMaskedLM", hub_tensors=use_legacy_norm_names, hub_config=TRANSFORMERS_4),
    "roberta": Architecture("RobertaForMaskedLM", hub_tensors=add_compile_prefix, hub_config=TRANSFORMERS_4),
    "xlm-roberta": Architecture("XLMRobertaForMaskedLM", hub_config=TRANSFORMERS_4),
    "camembert": Architecture("CamembertForMaskedLM"),
    "electra": Architecture("ElectraForMaskedLM", {"embedding_size": 16}, hub_config=TRANSFORMERS_4),
    "distilbert": Architecture("DistilBertForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}),
    "albert": Architecture("AlbertForMaskedLM", {"embedding_size": 16}, hub_config=TRANSFORMERS_4),
    "mpnet": Architecture("MPNetForMaskedLM"),
    "roformer": Architecture("RoFormerForMaskedLM", {"embedding_size": 32}),
    "modernbert": Architecture("ModernBertForMaskedLM"),
    "deberta-v2": Architecture(
        "DebertaV2ForMaskedLM",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "nomic-bert": Architecture("NomicBertForMaskedLM"),
    "gpt2": Architecture("GPT2LMHeadModel", GPT2, hub_tensors=store_gpt2_body),
    "gpt-neox": Architecture(
        "GPTNeoXForCausalLM",
        hub_tensors=add_buffers(
            "gpt_neox.layers.{}.attention.masked_bias", "gpt_neox.layers.{}.attention.rotary_emb.inv_freq"
        ),
        hub_config={"rope_parameters": None, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    ),
    "opt": Architecture("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": Architecture("BloomForCausalLM", {"n_layer": 2, "n_head": 2}),
    "falcon": Architecture("FalconForCausalLM", {"num_kv_heads": 2}),
    "phi": Architecture("PhiForCausalLM"),
    "phi-3": Architecture("Phi3ForCausalLM", {"num_key_value_heads": 2}),
    "llama": Architecture(
        "LlamaForCausalLM",
        hub_tensors=add_buffers("model.layers.{}.self_attn.rotary_emb.inv_freq"),
        hub_config={"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
    ),
    "llama, tied": Architecture(
        "LlamaForCausalLM", {"tie_word_embeddings": True}, add_copy("lm_head.weight", "model.embed_tokens.weight")
    ),
    "mistral": Architecture("MistralForCausalLM", {"num_key_value_heads": 2}),
    "qwen2": Architecture("Qwen2ForCausalLM", {"num_key_value_heads": 2, "vocab_size": 5 + 256}),
    "qwen3": Architecture("Qwen3ForCausalLM", GROUPED),
    "gemma": Architecture("GemmaForCausalLM", GROUPED),
    "gemma-2": Architecture("Gemma2ForCausalLM", GROUPED),
    "gemma-3, text": Architecture("Gemma3ForCausalLM", GROUPED),
    "qwen3-moe": Architecture(
        "Qwen3MoeForCausalLM", {**ROUTED_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16}
    ),
    "mixtral": Architecture("MixtralForCausalLM", {**ROUTED_EXPERTS, "num_local_experts": 4}),
}


UNSUPPORTED = {  # the kinds that an architecture cannot take, with the reason
    "electra": {"prompt"},  # PEFT sizes the prompt by hidden_size; the embeddings are narrower
    "distilbert": {"prefix"},  # its forward does not take past_key_values, which pass a prefix
    "albert": {
        "prefix",
        "prompt",
        "bottleneck",
        "pfeiffer",
    },  # as for distilbert and electra; renamed layers
    "mpnet": {"prefix"},  # as for distilbert
    "roformer": {"prefix"},  # its attention indexes the cache as a tuple
    "modernbert": {"prefix", "layernorm"},  # LN tuning takes no norm without weights
    "deberta-v2": {"prefix"},  # as for distilbert
    "nomic-bert": {"prefix"},  # as for distilbert
    "gpt2": {"olora"},  # PEFT factors Conv1D's weight as if it were a Linear's
    "falcon": {"dora", "prefix"},  # dense_4h_to_h is its own class; one key-value head of two
    "qwen3-moe": {"dora", "pissa", "olora", "bottleneck", "pfeiffer"},  # the feed-forward layers are experts
    "mixtral": {"dora", "pissa", "olora", "bottleneck", "pfeiffer"},
}
WITHOUT_TAGGER = ("opt", "gemma-3, text")  # the architectures for which transformers has no token classification
LORAS = ("lora", "rslora", *FOLDED)
BOTTLENECKS = ("bottleneck", "pfeiffer")
LINEAR = ("full", *LORAS)
KINDS_OF_START = {  # for the starts that take some kinds only
    "project": tuple(kind for kind in KINDS if kind != "layernorm"),
    "ridge": (*LINEAR, *BOTTLENECKS),
    "scaled": (*LINEAR, *BOTTLENECKS),
    "aligned": (*LINEAR, *BOTTLENECKS),
    "masked": LINEAR,
    "trimmed": LINEAR,
    "orthogonal": LINEAR,
}
NEW_WEIGHTS = ("scratch", "auto", "project")  # the starts whose weights differ even if the base is unchanged
UNTRAINED = "none"
OBJECTIVES = {name: find_part_or_method(name) for name in parts(Objective)}
# a start that makes another kind of adaptation has tests of its own (`test_ariadne.py`)
STARTS = tuple(name for name in parts(Start) if find_part_or_method(name).kind is None)
OTHER_METHODS = tuple(name for name, method in methods().items() if not isinstance(method.parts[0], Start))
DIMENSIONS = {
    "architecture": tuple(ARCHITECTURES),
    "kind": KINDS,
    # a cover takes the first of equally good values, and only `scratch` has to be trained
    "start": (*sorted(STARTS, key=lambda name: name == "scratch"), *OTHER_METHODS),
    "objective": (UNTRAINED, *OBJECTIVES),
    "task_type": tuple(task_types()),
}
# Values that the cover tries on some architectures only: kinds that are another kind with a different option, and
# methods that depend on a model's outputs alone.
ARCHITECTURE_INDEPENDENT = ("rslora", "olora", "pfeiffer", "auto", "distill", "anchored", "interpolation", "label-free")
Cell = tuple[str, ...]
Value = tuple[str, str]  # a dimension and a value of it


def generation_only(objective: str) -> bool:
    """Return whether an objective is for the task types whose models write answers."""
    return objective in OBJECTIVES and OBJECTIVES[objective].generation_only


def can_meet(first: Value, second: Value) -> bool:
    """Return whether a cell may have both values. Their dimensions are in the order of `DIMENSIONS`."""
    match first, second:
        case ("architecture", architecture), ("kind", kind):
            return kind not in UNSUPPORTED.get(architecture, ())
        case ("architecture", architecture), ("task_type", "token-classification"):
            return architecture not in WITHOUT_TAGGER
        case ("architecture", architecture), ("task_type", "text-generation"):
            return ARCHITECTURES[architecture].is_decoder
        case ("architecture", architecture), ("objective", objective):
            return ARCHITECTURES[architecture].is_decoder or not generation_only(objective)
        case ("objective", objective), ("task_type", task_type):
            return task_types()[task_type].head_in_base or not generation_only(objective)
        case ("kind", kind), ("start", start):
            return kind in KINDS_OF_START.get(start, KINDS)
        case ("start", "scratch"), ("objective", objective):
            return objective != UNTRAINED  # a fresh head alone is no method
        case ("start", start), ("objective", objective):
            return objective == UNTRAINED or start not in OTHER_METHODS
    return True


def list_pairs(cell: dict[str, str]) -> list[tuple[Value, Value]]:
    """Return every two values of a complete or partial cell, in the order of the dimensions."""
    return list(itertools.combinations([(name, cell[name]) for name in DIMENSIONS if name in cell], 2))


def count_pairs(cell: dict[str, str], uncovered: Container[tuple[Value, Value]]) -> int:
    """Count the uncovered pairs that a cell meets; -1 if two of its values cannot meet."""
    pairs = list_pairs(cell)
    return sum(pair in uncovered for pair in pairs) if all(can_meet(*pair) for pair in pairs) else -1


def all_cells() -> Iterator[Cell]:
    """Yield every cell of the table."""
    for cell in itertools.product(*DIMENSIONS.values()):
        if all(can_meet(*pair) for pair in list_pairs(dict(zip(DIMENSIONS, cell, strict=True)))):
            yield cell


def pairwise_cover() -> list[Cell]:
    """Choose cells greedily until every two values meet that have to; the choice is the same in every process."""
    values = [(name, value) for name, options in DIMENSIONS.items() for value in options]
    uncovered = {
        (first, second): None
        for first, second in itertools.combinations(values, 2)
        if first[0] != second[0] and can_meet(first, second)
        if first[0] != "architecture" or second[1] not in ARCHITECTURE_INDEPENDENT
    }
    cells = []
    while uncovered:
        cell = dict(next(iter(uncovered)))
        for name, options in DIMENSIONS.items():
            if name not in cell:
                cell[name] = max(options, key=lambda value: count_pairs({**cell, name: value}, uncovered))
        cells.append(tuple(cell[name] for name in DIMENSIONS))
        for pair in list_pairs(cell):
            uncovered.pop(pair, None)
    return cells


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on all different combinations of its parameters in the table, or in its cover."""
    names = [name for name in DIMENSIONS if name in metafunc.fixturenames]
    if "architecture" in names:
        cells = list(all_cells()) if metafunc.config.getoption("contract") == "whole" else pairwise_cover()
        if metafunc.function is test_outputs_do_not_change_if_the_base_does_not:
            cells = [cell for cell in cells if cell[2] not in NEW_WEIGHTS]
            # `direct` copies an adapter's files, whatever the architecture
            cells = [cell for cell in cells if cell[2] != "direct" or cell[0] in ("bert", "llama")]
        columns = [list(DIMENSIONS).index(name) for name in names]
        rows = dict.fromkeys(tuple(cell[column] for column in columns) for cell in cells)
        metafunc.parametrize(names, sorted(rows, key=lambda row: list(ARCHITECTURES).index(row[0])))


def test_every_two_values_that_can_meet_are_in_the_cover():
    cover = pairwise_cover()
    table = list(all_cells())
    assert set(cover) <= set(table)
    for i, j in itertools.combinations(range(len(DIMENSIONS)), 2):
        missing = {(cell[i], cell[j]) for cell in table} - {(cell[i], cell[j]) for cell in cover}
        assert all(i == 0 and second in ARCHITECTURE_INDEPENDENT for _, second in missing)


TASK_FILES = "train: train.csv\ndev: dev.csv\ntest: test.csv\ntext: text\nmax_length: 32\n"


def write_task(
    folder: Path, keys: str, make_targets: Callable[[int, bool], list[object]], columns: Sequence[str]
) -> Path:
    """Write a task on alternately negative and positive sentences.

    Args:
        folder: The folder to write.
        keys: The keys of the task file that only the task type has.
        make_targets: A function that returns the cells of the target columns from the index of a sentence and whether
            it is positive.
        columns: The names of the target columns.

    Returns:
        The task file.
    """
    folder.mkdir()
    rng = random.Random(0)
    for split, count in (("train", 48), ("dev", 10), ("test", 10)):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", *columns])
            writer.writerows([make_sentence(rng, bool(i % 2)), *make_targets(i, bool(i % 2))] for i in range(count))
    (folder / "task.yaml").write_text(TASK_FILES + keys)
    return folder / "task.yaml"


def write_classes(folder: Path) -> Path:
    """Write a task of text classification."""
    return write_task(folder, "label: label\n", lambda i, positive: [LABELS[positive]], ["label"])


def write_label_sets(folder: Path) -> Path:
    """Write a task of multi-label classification, whose first label is independent of the text."""
    keys = f"type: multi-label-classification\nlabel: [{', '.join(LABELS)}]\n"
    return write_task(folder, keys, lambda i, positive: [int(i % 3 == 0), int(positive)], LABELS)


def write_numbers(folder: Path) -> Path:
    """Write a task of text regression, whose numbers are near the outputs of fresh heads."""
    keys = "type: text-regression\nlabel: value\ntolerance: 0.1\n"
    return write_task(folder, keys, lambda i, positive: [(0.2 if positive else -0.2) + i / 1000], ["value"])


def write_tagging_task(folder: Path) -> Path:
    """Write a task of token classification, in which good and bad words are marked."""
    folder.mkdir()
    rng = random.Random(0)
    tags = {**dict.fromkeys(GOOD, "B-good"), **dict.fromkeys(BAD, "B-bad")}
    for split, count in (("train", 48), ("dev", 10), ("test", 10)):
        sentences = [make_sentence(rng, bool(i % 2)).split() for i in range(count)]
        rows = [{"words": words, "tags": [tags.get(word, "O") for word in words]} for words in sentences]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        "type: token-classification\ntrain: train.jsonl\ndev: dev.jsonl\ntest: test.jsonl\nwords: words\ntags: tags\n"
        f"labels: {json.dumps(TAGS)}\nmax_length: 32\n"
    )
    return folder / "task.yaml"


def write_completions(folder: Path) -> Path:
    """Write a task of text generation, whose completions are a word."""
    folder.mkdir()
    rng = random.Random(0)
    for split, count in (("train", 48), ("dev", 10), ("test", 10)):
        rows = [
            {"prompt": make_sentence(rng, bool(i % 2)), "completion": f" {GOOD[0] if i % 2 else BAD[0]}"}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        "type: text-generation\ntrain: train.jsonl\ndev: dev.jsonl\ntest: test.jsonl\nmetric: token_accuracy\n"
        "max_new_tokens: 4\nmax_length: 32\n"
    )
    return folder / "task.yaml"


TAGS = ("O", "B-good", "B-bad")
TASKS = {  # the function that writes a task of each type, and its head
    "text-classification": (write_classes, HEAD),
    "multi-label-classification": (write_label_sets, Head(MultiLabelClassification, LABELS)),
    "text-regression": (write_numbers, Head(TextRegression, ())),
    "token-classification": (write_tagging_task, Head(TokenClassification, TAGS)),
    "text-generation": (write_completions, Head(TextGeneration, ())),
}


def make_byte_tokenizer():
    """Build a byte-level tokenizer: AutoTokenizer reads every tokenizer of a Qwen2 as one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def rewrite_as_hub(folder: Path, architecture: Architecture) -> None:
    """Rewrite a folder of transformers so that it has the names and settings of the hub."""
    if architecture.hub_tensors:
        tensors = architecture.hub_tensors(load_file(folder / "model.safetensors"))
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | architecture.hub_config
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if value is not None})
    )


class Builder:
    """Builds tasks, bases and adaptations when they are first asked for.

    Args:
        folder: The folder of all files that are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.task = functools.cache(lambda task_type: TASKS[task_type][0](folder / task_type))
        self.upgrade = functools.cache(self._write_upgrade)
        self.adaptation = functools.cache(self._write_adaptation)
        self.examples = functools.cache(self._encode)

    def _write_upgrade(self, name: str) -> Upgrade:
        """Write an old base as the hub stores it, and its upgrade."""
        architecture = ARCHITECTURES[name]
        folder = self.folder / name.replace(", ", "-")
        model_class = getattr(transformers, architecture.head)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**{**SETTINGS, **architecture.settings}))
        add_noise_everywhere(model, 0.02)  # a fault in biases of 0 or norms of 1 would not show
        if name == "qwen2":
            tokenizer = make_byte_tokenizer()
        else:
            tokenizer = make_tokenizer("llama" if architecture.is_decoder else "bert")
        for base_name in ("old", "new"):
            tokenizer.save_pretrained(folder / base_name)
        model.save_pretrained(folder / "old")
        add_noise_everywhere(model, 0.03, seed=3).save_pretrained(folder / "new")
        before = read_tensors(folder / "old", architecture.head)
        rewrite_as_hub(folder / "old", architecture)
        after = read_tensors(folder / "old", architecture.head)
        assert all(torch.equal(before[name], after[name]) for name in before)
        return Upgrade(Base.open(folder / "old"), Base.open(folder / "new"))

    def _write_adaptation(
        self, architecture: str, kind: str, task_type: str, seed: int = 2, base_name: str = "old"
    ) -> tuple[Path, torch.Tensor]:
        """Write an adaptation of a base, and compute its model's logits before it is saved."""
        base = getattr(self.upgrade(architecture), base_name)
        head = TASKS[task_type][1]
        folder = base.path.parent / f"{base_name}-{kind}-{task_type}-{seed}" / "adaptation"
        folder.mkdir(parents=True)
        model, start = make_adapted_model(base, kind, head, seed)
        save_model(model, base, head, folder, start)
        return folder, as_tensor(predict(model, self.examples(architecture, task_type), "fp32"))

    def _encode(self, architecture: str, task_type: str) -> Examples:
        """Encode the test examples of a task for an architecture."""
        data = load_data(self.task(task_type), 20)
        return encode(self.upgrade(architecture).new, data, data.test)

    def options(self, start: str, architecture: str, kind: str, task_type: str):
        """Return the options of a start: `project` learns from adaptations of both bases, others need none."""
        if start != "project":
            return None
        pairs = []
        for seed in (4, 5):
            old, new = (self.adaptation(architecture, kind, task_type, seed, name)[0] for name in ("old", "new"))
            pairs.append(f"{old}={new}")
        return parse_options("project", [f"pairs=[{','.join(pairs)}]", "rank=1"])


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> Builder:
    return Builder(tmp_path_factory.mktemp("contract"))


def test_every_cell_writes_weights_that_load_and_predict(
    builder, tmp_path, architecture, kind, start, objective, task_type
):
    """The stored weights name their base, and have the recorded predictions with and without regraft."""
    upgrade = builder.upgrade(architecture)
    task = builder.task(task_type)
    method = start if objective == UNTRAINED else f"{start}+{objective}"
    source, _ = builder.adaptation(architecture, kind, task_type)
    options = builder.options(start, architecture, kind, task_type)
    outcome = recycle(upgrade, source, task, method, tmp_path / "out", recipe=ONE_STEP, options=options)

    stored = load_adaptation(outcome.path)
    assert stored.check_base(upgrade.new) == "proven"
    with pytest.raises(MismatchError, match="was not tuned on"):
        stored.check_base(upgrade.old)
    assert (outcome.record.method, outcome.record.kind, outcome.record.task.type) == (method, stored.kind, task_type)
    assert stored.kind == stored_kind(kind)
    head = TASKS[task_type][1]
    assert (stored.labels or ()) == head.labels
    if start != "auto":
        assert outcome.record.cost.steps == (0 if objective == UNTRAINED else ONE_STEP.steps)

    is_scored_by_teacher = objective in OBJECTIVES and bool(OBJECTIVES[objective].scores_agreement)
    if objective != UNTRAINED and not is_scored_by_teacher and start != "scratch":
        untrained = recycle(upgrade, source, task, start, tmp_path / "start", recipe=ONE_STEP, options=options)
        expected_score = untrained.scores["dev"]
        if TASKS[task_type][1].type.head_in_base:  # a training is judged by the loss
            predictions = untrained.predictions("dev")
            labels = sum(prediction["labels"] for prediction in predictions)
            expected_score = sum(prediction["loss"] for prediction in predictions) / labels
        assert outcome.scores["dev_at_start"] == pytest.approx(expected_score, abs=1e-4)

    examples = builder.examples(architecture, task_type)
    outputs = compute_logits(outcome.path, upgrade.new, examples, head)
    data = load_data(task, 20)
    if head.type.head_in_base:
        with torch.no_grad():
            losses = data.likelihood.loss(outputs, torch.as_tensor(examples.targets))
        rows = [examples.rows([index]) for index in range(len(examples))]
        stored_losses = [prediction["loss"] for prediction in outcome.predictions("test")]
        assert stored_losses == pytest.approx([float(losses[indices].sum()) for indices in rows], rel=1e-5)
    else:
        predicted = data.likelihood.predict(outputs).tolist()
        expected = data.task.predictions_of_examples(predicted, data.test, examples, head.labels)
        if task_type == "text-regression":
            expected = pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert outcome.predictions("test") == expected
    logits = as_tensor(outputs)
    if kind not in BOTTLENECKS:
        plain = compute_logits_without_regraft(outcome.path / "adaptation", upgrade.new, examples, head)
        torch.testing.assert_close(plain, logits[: len(plain)], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def as_tensor(outputs: Any) -> torch.Tensor:
    """Return outputs as a tensor, of a language model too."""
    return outputs.dense() if isinstance(outputs, TokenLogits) else outputs


def stored_kind(kind: str) -> str:
    """Return the kind that an adaptation of a kind records, which stores variants of a kind as its settings."""
    variants = {"pfeiffer": "bottleneck", **dict.fromkeys((*LORAS, "dora"), "lora")}
    return variants.get(kind, kind)


def compute_logits_without_regraft(folder: Path, base: Base, examples: Examples, head: Head) -> torch.Tensor:
    """Compute the logits of the rows of the first three examples by transformers and PEFT alone, one by one."""
    from peft import PeftModel

    auto_class = getattr(transformers, head.type.auto_class)
    with quiet():
        if (folder / "adapter_config.json").exists():
            settings = {} if head.type.head_in_base else {"num_labels": head.num_outputs}
            model = auto_class.from_pretrained(base.path, pad_token_id=0, **settings)
            model = PeftModel.from_pretrained(model, folder)
        else:
            model = auto_class.from_pretrained(folder)
    model.eval()
    with torch.no_grad():
        batches = [examples.batch([i]) for i in range(3)]
        outputs = [model(**{name: batch[name] for name in examples.columns}).logits for batch in batches]
    if examples.tokens is None:
        return torch.cat(outputs)
    # PEFT returns logits at the virtual tokens too, which come first
    own_outputs = [output[0, -length:] for output, length in zip(outputs, examples.lengths.tolist(), strict=False)]
    return torch.cat([logits[tokens] for logits, tokens in zip(own_outputs, examples.tokens, strict=False)])


def test_every_kind_loads_as_it_was_saved(builder, architecture, kind, task_type):
    """The outputs equal those from before saving, and differ from the bare base's."""
    folder, expected = builder.adaptation(architecture, kind, task_type)
    base = builder.upgrade(architecture).old
    examples = builder.examples(architecture, task_type)
    stored = load_adaptation(folder)
    head = TASKS[task_type][1]
    assert (stored.kind, stored.labels or ()) == (stored_kind(kind), head.labels)
    assert stored.check_base(base) == "proven"
    tolerance = 1e-4 if kind in FOLDED else 1e-6
    logits = as_tensor(compute_logits(folder, base, examples, head))
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    untuned = as_tensor(predict(fresh_model(base, head, 1), examples, "fp32"))
    assert (expected - untuned).abs().max() > 1e-3


def test_outputs_do_not_change_if_the_base_does_not(builder, tmp_path, architecture, kind, start, task_type):
    old = builder.upgrade(architecture).old
    examples = builder.examples(architecture, task_type)
    source, expected = builder.adaptation(architecture, kind, task_type)
    outcome = recycle(Upgrade(old, old), source, builder.task(task_type), start, tmp_path / "out", recipe=ONE_STEP)
    tolerance = 1e-4 if kind in FOLDED else 2e-5
    logits = as_tensor(compute_logits(outcome.path, old, examples, TASKS[task_type][1]))
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("start", "kind"),
    [(start, kind) for start, kinds in KINDS_OF_START.items() for kind in KINDS if kind not in kinds],
)
def test_a_start_refuses_unsuitable_kinds(builder, tmp_path, start, kind):
    task_type = "text-classification"
    source, _ = builder.adaptation("bert", kind, task_type)
    options = builder.options(start, "bert", kind, task_type)
    with pytest.raises(KindError, match=r"this method supports|stores only tensors"):
        recycle(builder.upgrade("bert"), source, builder.task(task_type), start, tmp_path / "out", options=options)
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass
class Case:
    """The inputs of a test of the arithmetic on an architecture.

    Args:
        head: The transformers class with a language-modelling head.
        upgrade: The old and the new base.
        tuned: The folder of a full fine-tune of the old base for classification.
        task: The task file of the fine-tune.
    """

    head: str
    upgrade: Upgrade
    tuned: Path
    task: Path

    def read_texts(self, split: str) -> list[str]:
        """Return the texts of a split of the task."""
        return [row["text"] for row in read_csv(self.task.parent / f"{split}.csv")]

    @property
    def old(self) -> Path:
        """The folder of the old base."""
        return self.upgrade.old.path

    @property
    def new(self) -> Path:
        """The folder of the new base."""
        return self.upgrade.new.path


def load_with_head(folder: Path, head: str) -> torch.nn.Module:
    """Load a folder by transformers alone."""
    return getattr(transformers, head).from_pretrained(folder, key_mapping=WITHOUT_COMPILE_PREFIX).eval()


def read_tensors(folder: Path, head: str) -> Tensors:
    return dict(load_with_head(folder, head).state_dict())


def on_every_second_architecture(first: int, excluded: str = "") -> pytest.MarkDecorator:
    """Run a test on every second architecture from the first (0) or the second (1); `make contract` runs all."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(name, marks=[pytest.mark.contract] * ((index + first) % 2))
            for index, name in enumerate(ARCHITECTURES)
            if name != excluded
        ],
        indirect=True,
        scope="module",
    )


@pytest.fixture(scope="module")
def case(request, builder) -> Case:
    """Write the bases of an architecture, and a full fine-tune of the old base with transformers alone."""
    upgrade = builder.upgrade(request.param)
    folder = builder.folder / f"{request.param} tuned"
    if not folder.exists():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(
            upgrade.old.path, num_labels=2, key_mapping=WITHOUT_COMPILE_PREFIX, **NAMED_LABELS
        )
        add_noise_everywhere(model, 0.05, seed=2).save_pretrained(folder)
        upgrade.new.tokenizer.save_pretrained(folder)
    return Case(ARCHITECTURES[request.param].head, upgrade, folder, builder.task("text-classification"))


def encode_text(case: Case, text: str) -> Tensors:
    inputs = AutoTokenizer.from_pretrained(case.new)(text, return_tensors="pt", truncation=True, max_length=32)
    return {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}


def is_matrix(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def assert_close(actual, expected, tolerance=2e-6):
    assert actual.keys() == expected.keys()
    errors = {name: float((actual[name] - expected[name]).abs().max()) for name in expected if expected[name].numel()}
    too_large = {name: error for name, error in errors.items() if not error <= tolerance}  # NaN too
    assert not too_large, too_large


def read_classifier_tensors(folder: Path) -> Tensors:
    return dict(AutoModelForSequenceClassification.from_pretrained(folder).state_dict())


def graft_in_memory(new, tuned, old):
    """Graft the tensors that both bases have, and copy those that neither has."""
    return {
        name: new[name] + tensor - old[name] if name in old and name in new else tensor
        for name, tensor in tuned.items()
    }


def recycle_case(case: Case, method: str, adaptation: Path, out: Path, **options):
    return recycle(case.upgrade, adaptation, case.task, method, out, recipe=ONE_STEP, **options)


def write_lora(model, folder: Path, seed=4, **settings):
    """Write a LoRA on every linear layer of the body with PEFT alone, with noise in all numbers; return its model."""
    from peft import LoraConfig, get_peft_model

    layers = [
        name
        for name, module in model.named_modules()
        if is_matrix(module) and name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name
    ]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=layers, **settings))
    add_noise(adapted, seed=seed, is_changed=lambda name: "lora_" in name or "modules_to_save" in name)
    adapted.save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return adapted


def write_classifier_lora(case: Case, folder: Path) -> Path:
    base = AutoModelForSequenceClassification.from_pretrained(case.tuned)
    base.load_state_dict(read_tensors(case.old, case.head), strict=False)
    heads = [name for name, _ in base.named_children() if name not in (base.base_model_prefix, "dropout", "drop")]
    pooler = ["pooler"] if hasattr(base.base_model, "pooler") else []
    write_lora(base, folder, task_type="SEQ_CLS", modules_to_save=[*heads, *pooler])
    return folder


def load_with_peft(base: Path, adapter: Path):
    """Load an adapter onto a base by PEFT alone."""
    from peft import PeftModel

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, key_mapping=WITHOUT_COMPILE_PREFIX)
    return PeftModel.from_pretrained(model, adapter)


@on_every_second_architecture(0)
def test_a_full_fine_tune_is_grafted_as_in_memory(case, tmp_path):
    recycle_case(case, "direct", case.tuned, tmp_path / "out")
    old, new = (read_tensors(folder, case.head) for folder in (case.old, case.new))
    assert_close(
        read_classifier_tensors(tmp_path / "out" / "adaptation"),
        graft_in_memory(new, read_classifier_tensors(case.tuned), old),
    )


@on_every_second_architecture(1)
def test_direct_copies_a_lora(case, tmp_path):
    adapter = write_classifier_lora(case, tmp_path / "adapter")
    recycle_case(case, "direct", adapter, tmp_path / "out")
    copied = load_file(tmp_path / "out" / "adaptation" / "adapter_model.safetensors")
    assert_close(copied, load_file(adapter / "adapter_model.safetensors"))
    model = load_with_peft(case.new, tmp_path / "out" / "adaptation").eval()
    for text, (_, prediction) in zip(case.read_texts("test"), read_test_predictions(tmp_path / "out"), strict=True):
        assert int(model(**encode_text(case, text)).logits.argmax()) == prediction


@on_every_second_architecture(0)
def test_checkpoints_are_grafted_on_disk_as_in_memory(case, tmp_path):
    model = load_with_head(case.old, case.head)
    add_noise_everywhere(model, 0.05, seed=6).save_pretrained(tmp_path / "tuned")
    tuned = dict(model.state_dict())
    files = ("--new", case.new, "--tuned", tmp_path / "tuned", "--old", case.old, "--out", tmp_path / "out")
    run_command("weights", "graft", *files)
    old, new = (read_tensors(folder, case.head) for folder in (case.old, case.new))
    assert_close(read_tensors(tmp_path / "out", case.head), graft_in_memory(new, tuned, old))


@on_every_second_architecture(1)
def test_a_lora_is_merged_as_peft_merges_it(case, tmp_path):
    adapted = write_lora(load_with_head(case.old, case.head), tmp_path / "adapter")
    run_command(
        "weights", "merge-lora", "--adapter", tmp_path / "adapter", "--base", case.old, "--out", tmp_path / "out"
    )
    assert_close(read_tensors(tmp_path / "out", case.head), dict(adapted.merge_and_unload().state_dict()))


@on_every_second_architecture(0)
def test_a_lora_of_full_rank_is_the_fine_tune(case, tmp_path):
    from peft import PeftModel

    model = load_with_head(case.old, case.head)
    matrices = {f"{name}.weight" for name, module in model.named_modules() if is_matrix(module)}
    embeddings = model.get_input_embeddings().weight
    names = [
        name
        for name, parameter in model.base_model.named_parameters(prefix=model.base_model_prefix)
        if name in matrices and parameter is not embeddings
    ]
    add_noise(model, 0.05, 7, lambda name: name in names).save_pretrained(tmp_path / "tuned")
    tuned = dict(model.state_dict())
    files = ("--tuned", tmp_path / "tuned", "--old", case.old, "--out", tmp_path / "out")
    run_command("weights", "extract-lora", *files, "--rank", 48)
    merged = PeftModel.from_pretrained(load_with_head(case.old, case.head), tmp_path / "out").merge_and_unload()
    assert_close(dict(merged.state_dict()), tuned, 2e-5)


@on_every_second_architecture(1)
def test_an_adaptation_is_converted_to_full_and_back(case, tmp_path):
    adapter = write_classifier_lora(case, tmp_path / "adapter")
    convert = functools.partial(run_command, "adaptation", "convert", "--old-base", case.old)
    convert(adapter, "--to", "full", "--out", tmp_path / "full")
    merged = load_with_peft(case.old, adapter).merge_and_unload()
    assert_close(read_classifier_tensors(tmp_path / "full"), dict(merged.state_dict()))
    convert(tmp_path / "full", "--to", "lora", "--rank", 4, "--out", tmp_path / "lora")
    converted = load_with_peft(case.old, tmp_path / "lora").merge_and_unload()
    assert_close(dict(converted.state_dict()), dict(merged.state_dict()), 2e-5)


@on_every_second_architecture(0, excluded="albert")  # its layers share weights, so a refit changes its own inputs
def test_ridge_equals_its_closed_form(case, tmp_path):
    outcome = recycle_case(case, "ridge", case.tuned, tmp_path / "out", options=Ridge(head=False))
    tuned, refitted = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for folder in (case.tuned, outcome.path / "adaptation")
    )
    old, new = (read_tensors(folder, case.head) for folder in (case.old, case.new))
    names = [
        name
        for name, module in tuned.named_modules()
        if is_matrix(module) and f"{name}.weight" in old and name.startswith(tuned.base_model_prefix)
    ]
    examples = [encode_text(case, text) for text in case.read_texts("train")]
    old_inputs, new_inputs = (record_inputs(model, names, examples) for model in (tuned, refitted))
    tuned_tensors, refitted_tensors = tuned.state_dict(), refitted.state_dict()
    run_names = [name for name in names if old_inputs[name]]  # some layers are never run by the classifier
    assert run_names
    for name in run_names:
        weight = f"{name}.weight"
        delta = (tuned_tensors[weight] - old[weight]).double()
        refitted_delta = (refitted_tensors[weight] - new[weight]).double()
        if isinstance(tuned.get_submodule(name), Conv1D):
            delta, refitted_delta = delta.T, refitted_delta.T
        before, after = (torch.cat(inputs[name]).double() for inputs in (old_inputs, new_inputs))
        second = after.T @ after
        strength = 0.3 * second.diagonal().mean()  # the default of Ridge
        eye = torch.eye(len(second), dtype=torch.float64)
        expected = (delta @ (before.T @ after) + strength * delta) @ torch.linalg.inv(second + strength * eye)
        assert float((refitted_delta - expected).abs().max()) < 2e-4 * max(1, float(expected.abs().max())), name


def record_inputs(model, names, examples) -> dict[str, list[torch.Tensor]]:
    """Run texts one by one, without padding, and return the rows that each layer reads."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def record(name, module, args):
        rows[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))

    handles = [model.get_submodule(name).register_forward_pre_hook(functools.partial(record, name)) for name in names]
    with torch.no_grad():
        for example in examples:
            model(**example)
    for handle in handles:
        handle.remove()
    return rows
