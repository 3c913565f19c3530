"""Pydantic models of `machine.yaml`, `paper.yaml` and the parts of `config.yaml` that experiments share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from regraft.chain.file import Training
from regraft.task.types import TextClassification
from regraft.task.yaml_file import read_yaml, validate

if TYPE_CHECKING:
    from pathlib import Path

_TRAINING_KEYS = "keys steps, epochs, batch_size, learning_rate, eval_every"
_TRAINING_BY_KIND = "for each kind of adaptation, " + _TRAINING_KEYS
NonNegativeInt = Annotated[int, Field(ge=0)]
TasksByKind = Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
"""The names of tasks by kind of adaptation."""
BasePair = tuple[NonNegativeInt, NonNegativeInt]
"""The indices of two bases of the chain."""


class StrictModel(BaseModel):
    """A part of a YAML file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Pretraining(Training):
    """The pre-training of a base on one domain.

    Args:
        block: Tokens per packed block.
        keep_every: Steps between the saved bases.
    """

    block: int = Field(default=128, ge=8, description="a number of tokens, 8 or more")
    keep_every: int = Field(default=100, ge=1, description="a whole number of steps, 1 or more")


class Domain(StrictModel):
    """The unlabelled texts of one upgrade.

    Args:
        name: The name of the domain.
        demo: The name of a domain of the demo; None if `sources` are set.
        sources: Files or data sets of the hub, as in `Corpus`; empty if `demo` is set.
        column: The column of the text, in sources that have columns.
        characters: The number of characters to read; the last document is read to its end.
    """

    name: str = Field(min_length=1, description="a name for the domain")
    demo: str | None = Field(default=None, description="the name of a domain of the demo")
    sources: tuple[str, ...] = Field(default=(), description="a list of files or data sets")
    column: str = Field(default="text", description="the column that holds the text")
    characters: int = Field(ge=1, description="a whole number of characters, 1 or more")

    @model_validator(mode="after")
    def _check_source(self) -> Domain:
        has_demo = self.demo is not None
        if has_demo == bool(self.sources):  # `validate` puts the key before the message.
            raise ValueError(f"of domain {self.name} needs either `demo` or `sources`.")
        return self


class TaskSource(StrictModel):
    """The source of a task's examples.

    Args:
        domain: The name of the task's domain.
        demo: The numbers of train, dev and test examples of the demo's task of this name; None if `task` is set.
        task: The task as declared in a task file; None if `demo` is set.
    """

    domain: str = Field(min_length=1, description="the name of a domain")
    demo: dict[Literal["train", "dev", "test"], int] | None = Field(
        default=None, description="numbers of train, dev and test examples"
    )
    task: TextClassification | None = Field(default=None, description="the keys of a task file")

    @model_validator(mode="after")
    def _check_source(self) -> TaskSource:
        if (self.demo is None) == (self.task is None):  # `validate` puts the key before the message.
            raise ValueError("needs either `demo` or `task`.")
        if self.task is not None and (self.task.test is None or self.task.label is None):
            raise ValueError(f"of task {self.task.name} needs a `test` and a `label`: scores on test are measured.")
        return self


class Size(StrictModel):
    """The size of the reproduction: bases, tasks, recipes and seeds.

    Args:
        base: M_0: `minilm` for the demo's base, else a folder or a hub id.
        domains: The domains in the order of the upgrades; M_1 is M_0 pre-trained on the first domain.
        pretraining: The pre-training of each base.
        tasks: Tasks by their names in the experiments' configs; the name in a task file may differ.
        max_length: The number of tokens to which texts are truncated.
        tuning: Recipes of tuning with all labels, by kind of adaptation.
        few_shot: Recipes of tuning with few labels and on each hop of a chain, by kind of adaptation.
        seeds: The seeds of every tuning and cell.
        precision: `auto`, `bf16` or `fp32`.
    """

    base: str = Field(min_length=1, description="minilm, a folder or a hub id")
    domains: tuple[Domain, ...] = Field(min_length=1, description="a list of domains")
    pretraining: Pretraining = Field(description=f"{_TRAINING_KEYS}, block, keep_every")
    tasks: dict[str, TaskSource] = Field(min_length=1, description="tasks by name")
    max_length: int = Field(ge=8, description="a whole number of tokens, 8 or more")
    tuning: dict[str, Training] = Field(min_length=1, description=_TRAINING_BY_KIND)
    few_shot: dict[str, Training] = Field(min_length=1, description=_TRAINING_BY_KIND)
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=2, description="a list of two whole numbers or more")
    precision: Literal["auto", "bf16", "fp32"] = Field(default="auto", description="one of auto, bf16, fp32")


def list_task_kinds(tasks: TasksByKind) -> list[tuple[str, str]]:
    """Return each pair of a task and a kind of adaptation that it is tuned with."""
    return [(task, kind) for kind, names in tasks.items() for task in names]


Model = TypeVar("Model", bound=BaseModel)


def load_yaml(model: type[Model], path: Path) -> Model:
    """Read a YAML file.

    Args:
        model: The pydantic model of the content.
        path: The file.

    Returns:
        The checked content.

    Raises:
        DataError: The file cannot be read, a key is unknown or missing, or a value is not allowed.
    """
    return validate(model, read_yaml(path), str(path))
