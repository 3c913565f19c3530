"""Where everything is kept: texts, bases, tasks, tunings; and how each is made if it is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft import Base, Corpus, Task, Upgrade, load_outcome, tune
from regraft.base import PRETRAINING
from regraft.checkpoint import write_atomic
from regraft.demo.domains import write_corpus
from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model
from regraft.demo.tasks import write_task
from regraft.errors import DataError, OutcomeError
from regraft.task import load_data
from regraft.tuning import pretrain_chain

if TYPE_CHECKING:
    from findings.settings import Domain, Size
    from regraft import Outcome, Recipe
    from regraft.task import TaskData


@dataclasses.dataclass(frozen=True, order=True)
class Tuning:
    """A task tuned on a base with all labels.

    Args:
        task: Its name.
        kind: The kind of adaptation.
        base: The number of the base, 0 for the first.
        seed: The seed; what is random follows from it and the base, so that no two bases share a fresh head.
    """

    task: str
    kind: str
    base: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Store:
    """Everything that the experiments share.

    Args:
        out: The folder for all of it.
        size: How large everything is.
    """

    out: Path
    size: Size

    def base(self, number: int) -> str:
        """Give a base of the chain: a folder, or the first one's hub id."""
        if number:
            return str(self.out / "bases" / f"{number}-{self.size.domains[number - 1].name}")
        return str(self.out / "minilm") if self.size.base == "minilm" else self.size.base

    def upgrade(self, old: int, new: int) -> Upgrade:
        """Open two bases."""
        return _upgrade(self.base(old), self.base(new))

    def checkpoints(self) -> list[tuple[int, int, Path]]:
        """Give all bases that were kept on the way, as number of the domain, steps since M_0, and folder."""
        found, before = [], 0
        for number in range(1, len(self.size.domains) + 1):
            folder = Path(self.base(number))
            steps = steps_of(folder)
            kept = folder.with_name(f"{folder.name}-steps").glob("step-*")
            on_the_way = sorted((int(path.name.removeprefix("step-")), path) for path in kept)
            found += [(number, before + step, path) for step, path in on_the_way if step < steps]
            before += steps
            found.append((number, before, folder))
        return found

    def task_file(self, task: str) -> Path:
        """Give a task's file, cut to this size's length."""
        return self.out / "tasks" / f"{task}.yaml"

    def task(self, task: str) -> Task:
        """Give a task."""
        return Task.load(self.task_file(task))

    def data(self, task: str, seed: int = 0) -> TaskData:
        """Give a task's examples; the seed matters where dev has to be held out."""
        return _data(self.task_file(task), seed)

    def recipe(self, kind: str, seed: int, base: int, *, few: bool = False) -> Recipe:
        """Give the recipe for a kind, seed and base: with all labels, or with few."""
        trainings = self.size.few_shot if few else self.size.tuning
        if kind not in trainings:
            raise DataError(f"there is no recipe for kind {kind!r} among {', '.join(trainings)}. Add it to the size.")
        return trainings[kind].recipe(kind, seed + base, self.size.precision)

    def tuned(self, task: str, kind: str, base: int, seed: int) -> Path:
        """Give the outcome folder of a tuning."""
        return self.out / "tuned" / f"{task}-{kind}-M{base}-seed{seed}"

    def has(self, task: str, kind: str, base: int, seed: int) -> bool:
        """Whether a tuning is there."""
        return (self.tuned(task, kind, base, seed) / "outcome.json").is_file()

    def outcome(self, task: str, kind: str, base: int, seed: int) -> Outcome:
        """Read the outcome of a tuning."""
        return load_outcome(self.tuned(task, kind, base, seed))


@functools.lru_cache(maxsize=4)
def _upgrade(old: str, new: str) -> Upgrade:
    return Upgrade(_base(old), _base(new))


@functools.lru_cache(maxsize=6)
def _base(name: str) -> Base:
    return Base.open(name)


@functools.lru_cache(maxsize=8)
def _data(file: Path, seed: int) -> TaskData:
    return load_data(file, seed)


def steps_of(base: Path) -> int:
    """Tell by how many steps a base was pre-trained from the one before it."""
    return int(json.loads((base / PRETRAINING).read_text(encoding="utf-8"))["steps"])


