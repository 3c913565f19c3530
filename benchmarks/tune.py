"""Speed of tuning against transformers' Trainer with its defaults, and of a distillation step against a plain one.

    python benchmarks/tune.py

The runs alternate, and the ratio of each pair is what counts: single times drift with the machine. Data and model are
the demo's (fetched on first use). Each run sees the same number of training examples, after a warm-up that is not
timed. Times are of everything after loading the model: tokenising, training and, for regraft, two evaluations and
writing the best weights. The distillation's step ratio is of the steps alone: the teacher runs before.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    logging,
)
from transformers.trainer_callback import PrinterCallback

from regraft.adaptation import fresh_model
from regraft.base import Base
from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model
from regraft.demo.tasks import write_task
from regraft.model import encode
from regraft.progress import silent
from regraft.task import load_data
from regraft.tuning import Distillation, Recipe, Teacher, tune_model

PAIRS = 3
TASKS = {"section-role": 640, "imdb": 128}


def with_trainer(base, data, examples, batch_size):
    """Examples a second of transformers' Trainer, everything but the batch size at its default."""
    model = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=len(data.labels))
    tokenizer = base.tokenizer
    start = time.perf_counter()
    tokens = tokenizer([text for (text,) in data.train.texts], truncation=True, max_length=data.max_length)
    labels = data.train.labels.tolist()
    rows = [{**{name: tokens[name][i] for name in tokens}, "labels": label} for i, label in enumerate(labels)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch_size, max_steps=examples // batch_size, save_strategy="no",
            disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return examples / (time.perf_counter() - start)


def with_regraft(base, data, examples, teacher=None):
    """Examples a second of regraft with its defaults: in all, and in its training steps alone."""
    model = fresh_model(base, data.head, seed=20)
    steps = examples // Recipe().batch_size
    recipe = Recipe(steps=steps, eval_every=steps).resolve(len(data.train), 5e-5)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        curve = tune_model(model, base, data, recipe, Path(folder), silent, teacher)
        return examples / (time.perf_counter() - start), examples / curve[-1]["seconds"]


def main():
    """Run the pairs and print the table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        base = Base.open(extract_model(MINILM, MINILM_PREFIX, Path(folder) / "base"))
        print("| task | tokens | Trainer | Trainer, batch 16 | regraft | ratio | at equal batch | distillation step |")
        print("|---|---|---|---|---|---|---|---|")
        for name, examples in TASKS.items():
            data = load_data(write_task(name, Path(folder) / name, train=2000, dev=100, test=100), 20)
            data = dataclasses.replace(data, dev=data.dev.take(range(8)))  # evaluation is not what is timed
            tokens = statistics.fmean(encode(base, data, data.train).lengths.tolist())
            teacher = Teacher(fresh_model(base, data.head, seed=30), base, Distillation())
            runs = {
                "default": lambda n: with_trainer(base, data, n, 8),  # noqa: B023
                "batch16": lambda n: with_trainer(base, data, n, 16),  # noqa: B023
                "regraft": lambda n: with_regraft(base, data, n),  # noqa: B023
                "distill": lambda n: with_regraft(base, data, n, teacher),  # noqa: B023
            }
            for run in runs.values():
                run(64)
            speeds = [{key: run(examples) for key, run in runs.items()} for _ in range(PAIRS)]
            faster = statistics.median(speed["regraft"][0] / speed["default"] for speed in speeds)
            same_batch = statistics.median(speed["regraft"][0] / speed["batch16"] for speed in speeds)
            slower = statistics.median(speed["regraft"][1] / speed["distill"][1] for speed in speeds)
            default, batch16 = (statistics.median(speed[key] for speed in speeds) for key in ("default", "batch16"))
            ours = statistics.median(speed["regraft"][0] for speed in speeds)
            print(
                f"| {name} | {tokens:.0f} | {default:.0f}/s | {batch16:.0f}/s | {ours:.0f}/s | {faster:.2f}× | "
                f"{same_batch:.2f}× | {slower:.2f}× |",
                flush=True,
            )


if __name__ == "__main__":
    main()
