"""Run all recycling methods on three real tasks, two upgrades, full fine-tunes and LoRAs, with three seeds.

    python experiments/methods.py [--workers 2] [--write-only]

All outcomes are stored in `runs/experiments-methods`: an interrupted run continues where it stopped, and a second run
makes only missing outcomes, such as those of new methods. The figures are written to `experiments/methods/results.json`
and their tables to `experiments/methods/README.md`; `--write-only` writes the tables from the figures alone.

Per task, kind and seed there is one old adaptation, tuned with the seed plus one: the deviations then cover the
randomness of both tunings, though not of the pre-training of the bases (`bases.py`), and scratch does not begin with
the old model's fresh head.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from bases import make_bases
from grid import Entry, Grid, Regime
from methods_page import write_page
from publish import run_experiment

from regraft import Recipe, Task
from regraft.demo.files import evaluation_files
from regraft.demo.tasks import write_task
from regraft.methods import methods

OUT = Path("runs/experiments-methods")
RESULTS = Path(__file__).parent / "methods"
TASKS = ("section-role", "rotten-tomatoes", "licence-category")
TRAIN_EXAMPLES, DEV_EXAMPLES, TEST_EXAMPLES = 2400, 240, 600
MAX_LENGTH = 24
"""Tokens to which texts are truncated. With these sizes, a run takes less than a minute on one core."""
LEARNING_RATES = {"full": 2e-4, "lora": 1e-3}
"""The peak learning rate of tuning, by kind of adaptation."""
FLIP_AWARE, AVERAGED, AUTO_BEST = "init+distill, flip-aware", "init, averaged", "auto, on to the best"
FULL_BUDGET_ENTRIES = ("scratch", "init", "init+distill, fading", "auto", AUTO_BEST)
"""Run with all labels and all steps, in addition to the methods without training. By default `auto` stops at the first
stage that is as good as the old model. With a target that cannot be reached and no tolerance, it looks for the best
stage, here with half of the steps."""
QUARTER_BUDGET_ENTRIES = ("init", AVERAGED, "init+distill", FLIP_AWARE, "ridge+init", "ridge+distill", "anchored")
"""Run with all labels and a quarter of the steps."""
FEW_SHOTS = 32
"""Labelled examples per class in the regime with few labels."""
FEW_LABEL_ENTRIES = (
    "scratch",
    "distill",
    "init",
    "init+distill",
    FLIP_AWARE,
    "ridge+distill",
    "interpolation",
    "label-free",
)
"""Run with `FEW_SHOTS` labels per class."""
INTRODUCTION = """# The recycling methods, measured

Made by `python experiments/methods.py`, which reproduces it; the figures are in `results.json`. Scores are accuracy on
test; ± is the standard deviation over seeds (old tuning and recycling)."""


def make_recipes(steps: int, eval_every: int, batch_size: int) -> dict[str, Recipe]:
    """Return recipes that save no checkpoints, since a run takes less than a minute.

    Args:
        steps: The number of optimiser steps.
        eval_every: The number of steps between evaluations.
        batch_size: The number of examples per step.

    Returns:
        Recipes by kind of adaptation.
    """
    return {
        kind: Recipe(
            steps=steps, batch_size=batch_size, learning_rate=rate, eval_every=eval_every, save_every=10 * steps
        )
        for kind, rate in LEARNING_RATES.items()
    }


def prepare_grid(workers: int) -> Grid:
    """Make the tasks, texts and bases that are missing, and return the experiment.

    Args:
        workers: The number of processes of one thread each.

    Returns:
        The experiment, whose bases and tasks exist.

    Raises:
        SystemExit: A base could not be made.
    """
    files = {
        name: write_task(name, OUT / "data" / name, train=TRAIN_EXAMPLES, dev=DEV_EXAMPLES, test=TEST_EXAMPLES)
        for name in TASKS
    }
    held_out_files = [split for file in files.values() for split in evaluation_files(file)]
    old_base, upgrades = make_bases(OUT, held_out_files, workers)
    training_free_names = [
        name for name, method in methods().items() if "training" not in method.needs() and not method.generation_only
    ]
    changes = {"max_length": MAX_LENGTH, "metric": "accuracy"}
    return Grid(
        out=OUT,
        old_base=old_base,
        upgrades=upgrades,
        tasks={name: Task.load(file).model_copy(update=changes) for name, file in files.items()},
        old_recipes=make_recipes(steps=120, eval_every=40, batch_size=16),
        regimes=(
            Regime(
                "whole",
                None,
                make_recipes(steps=120, eval_every=30, batch_size=16),
                (*training_free_names, *FULL_BUDGET_ENTRIES),
            ),
            Regime("quarter", None, make_recipes(steps=30, eval_every=10, batch_size=16), QUARTER_BUDGET_ENTRIES),
            Regime("few", FEW_SHOTS, make_recipes(steps=32, eval_every=16, batch_size=8), FEW_LABEL_ENTRIES),
        ),
        seeds=(20, 30, 40),
        extra_entries=(
            Entry("init+distill, fading", "init+distill", ("decay=linear",)),
            Entry(FLIP_AWARE, "init+distill", ("flip_weight=1",)),
            Entry(AVERAGED, "init", average=0.5),
            Entry(AUTO_BEST, "auto", ("target=1", "tolerance=0", "budgets=[0.5]", "scratch=false")),
        ),
    )


def write_methods_page(results: dict[str, Any], remark: str) -> str:
    """Return the page of results, with a remark on the number of runs."""
    return write_page(results, INTRODUCTION + remark)


def main() -> None:
    """Make missing outcomes and write the results."""
    run_experiment(__doc__, RESULTS, prepare_grid, write_methods_page)


if __name__ == "__main__":
    main()
