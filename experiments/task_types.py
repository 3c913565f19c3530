"""Run recycling methods on tasks of other types than classification: sets of labels, numbers and tags.

    python experiments/task_types.py [--workers 2] [--write-only]

Three real tasks, two upgrades and LoRAs, with three seeds. All outcomes are stored in `runs/experiments-task-types`: an
interrupted run continues where it stopped. The figures are written to `experiments/task_types/results.json` and their
tables to `experiments/task_types/README.md`; `--write-only` writes the tables from the figures alone. Bases, seeds and
old adaptations are made as in `experiments/methods.py`.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from bases import make_bases
from grid import Grid, Regime
from methods_page import write_page
from publish import run_experiment
from tables import MISSING, distinct_values, format_mean, markdown_table, select

from regraft import Recipe, Task
from regraft.demo.files import evaluation_files
from regraft.demo.tasks import write_task

if TYPE_CHECKING:
    from tables import Row

OUT = Path("runs/experiments-task-types")
RESULTS = Path(__file__).parent / "task_types"
EXAMPLES = {
    "mesh-headings": (2400, 240, 600),
    "sentence-position": (2400, 240, 600),
    "licence-phrases": (900, 110, 340),
}
"""The numbers of train, dev and test examples by task: as in `experiments/methods.py`, or nearly all that there are."""
MAX_LENGTHS = {"mesh-headings": 32, "sentence-position": 24, "licence-phrases": 64}
"""Tokens to which texts are truncated: with these, a run takes one or two minutes on one core. The phrases of licences
need more, because words that are cut off have no predicted tag; half of their texts are shorter."""
METHODS = ("scratch", "direct", "ridge", "init", "init+distill")
RECIPE = Recipe(steps=200, batch_size=16, learning_rate=1e-3, eval_every=40, save_every=2000)
"""The recipe of all tunings, which saves no checkpoints, since a run takes less than two minutes. After 120 steps,
scratch is hardly better than a guess on the headings, most of which are rare; at 2e-3, it learns no positions."""
INTRODUCTION = """# Sets of labels, numbers and tags, measured

Made by `python experiments/task_types.py`, which reproduces it; the figures are in `results.json`. LoRAs are recycled
on tasks of three types: `mesh-headings`, the headings of an abstract (multi-label classification, micro F1);
`sentence-position`, the position of a sentence in its abstract (regression, Pearson's correlation); and
`licence-phrases`, the marked phrases of licence notices (token classification, F1 of whole phrases). ± is the standard
deviation over seeds (old tuning and recycling). A guess is the most frequent headings, the mean, or that there is no
phrase. An example flips if its set of headings, its position within the task's tolerance, or the tags of all its words
were right with the old model and are wrong now."""


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
        name: write_task(name, OUT / "data" / name, train=train, dev=dev, test=test)
        for name, (train, dev, test) in EXAMPLES.items()
    }
    held_out_files = [split for file in files.values() for split in evaluation_files(file)]
    old_base, upgrades = make_bases(OUT, held_out_files, workers)
    return Grid(
        out=OUT,
        old_base=old_base,
        upgrades=upgrades,
        tasks={
            name: Task.load(file).model_copy(update={"max_length": MAX_LENGTHS[name]}) for name, file in files.items()
        },
        old_recipes={"lora": RECIPE},
        regimes=(Regime("whole", None, {"lora": RECIPE}, METHODS),),
        seeds=(20, 30, 40),
    )


def write_types_page(results: dict[str, Any], remark: str) -> str:
    """Return the page of results, with a remark on the number of runs."""
    introduction = "\n\n".join([INTRODUCTION + remark, *_score_sections(results)])
    return write_page(results, introduction, with_targets=False)


def _score_sections(results: dict[str, Any]) -> list[str]:
    """Write a table per task: the scores, recoveries, flips and costs of each method on each upgrade."""
    runs = results["runs"]
    sections = []
    for task in distinct_values(runs, "task"):
        task_runs = select(runs, task=task)
        metric = results["made"]["tasks"][task]["metric"]
        head = ["method"]
        for upgrade in results["upgrades"]:
            head += [f"{upgrade}: {metric}", "recovery %", "negative flips %"]
        rows = [
            [method, *_method_cells(select(task_runs, entry=method), list(results["upgrades"]))]
            for method in distinct_values(task_runs, "entry")
        ]
        guess = statistics.fmean(run["majority"] for run in task_runs)
        old = format_mean([run["old"] for run in select(task_runs, entry="scratch", upgrade=task_runs[0]["upgrade"])])
        sections.append(f"## {task}\n\nGuessing {guess:.3f}, the old deployment {old} on test.")
        sections.append(markdown_table([*head, "steps", "seconds"], rows))
    return sections


def _method_cells(runs: list[Row], upgrades: list[str]) -> list[str]:
    """Write a method's scores, recoveries and flips by upgrade, and its mean cost."""
    cells = []
    for upgrade in upgrades:
        upgrade_runs = select(runs, upgrade=upgrade)
        if not upgrade_runs:
            cells += [MISSING] * 3
            continue
        cells.append(format_mean([run["test"] for run in upgrade_runs]))
        cells.append(format_mean([run["recovery"] for run in upgrade_runs], 0))
        cells.append(format_mean([100 * run["negative_flips"] for run in upgrade_runs], 1))
    return [*cells, *(f"{statistics.fmean(run[cost] for run in runs):.0f}" for cost in ("steps", "seconds"))]


def main() -> None:
    """Make missing outcomes and write the results."""
    run_experiment(__doc__, RESULTS, prepare_grid, write_types_page)


if __name__ == "__main__":
    main()
