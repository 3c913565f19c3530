"""The chain file: the bases, tasks, kinds and methods of an upgrade chain, in YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from regraft.errors import DataError, RecipeError, did_you_mean
from regraft.recipe import Recipe
from regraft.task import Task
from regraft.task.yaml_file import read_yaml, validate

Route = Literal["hop by hop", "at once"]
ROUTES: tuple[Route, ...] = get_args(Route)
Precision = Literal["auto", "bf16", "fp32"]
_NAMES = "a list of names"


class Training(BaseModel):
    """The length and learning rate of training, with the defaults of `Recipe`.

    Args:
        steps: The number of optimiser steps; None for as many as `epochs` takes, but at least 100.
        epochs: The number of passes over the data; not used if `steps` is set.
        batch_size: The number of examples per step.
        learning_rate: The peak learning rate, or one per kind. None, or a kind without one, stands for the kind's
            default.
        eval_every: The number of steps between evaluations; None for about ten evaluations in all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1, description="a whole number of steps, 1 or more")
    epochs: float = Field(default=Recipe.epochs, gt=0, description="a number of passes over the data, above 0")
    batch_size: int = Field(default=Recipe.batch_size, ge=1, description="a whole number of examples, 1 or more")
    learning_rate: float | dict[str, float] | None = Field(
        default=None, description="a number above 0, or one for each kind"
    )
    eval_every: int | None = Field(default=None, ge=1, description="a whole number of steps, 1 or more")

    def recipe(self, kind: str, seed: int, precision: str) -> Recipe:
        """Return the recipe for a kind of adaptation.

        Args:
            kind: The kind, which selects the learning rate.
            seed: The seed of all random choices; see `Recipe`.
            precision: `auto`, `bf16` or `fp32`; see `Recipe`.
        """
        learning_rate = self.learning_rate
        if isinstance(learning_rate, dict):
            learning_rate = learning_rate.get(kind)
        return Recipe(
            steps=self.steps,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=learning_rate,
            eval_every=self.eval_every,
            seed=seed,
            precision=precision,
        )


_TRAINING = f"keys {', '.join(Training.model_fields)}"


class Chain(BaseModel):
    """A chain of bases, and the adaptations to carry along it.

    Args:
        bases: Folders or Hub ids; each base after the first is the previous base, pre-trained further.
        tasks: The paths of task files.
        kinds: The kinds of adaptation to tune on the first base.
        methods: The methods that recycle the adaptations; `scratch` always runs on each later base, as the reference.
            By default `direct`, which does not train, and `init+distill`, which does.
        routes: `hop by hop` recycles the last outcome from each base to the next; `at once` recycles the first outcome
            from the first base to each later base.
        seeds: The seeds; every run is repeated with each of them.
        shots: The `shots` of the task on later bases; None for the task's own.
        tuning: The length and learning rate of training on the first base.
        recycling: The length and learning rate of training on later bases.
        precision: `auto`, `bf16` or `fp32`; see `Recipe`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bases: tuple[str, ...] = Field(min_length=2, description="a list of at least two bases, in order")
    tasks: tuple[str, ...] = Field(min_length=1, description="a list of task files")
    kinds: tuple[str, ...] = Field(default=("full",), min_length=1, description=_NAMES)
    methods: tuple[str, ...] = Field(default=("direct", "init+distill"), min_length=1, description=_NAMES)
    routes: tuple[Route, ...] = Field(default=ROUTES, min_length=1, description=f"a list of {' and '.join(ROUTES)}")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(Recipe.seed,), min_length=1, description="a list of whole numbers"
    )
    shots: int | None = Field(default=None, ge=1, description="a whole number, 1 or more")
    tuning: Training = Field(default=Training(), description=_TRAINING)
    recycling: Training = Field(default=Training(), description=_TRAINING)
    precision: Precision = Field(default="auto", description=f"one of {', '.join(get_args(Precision))}")

    @classmethod
    def load(cls, path: str | Path) -> Chain:
        """Read a chain file.

        Args:
            path: A YAML file; relative paths in it start from its folder.

        Returns:
            The chain, with absolute paths of its tasks and of the bases that are folders.

        Raises:
            DataError: The chain file or a task file cannot be read, two tasks have the same `folder_name`, or a key is
                unknown, missing or invalid; the message names the key.
        """
        path = Path(path)
        relative_chain = validate(cls, read_yaml(path), str(path))
        root = path.absolute().parent
        bases = tuple(_resolve_base(root, base) for base in relative_chain.bases)
        tasks = tuple(os.path.abspath(root / os.path.expanduser(task)) for task in relative_chain.tasks)
        chain: Chain = relative_chain.model_copy(update={"bases": bases, "tasks": tasks})
        names = [task.name for task in chain.load_tasks()]
        folders = [folder_name(name) for name in names]
        duplicates = sorted({name for name, folder in zip(names, folders, strict=True) if folders.count(folder) > 1})
        if duplicates:
            listed = " and ".join(map(repr, duplicates))
            raise DataError(
                f"{path}: tasks called {listed} would share a folder. Give each of them a different `name`."
            )
        return chain

    def load_tasks(self) -> list[Task]:
        """Read the task files.

        Returns:
            The tasks, in the order of the file.

        Raises:
            DataError: A task file cannot be read.
        """
        return [Task.load(task) for task in self.tasks]

    @field_validator("methods")
    @classmethod
    def _normalise_methods(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse methods that a chain cannot run, and drop duplicates and `scratch`, which always runs."""
        from regraft.methods import find_method

        for name in names:
            try:
                method = find_method(name)
            except RecipeError as error:
                raise ValueError(f"names {name!r}: {error}") from error
            if "tasks" in method.needs():
                raise ValueError(f"names {name!r}, which learns from other tasks. Run it by `regraft recycle`.")
        return tuple(dict.fromkeys(name for name in names if name != "scratch"))

    @field_validator("kinds")
    @classmethod
    def _normalise_kinds(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse unknown kinds, and drop duplicates."""
        from regraft.adaptation import KINDS

        for name in names:
            if name not in KINDS:
                raise ValueError(f"names {name!r}, which is not a kind.{did_you_mean(name, list(KINDS))}")
        return tuple(dict.fromkeys(names))

    @field_validator("bases", "seeds")
    @classmethod
    def _refuse_duplicates(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            duplicate = next(value for value in values if values.count(value) > 1)
            raise ValueError(f"lists {duplicate!r} twice. List each once.")
        return values


def folder_name(name: str) -> str:
    """Replace each character of a name that some file systems may refuse by a hyphen.

    Args:
        name: A name, such as a task's; only its letters, digits and `-_.` are kept.
    """
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in name)


def _resolve_base(folder: Path, base: str) -> str:
    """Return the absolute path of a base that is a folder; return a Hub id unchanged."""
    path = folder / os.path.expanduser(base)
    return os.path.abspath(path) if os.path.exists(path) else base
