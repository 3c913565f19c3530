"""Compare the speed of tuning with transformers' Trainer, and the speed of a distillation step with a plain step.

    python benchmarks/tune.py

The runs alternate. Compare the ratios within a repetition, since single times drift with the machine. Data and model
are the demo's, and are fetched on first use. Each run sees the same number of training examples, after an untimed
warm-up. Times include everything after loading the model: tokenising, training and, for regraft, two evaluations and
writing the best weights. Only the steps count for the ratio of a distillation step, because the teacher runs before.
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
from regraft.model.examples import encode
from regraft.progress import silent
from regraft.task import load_data
from regraft.tuning import Distillation, Recipe, Teacher, tune_model

NUM_REPETITIONS = 3
EXAMPLES_BY_TASK = {"section-role": 640, "imdb": 128}
"""Training examples of each run; arbitrary, fewer for the task with long texts."""
WARM_UP_EXAMPLES = 64
"""Training examples of the untimed runs; arbitrary."""
LEARNING_RATE = 5e-5
"""The default of transformers' Trainer."""
TRAINER_BATCH_SIZE = 8
"""The default of transformers' Trainer."""
REGRAFT_BATCH_SIZE = Recipe().batch_size


def main():
    """Run the repetitions and print the table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        base = Base.open(extract_model(MINILM, MINILM_PREFIX, folder / "base"))
        print(
            f"| task | tokens | Trainer | Trainer, batch {REGRAFT_BATCH_SIZE} | regraft | ratio | at equal batch | "
            "distillation step |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name, num_examples in EXAMPLES_BY_TASK.items():
            data = load_data(write_task(name, folder / name, train=2000, dev=100, test=100), 20)
            data = dataclasses.replace(data, dev=data.dev.take(range(8)))  # A small dev split makes evaluation fast.
            measure_speeds(base, data, WARM_UP_EXAMPLES)
            speeds = [measure_speeds(base, data, num_examples) for _ in range(NUM_REPETITIONS)]
            print_row(name, statistics.fmean(encode(base, data, data.train).lengths.tolist()), speeds)


def measure_speeds(base, data, num_examples):
    """Return examples per second of each way to train; names that end in "steps" are for the training steps alone."""
    teacher = Teacher(fresh_model(base, data.head, seed=30), base, Distillation())
    speeds = {
        "trainer": run_trainer(base, data, num_examples, TRAINER_BATCH_SIZE),
        "trainer, equal batch": run_trainer(base, data, num_examples, REGRAFT_BATCH_SIZE),
    }
    speeds["regraft"], speeds["regraft steps"] = run_regraft(base, data, num_examples)
    _, speeds["distillation steps"] = run_regraft(base, data, num_examples, teacher)
    return speeds


def run_trainer(base, data, num_examples, batch_size):
    """Return examples per second of transformers' Trainer, with defaults for everything but the batch size."""
    model = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=len(data.labels))
    tokenizer = base.tokenizer
    start = time.perf_counter()
    tokens = tokenizer([text for (text,) in data.train.texts], truncation=True, max_length=data.max_length)
    labels = data.train.labels.tolist()
    examples = [{**{name: tokens[name][i] for name in tokens}, "labels": label} for i, label in enumerate(labels)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            max_steps=num_examples // batch_size,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=examples, data_collator=DataCollatorWithPadding(tokenizer))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return num_examples / (time.perf_counter() - start)


def run_regraft(base, data, num_examples, teacher=None):
    """Return examples per second of regraft with its defaults, in total and in its training steps alone."""
    model = fresh_model(base, data.head, seed=20)
    steps = num_examples // REGRAFT_BATCH_SIZE
    recipe = Recipe(steps=steps, eval_every=steps).resolve(len(data.train), LEARNING_RATE)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        curve = tune_model(model, base, data, recipe, Path(folder), silent, teacher)
        return num_examples / (time.perf_counter() - start), num_examples / curve[-1]["seconds"]


def print_row(task, mean_tokens, speeds):
    """Print medians over the repetitions, of speeds and of ratios within a repetition."""

    def speed(name):
        return statistics.median(repetition[name] for repetition in speeds)

    def ratio(name, reference):
        return statistics.median(repetition[name] / repetition[reference] for repetition in speeds)

    print(
        f"| {task} | {mean_tokens:.0f} | {speed('trainer'):.0f}/s | {speed('trainer, equal batch'):.0f}/s | "
        f"{speed('regraft'):.0f}/s | {ratio('regraft', 'trainer'):.2f}× | "
        f"{ratio('regraft', 'trainer, equal batch'):.2f}× | {ratio('regraft steps', 'distillation steps'):.2f}× |",
        flush=True,
    )


if __name__ == "__main__":
    main()
