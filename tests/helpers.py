"""What tests build: texts, tasks, bases, adaptations, inputs of reports, and commands run in this process."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
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

from regraft import Base, load_adaptation
from regraft.adaptation import fresh_model, initial_factors, load_model, new_config, prepare_for_tuning, save_model
from regraft.adaptation.outcome import versions, write_outcome
from regraft.adaptation.outcome_record import BaseRecord, Cost, OutcomeRecord, Scores, Source, TaskRecord
from regraft.cli import app
from regraft.model.batches import predict
from regraft.model.outputs import Output
from regraft.task import Head, HubSplit, Split, Task, TaskData, TextClassification
from regraft.task.types import Signal
from regraft.task.types.likelihood import CATEGORICAL
from regraft.tuning.distill import TeacherOutputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

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
        config = new_config(kind, base, head, **{"rank": 3, "inner_size": 5, "virtual_tokens": 4, **sizes})
        model = prepare_for_tuning(model, base, head, config, 1)
    start = initial_factors(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, start


def write_adaptation(
    base: Base, kind: str, folder: Path, seed: int = 2, labels: Sequence[str] = LABELS, **sizes: int
) -> Path:
    """Write the adaptation that `make_adapted_model` builds, and return its folder."""
    head = make_head(*labels)
    model, start = make_adapted_model(base, kind, head, seed, **sizes)
    folder.mkdir(parents=True)
    save_model(model, base, head, folder, start)
    return folder


def compute_logits(adaptation: Path, base: Base, examples: Examples) -> torch.Tensor:
    """Load an adaptation onto a base, and return its logits on examples."""
    return predict(load_model(load_adaptation(adaptation), base, HEAD), examples, "fp32")


def read_weights(adaptation: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adaptation's folder."""
    name = "adapter_model" if (adaptation / "adapter_config.json").exists() else "model"
    return load_file(adaptation / f"{name}.safetensors")


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


# Reports

ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
REPORT_LABELS = ("joy", "anger", f"</script>{ATTACK}")
REPORT_METHODS = {  # test score, steps to scratch's last score, steps, labels
    "scratch": (0.902, None, 300, 2400),
    "direct": (0.843, None, 0, 0),
    "ridge": (0.881, None, 0, 0),
    "init": (0.909, 60, 300, 2400),
    "init+distill": (0.917, 30, 300, 2400),
}


def make_diagnosis(attack: str = ATTACK) -> dict:
    """Return a diagnosis as regraft 0.1 wrote it, with an answer to every question.

    Args:
        attack: Markup that a report has to escape, in names and texts.
    """
    text = Path(__file__).with_name("diagnosis.json").read_text(encoding="utf-8")
    for placeholder, markup in (("{attack[:40]}", attack[:40]), ("{attack}", attack), ("{ATTACK}", ATTACK)):
        text = text.replace(placeholder, json.dumps(markup)[1:-1])
    return json.loads(text)


def write_diagnosis(folder: Path, content: dict) -> Path:
    """Write the folder of a diagnosis."""
    folder.mkdir(parents=True)
    (folder / "diagnosis.json").write_text(json.dumps(content))
    return folder


def write_outcomes(folder: Path, seeds=(20, 21), task="feelings", attack: str = "") -> Path:
    """Write the outcome folders of a comparison, and of the old deployment."""
    old_base, new_base = (
        BaseRecord("models/small-v1", "sample:1a2b"),
        BaseRecord(f"models/small-v2{attack}", "sample:3c4d"),
    )
    old = _write_outcome(folder / "old", "tune", 20, task, old_base, None, (0.894, None, 300, 2400))
    source = Source(f"{old.path}/adaptation", "sample:5e6f", old_base.name, old_base.fingerprint, "proven")
    for seed in seeds:
        for method, figures in REPORT_METHODS.items():
            name = f"{method.replace('+', '-')}-seed{seed}{'<b>' if attack else ''}"
            _write_outcome(folder / name, method, seed, task, new_base, source, figures)
    return folder


def _write_outcome(out, method, seed, task, base, source, figures):
    rng = random.Random(f"{method} {seed}")
    score, steps_to_scratch, steps, labels = figures
    score = round(score + 0.002 * (seed - 20.5), 4)
    staging = out.parent / f".{out.name}.staging"
    (staging / "adaptation").mkdir(parents=True)
    time_constant = 75 if steps_to_scratch is None else steps_to_scratch / 2.5
    start = 0.42 if method in ("scratch", "tune") else 0.8 if steps else score
    curve = [
        {
            "step": step,
            "seconds": 0.21 * step,
            "score": round(score - (score - start) * math.exp(-step / time_constant), 4),
        }
        for step in range(0, steps + 1, 30)
    ]
    predictions = []
    for split, count in (("dev", 40), ("test", 200)):
        for row in range(count):
            label = row % 3
            prediction = label if rng.random() < score else (label + 1) % 3
            predictions.append({"split": split, "row": row, "label": label, "prediction": prediction})
    record = OutcomeRecord(
        method=method,
        kind="lora",
        inputs={"method": method, "options": {"alpha": 0.5} if "+" in method else None},
        task=TaskRecord(task, "accuracy", "d", 2400),
        labels=REPORT_LABELS,
        seed=seed,
        recipe={"steps": 300, "batch_size": 16, "learning_rate": 5e-4, "precision": "bf16", "seed": seed},
        scores=Scores(score, 0.41, score, 0.412, curve[0]["score"]),
        best_step=steps,
        cost=Cost(steps, 0.21 * steps + 1.4, labels),
        notes={},
        base=base,
        recycled_from=source,
        versions=versions(),
    )
    return write_outcome(staging, out, record, curve, predictions)


# Commands


def run_command(*arguments: object) -> str:
    """Run `regraft` with arguments in this process, expect success, and return what it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
