"""Tiny bases of several architectures and a small task, written to disk as users have them."""

from __future__ import annotations

import csv
import gc
import os
import random
from pathlib import Path

import pytest
from hypothesis import settings

from regraft.task import Head, TextClassification

settings.register_profile("seeded", derandomize=True)  # the same cases in every run
settings.load_profile("seeded")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and fight for the cores
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

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


def head_of(*labels: str) -> Head:
    """The head of a text classifier."""
    return Head(TextClassification, labels)


def sentence(chance: random.Random, positive: bool) -> str:
    words = [chance.choice(NEUTRAL) for _ in range(chance.randint(3, 12))]
    for _ in range(2):
        words.insert(chance.randrange(len(words)), chance.choice(GOOD if positive else BAD))
    return " ".join(words)


def write_rows(file: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        seen = set()
        while len(seen) < count:
            positive = len(seen) % 2 == 0
            text = sentence(chance, positive)
            if text not in seen:
                seen.add(text)
                writer.writerow([text, "positive" if positive else "negative"])


def make_tokenizer(architecture: str):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

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


def make_config(architecture: str, **changes):
    from transformers import BertConfig, DistilBertConfig, LlamaConfig, RobertaConfig

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    common = {"vocab_size": 5 + len(WORDS), "max_position_embeddings": 66, "pad_token_id": 0}
    if architecture == "distilbert":
        given = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, **common, **changes}
        return DistilBertConfig(**given)
    kind = {"bert": BertConfig, "roberta": RobertaConfig, "llama": LlamaConfig}[architecture]
    return kind(**{**size, **common, **changes})


