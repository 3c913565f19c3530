"""What `machine.yaml`, `paper.yaml` and the experiments' `config.yaml` say, checked key by key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from regraft.chain.file import Training
from regraft.task.types import TextClassification
from regraft.task.yaml_file import read_yaml, validate

if TYPE_CHECKING:
    from pathlib import Path

_TRAINING = "keys steps, epochs, batch_size, learning_rate, eval_every"
_A_KIND = "for each kind of adaptation, " + _TRAINING
Number = Annotated[int, Field(ge=0)]
Tasks = Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
"""The names of tasks by kind of adaptation."""


class Settings(BaseModel):
    """Keys and values of a YAML file, none of them unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Pretraining(Training):
    """How a base is pre-trained further.

    Args:
        block: Tokens a packed block.
        keep_every: Steps between the bases that are kept on the way.
    """

    block: int = Field(default=128, ge=8, description="a number of tokens, 8 or more")
    keep_every: int = Field(default=100, ge=1, description="a whole number of steps, 1 or more")


class Domain(Settings):
    """The unlabelled text of one upgrade.

    Args:
        name: What it is called.
        demo: A domain of the demo's packages; None for `sources`.
        sources: Files or `datasets` names, as `Corpus` takes them.
        column: The text's name in sources that have columns.
        characters: About how many characters to take.
    """

    name: str = Field(min_length=1, description="a name for the domain")
    demo: str | None = Field(default=None, description="the name of a domain of the demo")
    sources: tuple[str, ...] = Field(default=(), description="a list of files or data sets")
    column: str = Field(default="text", description="the column that holds the text")
    characters: int = Field(ge=1, description="a whole number of characters, 1 or more")

    @model_validator(mode="after")
    def _one_origin(self) -> Domain:
        if (self.demo is None) == (not self.sources):
            raise ValueError(f"of domain {self.name} needs either `demo` or `sources`.")
        return self


class TaskSource(Settings):
    """Where a task's examples come from.

    Args:
        domain: Its domain's name.
        demo: Rows of train, dev and test of the demo's task of that name; None for `task`.
        task: The task, as a task file declares it.
    """

    domain: str = Field(min_length=1, description="the name of a domain")
    demo: dict[Literal["train", "dev", "test"], int] | None = Field(
        default=None, description="numbers of rows of train, dev and test"
    )
    task: TextClassification | None = Field(default=None, description="the keys of a task file")

    @model_validator(mode="after")
    def _one_origin(self) -> TaskSource:
        if (self.demo is None) == (self.task is None):
            raise ValueError("needs either `demo` or `task`.")
        if self.task is not None and (self.task.test is None or self.task.label is None):
            raise ValueError(f"of task {self.task.name} needs a `test` and a `label`: that is what is measured.")
        return self


class Size(Settings):
    """How large everything is: the whole reproduction at the size of a machine.

    Args:
        base: The first base M_0: `minilm` for the demo's, else a folder or a hub id.
        domains: In the order of the upgrades: M_1 is M_0 pre-trained on the first.
        pretraining: How each is trained on.
        tasks: By the names that the experiments' configs have for them; a task's own may be another.
        max_length: Tokens a text is cut to.
        tuning: How tasks are tuned with all labels, by kind of adaptation.
        few_shot: How they are with few, and on each hop of a chain.
        seeds: A run of everything with each.
        precision: `auto`, `bf16` or `fp32`.
    """

    base: str = Field(min_length=1, description="minilm, a folder or a hub id")
    domains: tuple[Domain, ...] = Field(min_length=1, description="a list of domains")
    pretraining: Pretraining = Field(description=f"{_TRAINING}, block, keep_every")
    tasks: dict[str, TaskSource] = Field(min_length=1, description="tasks by name")
    max_length: int = Field(ge=8, description="a whole number of tokens, 8 or more")
    tuning: dict[str, Training] = Field(min_length=1, description=_A_KIND)
    few_shot: dict[str, Training] = Field(min_length=1, description=_A_KIND)
    seeds: tuple[Number, ...] = Field(min_length=2, description="a list of two whole numbers or more")
    precision: Literal["auto", "bf16", "fp32"] = Field(default="auto", description="one of auto, bf16, fp32")


Model = TypeVar("Model", bound=BaseModel)


def load(model: type[Model], path: Path) -> Model:
    """Read a YAML file.

    Args:
        model: What its keys are.
        path: The file.

    Returns:
        What it says.

    Raises:
        DataError: It cannot be read, or a key is unknown, missing or of no use.
    """
    return validate(model, read_yaml(path), str(path))
