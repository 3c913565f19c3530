"""What is to be carried along a chain of bases, as a YAML file says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from regraft.errors import DataError, RecipeError
from regraft.recipe import Recipe
from regraft.task import Task
from regraft.task.yaml_file import did_you_mean, read_yaml, validate

Route = Literal["hop by hop", "at once"]
ROUTES: tuple[Route, ...] = ("hop by hop", "at once")
_STRINGS = "a list of names"


class Training(BaseModel):
    """How long and how fast is trained.

    Args:
        steps: Optimiser steps; None for `epochs`.
        epochs: Passes over the data where `steps` is not given.
        batch_size: Examples a step.
        learning_rate: The peak; None for the kind's own.
        eval_every: Steps between evaluations; None for about ten in all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1, description="a whole number of steps, 1 or more")
    epochs: float = Field(default=3.0, gt=0, description="a number of passes over the data, above 0")
    batch_size: int = Field(default=16, ge=1, description="a whole number of examples, 1 or more")
    learning_rate: float | dict[str, float] | None = Field(
        default=None, description="a number above 0, or one for each kind"
    )
    eval_every: int | None = Field(default=None, ge=1, description="a whole number of steps, 1 or more")

    def recipe(self, kind: str, seed: int, precision: str) -> Recipe:
        """Return the recipe for a kind of adaptation.

        Args:
            kind: The kind.
            seed: The seed.
            precision: `auto`, `bf16` or `fp32`.

        Returns:
            The recipe.
        """
        rate = self.learning_rate.get(kind) if isinstance(self.learning_rate, dict) else self.learning_rate
        return Recipe(
            steps=self.steps, epochs=self.epochs, batch_size=self.batch_size, learning_rate=rate,
            eval_every=self.eval_every, seed=seed, precision=precision,
        )  # fmt: skip


_KEYS = ", ".join(Training.model_fields)


class Chain(BaseModel):
    """A chain of bases, and what is carried along it.

    Args:
        bases: Folders or hub ids, each pre-trained further from the one before.
        tasks: Task files.
        kinds: Kinds of adaptation to tune on the first base.
        methods: How they are recycled; `scratch` is always run on each base, as the reference.
        routes: `hop by hop`: from each base to the next, from what was last recycled; `at once`: from the first.
        seeds: A run of everything with each.
        shots: Training examples a class on later bases; None for all.
        tuning: How the first base is tuned.
        recycling: How later ones are.
        precision: `auto`, `bf16` or `fp32`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bases: tuple[str, ...] = Field(min_length=2, description="a list of at least two bases, in order")
    tasks: tuple[str, ...] = Field(min_length=1, description="a list of task files")
    kinds: tuple[str, ...] = Field(default=("full",), min_length=1, description=_STRINGS)
    methods: tuple[str, ...] = Field(default=("direct", "init+distill"), min_length=1, description=_STRINGS)
    routes: tuple[Route, ...] = Field(default=ROUTES, min_length=1, description=f"a list of {' and '.join(ROUTES)}")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(20,), min_length=1, description="a list of whole numbers"
    )
    shots: int | None = Field(default=None, ge=1, description="a whole number of examples a class, 1 or more")
    tuning: Training = Field(
        default=Training(), description="keys steps, epochs, batch_size, learning_rate, eval_every"
    )
    recycling: Training = Field(
        default=Training(), description="keys steps, epochs, batch_size, learning_rate, eval_every"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(default="auto", description="one of auto, bf16, fp32")

    @classmethod
    def load(cls, path: str | Path) -> Chain:
        """Read a chain file.

        Args:
            path: A YAML file; relative paths in it start from its folder.

        Returns:
            The chain, with absolute paths where there are such files and folders.

        Raises:
            DataError: The file cannot be read, or a key is unknown, missing or of no use; the message names it.
        """
        path = Path(path)
        read = validate(cls, read_yaml(path), str(path))
        folder = path.absolute().parent
        bases = tuple(_beside(folder, base) for base in read.bases)
        tasks = tuple(os.path.abspath(folder / os.path.expanduser(task)) for task in read.tasks)
        chain: Chain = read.model_copy(update={"bases": bases, "tasks": tasks})
        names = [task.name for task in chain.loaded_tasks()]
        folders = [folder_name(name) for name in names]
        if twice := sorted({name for name in names if folders.count(folder_name(name)) > 1}):
            alike = " and ".join(map(repr, twice)) if len(twice) > 1 else repr(twice[0])
            raise DataError(f"{path}: two tasks are called {alike}, a folder's name. Give one of them another `name`.")
        return chain

    def loaded_tasks(self) -> list[Task]:
        """Read the task files.

        Returns:
            The tasks.

        Raises:
            DataError: One cannot be read.
        """
        return [Task.load(task) for task in self.tasks]

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from regraft.methods import find_method, methods

        for name in names:
            try:
                method = find_method(name)
            except RecipeError as error:
                near = did_you_mean(name, list(methods()))
                raise ValueError(f"names {name!r}, which is no method.{near}") from error
            if "tasks" in method.needs():
                raise ValueError(f"names {name!r}, which learns from other tasks. Run it by `regraft recycle`.")
        return tuple(dict.fromkeys(name for name in names if name != "scratch"))

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from regraft.adaptation import KINDS

        for name in names:
            if name not in KINDS:
                raise ValueError(f"names {name!r}, which is no kind.{did_you_mean(name, list(KINDS))}")
        return tuple(dict.fromkeys(names))

    @field_validator("bases", "seeds")
    @classmethod
    def _once_each(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"lists {next(v for v in values if values.count(v) > 1)!r} twice. List each once.")
        return values


def folder_name(name: str) -> str:
    """Make a name of a folder out of any text.

    Args:
        name: As of a task.

    Returns:
        The same with a hyphen for what not every file system takes.
    """
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _beside(folder: Path, base: str) -> str:
    beside = folder / os.path.expanduser(base)
    return os.path.abspath(beside) if os.path.exists(beside) else base
