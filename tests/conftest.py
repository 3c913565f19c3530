"""Settings of the tests, and bases, adaptations and a task that many of them share."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

# libraries read these when they are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more threads, which compete for the cores
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from helpers import (
    ARCHITECTURES,
    HEAD,
    LABELS,
    make_adapted_model,
    write_base,
    write_paper_inputs,
    write_sentences,
    write_upgrade,
)
from hypothesis import settings

from regraft import Base, Recipe, cli, tune
from regraft.adaptation import save_model
from regraft.model.batches import predict
from regraft.model.examples import encode
from regraft.task import TaskData, load_data

settings.register_profile("seeded", derandomize=True)  # the same cases in every run
settings.load_profile("seeded")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make contract` run the whole table of test_contract."""
    parser.addoption("--contract", choices=("cover", "whole"), default="cover", help="which cells test_contract runs")


def pytest_collection_finish() -> None:
    """Keep the imported libraries out of garbage collection.

    Each training asks for one (in `accelerate`), which takes 0.25 s over them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def task_file(tmp_path_factory) -> Path:
    """A task of text classification."""
    folder = tmp_path_factory.mktemp("task")
    for name, count, seed in (("train", 240, 1), ("dev", 60, 2), ("test", 100, 3)):
        write_sentences(folder / f"{name}.csv", count, seed)
    (folder / "task.yaml").write_text(
        "name: mood\ntrain: train.csv\ndev: dev.csv\ntest: test.csv\ntext: text\nlabel: label\nmax_length: 32\n"
    )
    return folder / "task.yaml"


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """An old base and its mild upgrade for each architecture."""
    folder = tmp_path_factory.mktemp("bases")
    pairs = {}
    for name in ARCHITECTURES:
        old = write_base(folder / f"{name}-old", name)
        pairs[name] = (old, write_upgrade(old, folder / f"{name}-new", 0.02))
    return pairs


@pytest.fixture(scope="session")
def opened_bases(bases) -> dict[str, tuple[Base, Base]]:
    """The opened old base and its upgrade for each architecture."""
    return {name: (Base.open(old), Base.open(new)) for name, (old, new) in bases.items()}


@pytest.fixture(scope="session")
def data(task_file) -> TaskData:
    """The examples of the task, whose classes are `LABELS`."""
    return load_data(task_file, 20).relabel(LABELS)


@pytest.fixture(scope="session")
def encoded_dev(opened_bases, data):
    """The encoded dev texts for each architecture."""
    return {name: encode(old, data, data.dev) for name, (old, _) in opened_bases.items()}


@pytest.fixture(scope="session")
def quick_recipe() -> Recipe:
    """A recipe that learns the task on a tiny base in a few seconds."""
    return Recipe(steps=60, batch_size=16, learning_rate=3e-3, eval_every=20, save_every=20, precision="fp32")


@pytest.fixture(scope="module")
def paper_folder(tmp_path_factory, bases) -> Path:
    """A folder with the inputs of the paper's experiments on tiny bases."""
    return write_paper_inputs(tmp_path_factory.mktemp("paper"), bases["bert"][0])


@pytest.fixture
def run_main(monkeypatch, capsys):
    """A function that runs `regraft` as a shell does, and returns its exit code, output and error output."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["regraft", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_error:
            code = exit_error.code or 0
        return code, *capsys.readouterr()

    return run


class BuiltOnDemand(dict):
    """A dictionary that builds the value of a key when it is first asked for.

    Args:
        build: The function from the parts of a key to its value.
    """

    def __init__(self, build):
        super().__init__()
        self.build = build

    def __missing__(self, key):
        self[key] = self.build(*key)
        return self[key]


@pytest.fixture(scope="session")
def tuned_outcomes(tmp_path_factory, bases, task_file, quick_recipe) -> dict[tuple[str, str], Path]:
    """The folders of outcomes that learned the task on the old base, by architecture and kind."""
    root = tmp_path_factory.mktemp("tuned")

    def build(architecture, kind):
        base = bases[architecture][0]
        return tune(base, task_file, root / f"{architecture}-{kind}", kind=kind, recipe=quick_recipe).path

    return BuiltOnDemand(build)


@pytest.fixture(scope="session")
def saved_adaptations(tmp_path_factory, opened_bases, encoded_dev):
    """The folder of an adaptation, and its logits before it was saved, by architecture of the old base and kind."""
    root = tmp_path_factory.mktemp("adaptations")

    def build(architecture, kind):
        base = opened_bases[architecture][0]
        folder = root / f"{architecture}-{kind}" / "adaptation"
        folder.mkdir(parents=True)
        model, start = make_adapted_model(base, kind)
        save_model(model, base, HEAD, folder, start)
        return folder, predict(model, encoded_dev[architecture], "fp32")

    return BuiltOnDemand(build)