def check_size(store: Store) -> None:
    """Refuse to mix what was made at another size; seeds, tasks, kinds and later domains may be added.

    Args:
        store: Where.

    Raises:
        OutcomeError: What is there was made otherwise; the message names the keys that differ.
    """
    file, now = store.out / "size.json", store.size.model_dump(mode="json")
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        grows = {"tasks", "tuning", "few_shot"}
        differing = [key for key in now if key not in {*grows, "seeds", "domains"} and before.get(key) != now[key]]
        differing += [] if all(map(operator.eq, before["domains"], now["domains"])) else ["domains"]
        differing += [
            f"{key}.{name}" for key in sorted(grows) for name, value in now[key].items()
            if before.get(key, {}).get(name, value) != value
        ]  # fmt: skip
        if differing:
            raise OutcomeError(
                f"{store.out}: was made with other values of {', '.join(differing)}. Give another --out, or remove it "
                "and run again."
            )
        now |= {key: before.get(key, {}) | now[key] for key in grows}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(now, indent=1) + "\n")


def write_data(store: Store) -> None:
    """Write the tasks and the texts that are missing.

    Args:
        store: Where.

    Raises:
        DataError: A source cannot be read.
    """
    for name, source in store.size.tasks.items():
        if source.demo is None:
            task = source.task
        else:
            file = write_task(name, store.out / "data" / name, **source.demo)
            task = Task.load(file).model_copy(update={"metric": "accuracy"})
        values = task.model_copy(update={"max_length": store.size.max_length}).model_dump(mode="json")
        store.task_file(name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({key: value for key, value in values.items() if value is not None or key == "label"})
        if not store.task_file(name).is_file() or store.task_file(name).read_text(encoding="utf-8") != text:
            write_atomic(store.task_file(name), text)  # JSON is YAML
    unseen = [store.out / "data" / name / f"{split}.csv" for name, source in store.size.tasks.items()
              if source.demo for split in ("dev", "test")]  # fmt: skip
    for domain in store.size.domains:
        file = store.out / "texts" / f"{domain.name}.jsonl"
        if file.is_file():
            continue
        if domain.demo is not None:
            write_corpus(domain.demo, file, domain.characters, exclude=unseen)
        else:
            _copy(domain, file)
    if store.size.base == "minilm":
        extract_model(MINILM, MINILM_PREFIX, Path(store.base(0)))


def _copy(domain: Domain, file: Path) -> None:
    """Copy as much of a domain's sources as is wanted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        beside = Path(folder) / "corpus.jsonl"
        documents = Corpus(domain.sources, domain.column).documents()
        with beside.open("w", encoding="utf-8") as stream, contextlib.closing(documents):
            for text in documents:
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text)
                if written >= domain.characters:
                    break
        if not written:
            raise DataError(f"domain {domain.name}: there is no text in {', '.join(domain.sources)}.")
        os.replace(beside, file)


def make_bases(store: Store) -> str:
    """Pre-train the chain of bases, as far as it is missing."""
    plan = store.size.pretraining
    texts = [Corpus((str(store.out / "texts" / f"{domain.name}.jsonl"),)) for domain in store.size.domains]
    recipe = plan.recipe("pre-training", store.size.seeds[0], store.size.precision)
    made = pretrain_chain(
        Base.open(store.base(0)), texts, store.out / "bases", recipe, plan.block, keep_every=plan.keep_every
    )
    curves = [json.loads((base.path / PRETRAINING).read_text(encoding="utf-8"))["curve"] for base in made]
    return "; ".join(f"loss {curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f}" for curve in curves)


def make_tuning(store: Store, wanted: Tuning) -> str:
    """Tune a task on a base."""
    task, kind, base, seed = dataclasses.astuple(wanted)
    done = tune(
        _base(store.base(base)), store.task(task), store.tuned(task, kind, base, seed), kind=kind,
        recipe=store.recipe(kind, seed, base),
    )  # fmt: skip
    return f"test {done.scores['test']:.3f}"


def figures_of(outcome: Outcome) -> dict[str, Any]:
    """Give what the experiments compare of an outcome, as JSON; the weights may then be cleared away."""
    scores, cost = outcome.record.scores, outcome.record.cost
    return {
        "test": scores.test,
        "majority": scores.test_majority,
        "start": scores.dev_at_start,
        "curve": [[int(point["step"]), round(point["score"], 5)] for point in outcome.curve],
        "steps": cost.steps,
        "seconds": cost.seconds,
        "predictions": outcome.predictions("test"),
    }


def clear(folder: Path) -> None:
    """Remove a folder of weights that nothing needs any more."""
    shutil.rmtree(folder, ignore_errors=True)
