"""All recycling methods on real models and data: three tasks, a mild and a heavy upgrade, full and LoRA, three seeds.

    python experiments/methods.py [--workers 2] [--write-only]

Everything it makes is kept in `runs/experiments-methods`; interrupted, it goes on where it was, and a second run builds
only what is missing (new methods, say). The figures are written to `experiments/methods/results.json`, the tables made
of them to `experiments/methods/README.md`; `--write-only` writes these from the figures alone.

The old base is all-MiniLM-L6-v2 after a short pre-training on news (it has no language-modelling head: so no upgrade
begins with noise from a fresh one). Each seed has an old adaptation of its own, tuned with that seed plus one: the
deviations are then over everything that chance decides, and scratch does not begin with the old model's very head.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from figures import collect
from grid import Entry, Grid, Regime, cells
from runner import run, run_jobs
from tables import page, read_results, write_results

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
TRAIN, DEV, TEST, MAX_LENGTH = 2400, 240, 600, 24
CHARACTERS = 4_000_000
"""Of unlabelled text a domain: more than any pre-training here sees."""
BASES = {
    "old": ("minilm", "news", Recipe(steps=200, eval_every=100)),
    "mild": ("old", "bio", Recipe(steps=100, eval_every=50)),
    "halfway": ("old", "legal", Recipe(steps=300, eval_every=150, learning_rate=1e-3)),
    "heavy": ("halfway", "news", Recipe(steps=300, eval_every=150, learning_rate=4e-4)),
}
"""Of each base, the one it is made from, the domain and how it is pre-trained, in blocks of 64 tokens. The first half
of the heavy upgrade moves far; by itself it leaves a base on which scratch learns little, and the second half, on
general text again, mends that."""
RATES = {"full": 2e-4, "lora": 1e-3}
WHOLE = ("scratch", "init", "init+distill, fading", "auto", "auto, on to the best")
"""Run with all labels and the whole budget, beside all that do no training. By default `auto` stops at what is as good
as the old deployment; with a target that nothing reaches and no tolerance it is to find the best there is, here with
half of the steps."""
FLIP_AWARE, AVERAGED = "init+distill, flip-aware", "init, averaged"
QUARTER = ("init", AVERAGED, "init+distill", FLIP_AWARE, "ridge+init", "ridge+distill", "anchored")
"""Run with all labels and a quarter of the steps."""
FEW_LABELS = (
    "scratch", "distill", "init", "init+distill", FLIP_AWARE, "ridge+distill", "interpolation", "label-free",
)  # fmt: skip


def recipes(steps: int, eval_every: int, batch_size: int) -> dict[str, Recipe]:
    """Give the recipe of each kind; no checkpoints, since a run takes less than a minute."""
    return {
        kind: Recipe(
            steps=steps, batch_size=batch_size, learning_rate=rate, eval_every=eval_every, save_every=10 * steps
        )
        for kind, rate in RATES.items()
    }


def prepare(workers: int) -> Grid:
    """Make the bases and the tasks, and say what is to be run."""
    files = {name: write_task(name, OUT / "data" / name, train=TRAIN, dev=DEV, test=TEST) for name in TASKS}
    unseen = [file.parent / f"{split}.csv" for file in files.values() for split in ("dev", "test")]
    for _, domain, _ in BASES.values():
        if not (corpus := OUT / "texts" / f"{domain}.jsonl").is_file():
            write_corpus(domain, corpus, CHARACTERS, exclude=unseen)
    extract_model(MINILM, MINILM_PREFIX, OUT / "models" / "minilm")
    for names in (["old"], ["mild", "halfway"], ["heavy"]):
        absent = [name for name in names if not (OUT / "models" / name).is_dir()]
        if failed := run_jobs([(f"base {name}", make_base, (name,)) for name in absent], workers, print):
            sys.exit("\n".join(failed))
    free = [name for name, method in methods().items() if "training" not in method.needs()]
    changes = {"max_length": MAX_LENGTH, "metric": "accuracy"}
    return Grid(
        out=OUT,
        old=OUT / "models" / "old",
        upgrades={name: OUT / "models" / name for name in ("mild", "heavy")},
        tasks={name: Task.load(file).model_copy(update=changes) for name, file in files.items()},
        tuning=recipes(120, 40, 16),
        regimes=(
            Regime("whole", None, recipes(120, 30, 16), (*free, *WHOLE)),
            Regime("quarter", None, recipes(30, 10, 16), QUARTER),
            Regime("few", 32, recipes(32, 16, 8), FEW_LABELS),
        ),
        seeds=(20, 30, 40),
        extras=(
            Entry("init+distill, fading", "init+distill", ("decay=linear",)),
            Entry(FLIP_AWARE, "init+distill", ("flip_weight=1",)),
            Entry(AVERAGED, "init", average=0.5),
            Entry("auto, on to the best", "auto", ("target=1", "tolerance=0", "budgets=[0.5]", "scratch=false")),
        ),
    )


def make_base(name: str) -> str:
    """Pre-train a base."""
    source, domain, recipe = BASES[name]
    folder = OUT / "models"
    pretrain(Base.open(folder / source), Corpus((str(OUT / "texts" / f"{domain}.jsonl"),)), folder / name, recipe, 64)
    curve = json.loads((folder / name / "pretraining.json").read_text(encoding="utf-8"))["curve"]
    return f"loss {curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f}"


def write(grid: Grid, folder: Path, intro: str) -> None:
    """Write the figures and the tables of what has been run.

    Args:
        grid: The experiment.
        folder: Where `results.json` and `README.md` go.
        intro: What stands above the tables.

    Raises:
        OutcomeError: The folder has the results of more runs.
    """
    results, every = collect(grid), len(list(cells(grid)))
    if len(results["runs"]) < every:
        results["made"]["of"] = every
    write_page(write_results(folder, results, lambda some: len(some["runs"])), folder, intro)


def write_page(results: dict[str, Any], folder: Path, intro: str) -> None:
    """Write the tables of results.

    Args:
        results: The content of `results.json`.
        folder: Where `README.md` goes.
        intro: What stands above the tables.
    """
    if every := results["made"].get("of"):
        count = len(results["runs"])
        intro += f"\n\n**Not complete: {count} of {every} runs so far; the same command makes the others.**"
    write_atomic(folder / "README.md", page(results, intro))


INTRO = """# The recycling methods, measured

Made by `python experiments/methods.py`, which reproduces it; the figures are in `results.json`. Scores are accuracy on
test; ± is the standard deviation over seeds (old tuning and recycling)."""


def main() -> None:
    """Run what is missing, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--write-only", action="store_true", help="write the tables of results.json")
    given = parser.parse_args()
    try:
        if given.write_only:
            write_page(read_results(RESULTS), RESULTS, INTRO)
            return
        grid = prepare(given.workers)
        failed = run(grid, given.workers)
        write(grid, RESULTS, INTRO)
    except OutcomeError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"{len(failed)} failed; run again to try them again:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
