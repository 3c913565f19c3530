"""What a task is, whatever its type: the keys of every task file, and what a type of task says of its own."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from regraft.errors import DataError
from regraft.task.labels import listing
from regraft.task.metric import Metric
from regraft.task.source import SOURCE, Source, resolved
from regraft.task.types.likelihood import Likelihood
from regraft.task.types.registry import discovered
from regraft.task.yaml_file import did_you_mean, read_yaml, validate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from regraft.task.source import Table
    from regraft.task.split import Split, Targets
    from regraft.task.types.examples import Examples
    from regraft.task.types.view import ModelPredictions, View

ENTRY_POINTS = "regraft.task_types"  # the group by which other distributions add task types
DEFAULT_TYPE = "text-classification"  # task files of 0.1 name none
LONGEST = 10_000_000  # tokens: more than any model takes, and few enough for a tokenizer to count


class Task(BaseModel, ABC):
    """A task, as a task file declares it; its type is a subclass.

    Args:
        name: What the task is called; the stem of the task file if that names none.
        train: The examples to tune on.
        dev: The examples to choose by; a tenth of train is held out if there is none.
        test: The examples to report on.
        metric: What is reported.
        quoting: Whether fields of CSV and TSV files are in double quotes where they hold delimiters (`quoted`) or
            quotes are characters like others (`plain`). If not given, CSV is quoted, and of TSV its quotes decide.
        shots: Examples a class to keep of train and of dev; all of them if not given.
        max_length: How many tokens an input is cut to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    peft_type: ClassVar[str]
    """PEFT's name of the task type."""
    auto_class: ClassVar[str]
    """The class of transformers that loads a model with a head for it."""
    metrics: ClassVar[tuple[Metric, ...]]
    """What can be reported; the first is the default, and what agreement of two models is measured by."""
    likelihood: ClassVar[Likelihood]
    guess: ClassVar[str]
    """What `chance` predicts, in words, as `the most frequent class`."""
    problem_types: ClassVar[tuple[str | None, ...]] = (None,)
    """What the config of a model for it can have as `problem_type`; the first is written."""
    head_policies: ClassVar[tuple[str, ...]] = ("copy", "resize", "fresh")  # what can become of an old head
    pipeline_tag: ClassVar[str] = "text-classification"
    """The hub's name of what models for it do."""

    type: str
    name: str = Field(min_length=1, description="a name for the task")
    train: Source = Field(description=SOURCE)
    dev: Source | None = Field(default=None, description=SOURCE)
    test: Source | None = Field(default=None, description=SOURCE)
    metric: str
    quoting: Literal["quoted", "plain"] | None = Field(default=None, description="quoted or plain, or leave it out")
    shots: int | None = Field(default=None, ge=1, description="a whole number of examples a class, 1 or more")
    max_length: int = Field(default=128, ge=8, le=LONGEST, description="a whole number of tokens, 8 or more")

    @classmethod
    def load(cls, path: str | Path) -> Task:
        """Read a task file.

        Args:
            path: A YAML file; relative paths in it start from its folder.

        Returns:
            The task, of the type that the file names, with absolute paths.

        Raises:
            DataError: The file cannot be read, or a key is unknown, missing or of no use; the message names it.
        """
        path = Path(path)
        task = cls.from_mapping({"name": path.stem, **read_yaml(path)}, str(path))
        return task.model_copy(
            update={key: resolved(getattr(task, key), path.absolute().parent) for key in ("train", "dev", "test")}
        )

    @staticmethod
    def from_mapping(values: Mapping[str, Any], where: str) -> Task:
        """Build a task of the type that its keys name.

        Args:
            values: The keys of a task file.
            where: How messages name their origin.

        Raises:
            DataError: A key is unknown, missing or of no use; the message names it.
        """
        types, name = task_types(), values.get("type", DEFAULT_TYPE)
        if not isinstance(name, str) or name not in types:
            near = did_you_mean(name, list(types)) if isinstance(name, str) else ""
            raise DataError(
                f"{where}: there is no task type {name!r:.100}.{near} The types are: {listing(list(types))}."
            )
        return validate(types[name], values, where)

    def likelihood_for(self, targets: Targets) -> Likelihood:
        """Return what outputs are a distribution over.

        Args:
            targets: Of train, which its spread may follow from.
        """
        return self.likelihood

    def target_scaling(self, targets: Targets) -> tuple[float, float] | None:
        """Return where outputs are 0, and how large 1 is, while a model is trained; None for those of the targets.

        Args:
            targets: Of train.
        """
        return None

    def counts(self, size: int, strata: Sequence[int]) -> list[int]:
        """Return how many examples of each stratum are drawn.

        Args:
            size: How many are asked for, of each stratum unless a type says otherwise.
            strata: How many each of them has.
        """
        return [size] * len(strata)

    @classmethod
    def type_name(cls) -> str:
        """Return the name that a task file has as `type`."""
        return str(cls.model_fields["type"].default)

    @classmethod
    def head_settings(cls, labels: Sequence[str]) -> dict[str, Any]:
        """Return what the config of a model says of its head: how many outputs, their names, and the kind of problem.

        Args:
            labels: The names of the labels, an output each unless a type says otherwise.
        """
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": cls.problem_types[0],  # a base's own may be another one
        }

    def with_shots(self, shots: int | None) -> Self:
        """Return this task with a few training examples a class.

        Args:
            shots: Examples a class; None leaves the task as it is.
        """
        return self if shots is None else self.model_copy(update={"shots": shots})

    @property
    def scoring(self) -> Metric:
        """The metric that is reported; other types of task may have another one of that name."""
        return next(metric for metric in self.metrics if metric.name == self.metric)

    @property
    @abstractmethod
    def input_columns(self) -> tuple[str, ...]:
        """The columns that a model reads."""

    @property
    @abstractmethod
    def target_columns(self) -> tuple[str, ...]:
        """The columns of what it is to predict; none where the examples are not labelled."""

    @abstractmethod
    def read(self, tables: Mapping[str, Table]) -> tuple[tuple[str, ...], dict[str, Split]]:
        """Check rows, and turn them into inputs and targets.

        Args:
            tables: By split, what was read.

        Returns:
            The label names in the order of the outputs, and the splits. Without target columns every target is a
            placeholder.

        Raises:
            DataError: A row cannot be used; the message names it and its file.
        """

    @abstractmethod
    def encode(self, split: Split, tokenizer: Any, pad: int, max_length: int) -> Examples:
        """Tokenise examples, and decide at which of their tokens a model speaks.

        Args:
            split: The examples.
            tokenizer: A tokenizer of transformers.
            pad: The id of the token that fills up a batch.
            max_length: How many tokens an input is cut to.

        Returns:
            The examples, in the order of the split.
        """

    @abstractmethod
    def count_words(self, inputs: Any) -> int:
        """Count the words of an example's inputs.

        Args:
            inputs: Of one example.
        """

    @abstractmethod
    def strata(self, targets: Targets, labels: Sequence[str]) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[str]]:
        """Divide examples into the strata that few-shot samples and a held-out dev are drawn from alike.

        Args:
            targets: Theirs.
            labels: The label names.

        Returns:
            The stratum of each example, and the names of all strata.
        """

    @abstractmethod
    def chance_prediction(self, targets: Targets, labels: Sequence[str]) -> Any:
        """Return the best prediction that looks at no input.

        Args:
            targets: Of train.
            labels: The label names.

        Returns:
            One prediction, for every example.
        """

    @abstractmethod
    def relabel(self, targets: Targets, order: Sequence[int]) -> Targets:
        """Number targets by the outputs of a head.

        Args:
            targets: The targets.
            order: For each label, the number of its output.
        """

    @abstractmethod
    def describe(self, target: Any, labels: Sequence[str]) -> str:
        """Write a target or prediction as people read it.

        Args:
            target: One of them.
            labels: The label names.
        """

    @abstractmethod
    def as_targets(self, predictions: Sequence[Any]) -> Targets:
        """Return predictions as the targets that a student of them learns.

        Args:
            predictions: A prediction an example.
        """

    @abstractmethod
    def right(self, targets: Targets, predictions: Sequence[Any]) -> list[bool]:
        """Say which predictions are right.

        Args:
            targets: A target an example.
            predictions: A prediction an example.
        """

    @abstractmethod
    def linear_probe(self) -> Any:
        """Return a linear model of features, as scikit-learn has them, that a base is probed with."""

    def comparison_views(
        self, targets: Targets, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return what is to be shown of an old and a new model's predictions, beside their scores and flips.

        Args:
            targets: A target an example.
            old: What the old model predicts.
            new: What the new one does.
            labels: The label names.

        Returns:
            Tables and charts; none where there is nothing more to show.
        """
        return ()

    def label_warnings(self, labels: Sequence[str]) -> list[str]:
        """Find what makes the labels of a task doubtful.

        Args:
            labels: Their names.

        Returns:
            A sentence for each.
        """
        return []

    def as_text(self, inputs: Any) -> str:
        """Write an example's inputs as people read them.

        Args:
            inputs: Of one example.
        """
        return str(inputs)

    def as_inputs(self, text: str) -> Any:
        """Return a text without a label as an example's inputs.

        Args:
            text: Some text.

        Raises:
            DataError: The inputs of this type of task are no text.
        """
        raise DataError(f"{text!r:.60}: a {self.type} task reads no plain text. Learn from its own examples.")

    def target_weakness(self, targets: Targets) -> str | None:
        """Say why scores on some targets settle nothing, however many there are.

        Args:
            targets: A target an example.

        Returns:
            What they are, as `examples of a single class, on which …`; None where they are mixed.
        """
        return None


@functools.cache
def task_types() -> dict[str, type[Task]]:
    """Find every task type: the modules beside this one that define `TASK`, and the entry points of distributions.

    Returns:
        The classes by the name that a task file has as `type`.

    Raises:
        DataError: An entry point cannot be loaded, is no task type, or has a name that is taken.
    """
    return discovered(Task, __package__, ENTRY_POINTS)
