"""Measure the tuning of a LoRA on SmolLM2-135M against TRL's SFTTrainer, and a distillation step against a plain one.

    python benchmarks/generation_tuning.py [--equal-lengths] [--steps N] [--rounds N]

Rows, base, LoRA, batch, learning rate, precision and the number of steps are the same; the order of rows is each
trainer's own. TRL's defaults apply otherwise, with `use_cpu` where there is no accelerator, and the base in the dtype
in which regraft loads it. The runs alternate: compare the ratios within a round. Seconds are those of the training
steps alone. The loss is measured by regraft on the same held-out rows after the last step. Data and model are the
demo's, and are fetched on first use.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, logging
from trl import SFTConfig, SFTTrainer

from regraft.adaptation import fresh_model, load_adaptation, load_model, new_config, prepare_for_tuning, save_model
from regraft.base import Base
from regraft.demo.generation import write_generation_task
from regraft.demo.smollm import prepare_smollm2
from regraft.model import Deployment
from regraft.model.examples import encode
from regraft.progress import quiet, silent
from regraft.recipe import preferred_precision
from regraft.task import load_data
from regraft.tuning import Distillation, Recipe, Teacher, tune_model

BATCH_SIZE = 8
LEARNING_RATE = 2e-4
RANK = 8
SEED = 20
NUM_DEV = 64
"""The number of held-out rows of the loss."""


def main():
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--equal-lengths", action="store_true", help="rows of the same number of tokens only")
    parser.add_argument("--model", type=Path, help="a folder of SmolLM2-135M as `prepare_smollm2` writes it")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        base = Base.open(arguments.model or prepare_smollm2(folder / "base"))
        num_rows = BATCH_SIZE * arguments.steps
        task = write_generation_task("abstract-title", folder / "task", train=3000, dev=NUM_DEV, test=100)
        data = load_data(task, SEED).with_settings(metric="loss")
        data = dataclasses.replace(data, train=choose_rows(base, data, num_rows, arguments.equal_lengths))
        lengths = encode(base, data, data.train).lengths
        print(f"{num_rows} rows of {lengths.min()} to {lengths.max()} tokens, {preferred_precision()}")
        print("| round | TRL tokens/s | regraft tokens/s | ratio | TRL loss | regraft loss | distillation step |")
        print("|---|---|---|---|---|---|---|")
        run_regraft(base, data, steps=2)  # loads the libraries
        ratios = [print_round(index, base, data, arguments.steps) for index in range(arguments.rounds)]
        for name, values in zip(
            ("tokens/s over TRL's", "distillation over plain"), zip(*ratios, strict=True), strict=True
        ):
            print(f"median of {name}: {statistics.median(values):.2f}")


def choose_rows(base, data, num_rows, equal_lengths):
    """Return as many training rows, of similar lengths if asked for."""
    if not equal_lengths:
        return data.train.take(range(num_rows))
    lengths = encode(base, data, data.train).lengths
    order = np.argsort(lengths, kind="stable")
    start = min(range(len(order) - num_rows), key=lambda i: lengths[order[i + num_rows - 1]] - lengths[order[i]])
    return data.train.take(order[start : start + num_rows])


def print_round(index, base, data, steps):
    """Run both trainers once; return the ratio of speeds, and that of a distillation step's time to a plain one's."""
    num_tokens = int(encode(base, data, data.train).lengths.sum())
    trl_seconds, trl_loss = run_trl(base, data, steps)
    seconds, loss = run_regraft(base, data, steps)
    distillation_seconds, _ = run_regraft(base, data, steps, with_teacher=True)
    ratio, step_ratio = trl_seconds / seconds, distillation_seconds / seconds
    print(
        f"| {index + 1} | {num_tokens / trl_seconds:.0f} | {num_tokens / seconds:.0f} | {ratio:.2f} | {trl_loss:.4f} | "
        f"{loss:.4f} | {step_ratio:.2f} |",
        flush=True,
    )
    return ratio, step_ratio


def lora_config():
    """Return the LoRA of both trainers: every linear layer of the body."""
    return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")


def run_trl(base, data, steps):
    """Return the seconds of the training steps of TRL's SFTTrainer, and the loss after them."""
    rows = [
        {"prompt": inputs["messages"], "completion": [{"role": "assistant", "content": answer}]}
        for inputs, answer in zip(data.train.inputs, data.train.targets.tolist(), strict=True)
    ]
    model = fresh_model(base, data.head, SEED, frozen=True)
    timer = Timer()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            max_length=data.max_length,
            bf16=preferred_precision() == "bf16",
            gradient_checkpointing=False,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        with quiet():
            trainer = SFTTrainer(
                model,
                config,
                train_dataset=Dataset.from_list(rows),
                processing_class=base.tokenizer,
                peft_config=lora_config(),
                callbacks=[timer],
            )
            trainer.train()
            trainer.model.save_pretrained(Path(folder) / "adapter")
        adaptation = load_adaptation(Path(folder) / "adapter")
        return timer.seconds, measure_loss(load_model(adaptation, base, data.head), base, data)


def run_regraft(base, data, steps, with_teacher=False):
    """Return the seconds of the training steps of regraft, and the loss after them."""
    recipe = Recipe(steps=steps, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, eval_every=steps, warmup=0.0)
    recipe = dataclasses.replace(recipe, weight_decay=0.0).resolve(len(data.train), LEARNING_RATE)
    config = new_config("lora", base, data.head, rank=RANK)
    model = prepare_for_tuning(fresh_model(base, data.head, SEED, frozen=True), base, data.head, config, SEED)
    teacher = None
    if with_teacher:
        options = Distillation().for_task(data.task)
        teacher = Teacher(fresh_model(base, data.head, SEED, frozen=True), base, options)
    few_dev = dataclasses.replace(data, dev=data.dev.take(range(2)))
    with tempfile.TemporaryDirectory() as folder:
        curve = tune_model(model, base, few_dev, recipe, Path(folder), silent, teacher)
        save_model(model, base, data.head, Path(folder) / "adapter")
        adaptation = load_adaptation(Path(folder) / "adapter")
        return curve[-1]["seconds"], measure_loss(load_model(adaptation, base, data.head), base, data)


def measure_loss(model, base, data):
    """Return the mean loss on dev."""
    return Deployment(model, base, data, preferred_precision()).loss(data.dev)


class Timer(TrainerCallback):
    """Sums the seconds of the training steps, as regraft's trainer does."""

    def __init__(self):
        self.seconds = 0.0
        self.start = 0.0

    def on_step_begin(self, *args, **kwargs):
        """Start the timer of a step."""
        import time

        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        """Stop the timer of a step."""
        import time

        self.seconds += time.perf_counter() - self.start


if __name__ == "__main__":
    main()