def write_base(folder: Path, architecture: str = "bert", seed: int = 0, **changes) -> Path:
    """Write a base with its language-modelling head, as pre-training leaves it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if architecture == "llama" else AutoModelForMaskedLM
    model = auto.from_config(make_config(architecture, **changes))
    with torch.no_grad():  # what pre-training knows: which words are alike
        embeddings = model.get_input_embeddings().weight
        direction = torch.randn(embeddings.shape[1])
        for words, sign in ((GOOD, 1), (BAD, -1)):
            embeddings[[5 + WORDS.index(word) for word in words]] += sign * 0.1 * direction
    model.save_pretrained(folder)
    make_tokenizer(architecture).save_pretrained(folder)
    return folder


def move_base(source: Path, folder: Path, amount: float, seed: int = 1) -> Path:
    """Write an upgrade of a base: the same with every floating-point tensor moved a little."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    moved = {
        n: t + amount * t.std().nan_to_num() * torch.randn(t.shape, generator=generator) for n, t in tensors.items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make contract` run the whole table of test_contract."""
    parser.addoption("--contract", choices=("cover", "whole"), default="cover", help="which cells test_contract runs")


def pytest_collection_finish() -> None:
    """Keep the imported libraries out of garbage collection.

    Each training asks for one (in `accelerate`), which takes 0.25 s over them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def task_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    for name, count, seed in (("train", 240, 1), ("dev", 60, 2), ("test", 100, 3)):
        write_rows(folder / f"{name}.csv", count, seed)
    (folder / "task.yaml").write_text(
        "name: mood\ntrain: train.csv\ndev: dev.csv\ntest: test.csv\ntext: text\nlabel: label\nmax_length: 32\n"
    )
    return folder / "task.yaml"


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """An old base and its mild upgrade for each architecture."""
    folder = tmp_path_factory.mktemp("bases")
    pairs = {}
    for name in ARCHITECTURES:
        old = write_base(folder / f"{name}-old", name)
        pairs[name] = (old, move_base(old, folder / f"{name}-new", 0.02))
    return pairs


@pytest.fixture(scope="session")
def quick():
    """A recipe that learns the task on a tiny base in a few seconds."""
    from regraft import Recipe

    return Recipe(steps=60, batch_size=16, learning_rate=3e-3, eval_every=20, save_every=20, precision="fp32")


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, bases, task_file, quick) -> dict[tuple[str, str], Path]:
    """What was tuned on the old base, by architecture and kind."""
    from regraft import tune

    folder = tmp_path_factory.mktemp("tuned")
    return {
        (name, kind): tune(bases[name][0], task_file, folder / f"{name}-{kind}", kind=kind, recipe=quick).path
        for name in ARCHITECTURES
        for kind in ("full", "lora")
    }


@pytest.fixture(scope="session")
def opened(bases):
    """The opened old base and its upgrade for each architecture."""
    from regraft import Base

    return {name: tuple(Base.open(path) for path in pair) for name, pair in bases.items()}


def data_of(train, dev=None, *, labels=("a", "b"), **keys):
    """A task in memory: its splits, and keys of its task file."""
    from regraft.task import TaskData, TextClassification

    task = TextClassification(**{"name": "t", "train": "train.csv", "text": "text", "label": "label", **keys})
    return TaskData(task, tuple(labels), train, dev or train, None, 0)


def loss_of(formula, logits, targets, teacher_logits, hidden, teacher_hidden, options):
    """A loss of distillation over plain tensors: logits rows × classes, hidden states rows × layers × width."""
    import torch

    from regraft.model.outputs import Output
    from regraft.task.types import Signal
    from regraft.task.types.likelihood import CATEGORICAL
    from regraft.tuning.distill import TeacherOutputs

    count = len(logits)
    layers = tuple(layer[:, None] for layer in (*hidden.unbind(dim=1), hidden[:, 0]))
    output = Output(logits, torch.arange(count), torch.zeros(count, dtype=torch.long), layers)
    taught = TeacherOutputs(Signal(teacher_logits), teacher_hidden)
    return formula(output, {"targets": targets, "row": torch.arange(count)}, taught, options, CATEGORICAL)


@pytest.fixture(scope="session")
def texts(opened, task_file):
    """The encoded dev texts for each architecture."""
    from regraft.model import encode
    from regraft.task import load_data

    data = load_data(task_file, 20)
    return {name: encode(pair[0], data, data.dev) for name, pair in opened.items()}


@pytest.fixture(scope="session")
def made(tmp_path_factory, opened, texts):
    """Every kind on every old base, with every tuned number moved; and the logits it gave before it was saved."""
    from regraft.adaptation import KINDS, save_model
    from regraft.model import predict

    folder, adaptations = tmp_path_factory.mktemp("made"), {}
    for architecture, kind in ((a, k) for a in ARCHITECTURES for k in KINDS if (a, k) != ("distilbert", "prefix")):
        base = opened[architecture][0]
        model, start = make_adapted_model(base, kind)
        into = folder / f"{architecture}-{kind}" / "adaptation"
        into.mkdir(parents=True)
        save_model(model, base, HEAD, into, start)
        adaptations[architecture, kind] = into, predict(model, texts[architecture], "fp32")
    return adaptations


def logits_of(path, base, texts):
    """The logits of a stored adaptation."""
    from regraft import load_adaptation
    from regraft.adaptation import load_model
    from regraft.model import predict

    return predict(load_model(load_adaptation(path), base, HEAD), texts, "fp32")


def make_adapted_model(base, kind, head=HEAD, seed=2, **sizes):
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
    import torch

    from regraft.adaptation import fresh_model, initial_factors, new_config, prepare_for_tuning

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


def adapt(base, kind, folder, seed=2, labels=LABELS, **sizes):
    """Write the adaptation that `make_adapted_model` builds, and return its folder."""
    from regraft.adaptation import save_model

    head = head_of(*labels)
    model, start = make_adapted_model(base, kind, head, seed, **sizes)
    folder.mkdir(parents=True)
    save_model(model, base, head, folder, start)
    return folder


def weights(path):
    """The tensors of an adaptation's folder."""
    from safetensors.torch import load_file

    name = "adapter_model" if (path / "adapter_config.json").exists() else "model"
    return load_file(path / f"{name}.safetensors")
