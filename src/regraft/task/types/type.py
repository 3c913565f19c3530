"""The base class of all task types.

A task type is a subclass of `Task`: in a module of this package, as `TASK`, or in a different distribution, under the
entry point group `regraft.task_types`. It defines the input and target columns, the tokenisation of inputs, the
likelihood of a model's outputs, the metrics, and the views of predictions.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from regraft.errors import DataError, did_you_mean
from regraft.task.data_file import detect_task, is_data
from regraft.task.labels import format_names
from regraft.task.metric import Metric  # noqa: TC001 (pydantic reads annotations)
from regraft.task.types.generative import GenerativeTask
from regraft.task.types.likelihood import Likelihood  # noqa: TC001 (pydantic reads annotations)
from regraft.task.types.registry import discover_types
from regraft.task.yaml_file import read_yaml, validate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from regraft.task.metric import Floats
    from regraft.task.source import SourceTable
    from regraft.task.split import Integers, Split, Targets
    from regraft.task.types.examples import Examples

ENTRY_POINT_GROUP = "regraft.task_types"
"""The group under which other distributions register their task types."""
DEFAULT_TYPE = "text-classification"
"""The type of a task file without the key `type`, which regraft 0.1 did not have."""


class Task(GenerativeTask, ABC):
    """A task as its task file declares it; each task type is a subclass, and adds the keys that only it has."""

    peft_task_type: ClassVar[str]
    """PEFT's `task_type` of adapters for this type."""
    auto_class: ClassVar[str]
    """The name of the transformers class that loads a model with a head for this type."""
    metrics: ClassVar[tuple[Metric, ...]]
    """The metrics to choose from; the first is the default."""
    agreement_metric: ClassVar[Metric | None] = None
    """The one of `metrics` that measures the agreement of two models; None for the first."""
    likelihood: ClassVar[Likelihood]
    """The distribution over targets that a model's outputs parametrise; see `likelihood_for`."""
    guess: ClassVar[str]
    """The prediction of `chance_prediction` in words, such as `the most frequent class`."""
    problem_types: ClassVar[tuple[str | None, ...]] = (None,)
    """The values of `problem_type` that a model's config may have; regraft writes the first."""
    head_policies: ClassVar[tuple[str, ...]] = ("copy", "resize", "fresh")
    """The ways to carry an old head over to the new base."""
    pipeline_tag: ClassVar[str]
    """The Hugging Face Hub's pipeline tag for models of this type."""
    digest_keys: ClassVar[tuple[str, ...]] = ()
    """The keys of its own that change targets or which predictions are right, such as a tolerance."""

    @classmethod
    def load(cls, path: str | Path) -> Task:
        """Read a task file, or detect the task of data without one.

        Args:
            path: A YAML file, whose relative paths start from its folder; or data, see `detect_task`.

        Returns:
            The task, an instance of the type that the file names, with absolute paths.

        Raises:
            DataError: The file cannot be read, or a key is unknown, missing or invalid; the message names the key.
        """
        path = Path(path)
        if is_data(path):
            return detect_task(path, task_types(), cls.from_mapping)  # type: ignore[no-any-return]
        values = {"name": path.stem, **read_yaml(path)}
        return cls.from_mapping(values, str(path)).resolve_paths(path.absolute().parent)

    @staticmethod
    def from_mapping(values: Mapping[str, Any], origin: str) -> Task:
        """Build a task of the type that the key `type` names.

        Args:
            values: The keys and values of a task file.
            origin: The source of the values as messages name it, such as the path of the file.

        Raises:
            DataError: A key is unknown, missing or invalid; the message names the key.
        """
        types = task_types()
        name = values.get("type", DEFAULT_TYPE)
        if not isinstance(name, str) or name not in types:
            suggestion = did_you_mean(name, list(types)) if isinstance(name, str) else ""
            names = format_names(list(types))
            raise DataError(f"{origin}: there is no task type {name!r:.100}.{suggestion} The types are: {names}.")
        return validate(types[name], values, origin)

    def likelihood_for(self, targets: Targets) -> Likelihood:
        """Return the likelihood of this task's models: `likelihood`, unless a type derives it from the targets.

        Args:
            targets: The training targets, which may determine the scale of the likelihood.
        """
        return self.likelihood

    def target_scaling(self, targets: Targets) -> tuple[float, float] | None:
        """Return the offset and the scale by which targets are standardised during training.

        Args:
            targets: The training targets, which determine the scaling.

        Returns:
            The value in target units that an output of 0 stands for, and the size of one output unit in target units;
            None if models are trained in target units.
        """
        return None

    def initial_outputs(self, targets: Targets) -> Floats | None:
        """Return the outputs that a fresh head begins with for every input, as the biases of its last layer.

        Args:
            targets: The training targets.

        Returns:
            One value per output; None to begin near 0. A head without biases begins near 0.
        """
        return None

    def sample_counts(self, size: int, stratum_sizes: Sequence[int]) -> list[int]:
        """Return the number of examples to draw from each stratum.

        Args:
            size: The number of examples per stratum, unless a type defines it otherwise.
            stratum_sizes: The number of available examples of each stratum.
        """
        return [size] * len(stratum_sizes)

    @classmethod
    def type_name(cls) -> str:
        """Return the name of this type, the value of `type` in task files."""
        return str(cls.model_fields["type"].default)

    @classmethod
    def head_settings(cls, labels: Sequence[str]) -> dict[str, Any]:
        """Return the keys of a model's config that describe its head: number and names of outputs, and problem type.

        Args:
            labels: The label names; the head has one output per label, unless a type defines it otherwise.
        """
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "problem_type": cls.problem_types[0],  # even if it is None, because the base's config may have a value
        }

    @property
    def scoring(self) -> Metric:
        """The reported metric. `metric` is its name, which other task types may use for different metrics."""
        return next(metric for metric in self.metrics if metric.name == self.metric)

    def bind_metric(self, metric: Metric, labels: Sequence[str]) -> Metric:
        """Adapt a metric of this type to targets in terms of labels, whose names a metric may depend on.

        Args:
            metric: One of `metrics`.
            labels: The label names, in the order of the outputs.
        """
        return metric

    @property
    @abstractmethod
    def input_columns(self) -> tuple[str, ...]:
        """The columns that a model reads."""

    @property
    @abstractmethod
    def target_columns(self) -> tuple[str, ...]:
        """The columns that a model is to predict; empty if the examples have no labels."""

    @abstractmethod
    def read(self, tables: Mapping[str, SourceTable]) -> tuple[tuple[str, ...], dict[str, Split]]:
        """Check the rows of the data, and turn them into inputs and targets.

        Args:
            tables: The input and target columns of each source, by split (`train`, `dev`, `test`).

        Returns:
            The label names in the order of the outputs, and the splits by name. Without target columns, all targets
            are placeholders.

        Raises:
            DataError: A row or the labels are invalid; the message names the source, and the row number if it is a row.
        """

    def is_labelled(self, splits: Mapping[str, Split]) -> bool:
        """Return whether the examples of some splits, as `read` returns them by name, have labels."""
        return bool(self.target_columns)

    @abstractmethod
    def encode(self, split: Split, tokenizer: PreTrainedTokenizerBase, pad: int, max_length: int) -> Examples:
        """Tokenise examples, and choose the tokens at which a model makes a prediction.

        Args:
            split: The examples to tokenise.
            tokenizer: The tokenizer of the base.
            pad: The token id that batches are padded with.
            max_length: The number of tokens to truncate inputs to.

        Returns:
            The tokenised examples, in the order of the split.
        """

    @abstractmethod
    def count_words(self, inputs: Any) -> int:
        """Count the words in the inputs of one example."""

    @abstractmethod
    def strata(self, targets: Targets, labels: Sequence[str]) -> tuple[Integers, list[str]]:
        """Divide examples into strata, from each of which few-shot samples and a held-out dev split are drawn.

        Args:
            targets: One target per example.
            labels: The label names, in the order of the outputs.

        Returns:
            The index of each example's stratum, and the names of all strata.
        """

    @abstractmethod
    def chance_prediction(self, targets: Targets, labels: Sequence[str]) -> Any:
        """Return the best prediction that is the same for every input; its score is the chance score.

        Args:
            targets: The training targets.
            labels: The label names, in the order of the outputs.
        """

    def constant_predictions(self, prediction: Any, inputs: Sequence[Any]) -> list[Any]:
        """Repeat a prediction for each example, in the form of a target.

        Args:
            prediction: The prediction, as `chance_prediction` returns it.
            inputs: The inputs of the examples, which may determine the sizes of targets.
        """
        return [prediction] * len(inputs)

    @abstractmethod
    def relabel(self, targets: Targets, output_by_label: Sequence[int]) -> Targets:
        """Replace label indices in targets by the indices of a head's outputs.

        Args:
            targets: One target per example, in terms of label indices.
            output_by_label: The index of the output for each label, in the order of the labels.
        """

    @abstractmethod
    def describe(self, target: Any, labels: Sequence[str]) -> str:
        """Format a target or a prediction for people to read.

        Args:
            target: The target or prediction of one example.
            labels: The label names, in the order of the outputs.
        """

    @abstractmethod
    def as_targets(self, predictions: Sequence[Any]) -> Targets:
        """Convert a model's predictions to targets, as pseudo-labels.

        Args:
            predictions: One prediction per example.
        """

    @abstractmethod
    def right(self, targets: Targets, predictions: Sequence[Any]) -> Sequence[bool | None]:
        """Return whether each prediction is right; None where that cannot be told.

        Args:
            targets: One target per example.
            predictions: One prediction per example.
        """

    @abstractmethod
    def linear_probe(self) -> Any:
        """Return an unfitted scikit-learn estimator that predicts targets linearly from a base's features."""

    def predictions_of_examples(
        self, row_predictions: Sequence[Any], split: Split, examples: Examples, labels: Sequence[str]
    ) -> list[Any]:
        """Convert the predictions for rows to one prediction per example, in the form of a target.

        Args:
            row_predictions: One prediction per row, as the likelihood returns it.
            split: The examples.
            examples: The same examples, as `encode` returned them.
            labels: The label names, in the order of the outputs.
        """
        return list(row_predictions)

    def confidence_of_examples(self, row_confidence: Sequence[float], examples: Examples) -> list[float]:
        """Convert the probabilities of the predictions for rows to one probability per example.

        Args:
            row_confidence: One probability per row.
            examples: The examples, as `encode` returned them.
        """
        return list(row_confidence)

    def label_warnings(self, labels: Sequence[str]) -> list[str]:
        """Return one message per problem of the label names, such as two names that look alike."""
        return []

    def as_text(self, inputs: Any) -> str:
        """Format the inputs of one example for people to read."""
        return str(inputs)

    def as_inputs(self, text: str) -> Any:
        """Convert a plain, unlabelled text to the inputs of an example.

        Args:
            text: A text without a label, such as a line of a corpus.

        Raises:
            DataError: A text alone is not an input of this type.
        """
        raise DataError(f"{text!r:.60}: a {self.type} task does not read plain text. Learn from its own examples.")

    def target_weakness(self, targets: Targets) -> str | None:
        """Explain why scores on these targets cannot tell models apart, however many examples there are.

        Args:
            targets: One target per example.

        Returns:
            A noun phrase such as `examples of a single class, on which …`; None if the targets are varied enough.
        """
        return None


@functools.cache
def task_types() -> dict[str, type[Task]]:
    """Return all task types by name, also of other distributions; raise DataError for an invalid entry point."""
    return discover_types(Task, ENTRY_POINT_GROUP)
