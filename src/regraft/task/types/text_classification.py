"""The task type `text-classification`: one class per text or pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator

from regraft.errors import DataError
from regraft.task.labels import sort_names
from regraft.task.metric import Metric  # noqa: TC001 (pydantic reads annotations)
from regraft.task.split import Split
from regraft.task.types.class_metrics import ACCURACY, MACRO_F1, MCC
from regraft.task.types.class_views import class_views, compare_classes, measure_calibrations
from regraft.task.types.label_names import (
    are_fractions,
    decode_label,
    name_warnings,
    normalise_names,
    require_unicode,
    unknown_label,
    validate_names,
)
from regraft.task.types.likelihood import CATEGORICAL, Likelihood
from regraft.task.types.probes import class_probe
from regraft.task.types.texts import ColumnName, TextTask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regraft.task.source import SourceTable
    from regraft.task.split import Targets
    from regraft.task.types.view import ModelPredictions, View

MetricName = Literal["accuracy", "macro_f1", "mcc"]


class TextClassification(TextTask):
    """A task of predicting one class per text or pair of texts.

    Args:
        label: The column of labels, or None for unlabelled data, which requires `labels` and restricts the methods to
            those that read no labels.
        labels: The names of all classes, in the order of the outputs; by default, the class names of the data set, else
            the sorted labels of the training examples.
        metric: The name of the metric that is reported.
    """

    peft_task_type: ClassVar[str] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline_tag: ClassVar[str] = "text-classification"
    metrics: ClassVar[tuple[Metric, ...]] = (ACCURACY, MACRO_F1, MCC)
    problem_types: ClassVar[tuple[str | None, ...]] = (None, "single_label_classification")
    likelihood: ClassVar[Likelihood] = CATEGORICAL
    guess: ClassVar[str] = "the most frequent class"

    type: Literal["text-classification"] = "text-classification"
    label: ColumnName | None = Field(description="the column that holds the label, or null where there are none")
    labels: tuple[str, ...] | None = Field(
        default=None, validate_default=True, description="a list of label names, each of them text"
    )
    metric: MetricName = Field(default="accuracy", description=f"one of {', '.join(get_args(MetricName))}")

    @classmethod
    def keys_for_columns(cls, columns: Sequence[str]) -> dict[str, str] | None:
        """Read columns called `text` and `label`; see `Task.keys_for_columns`."""
        return {"text": "text", "label": "label"} if {"text", "label"} <= {*columns} else None

    def with_data_defaults(self, table: SourceTable) -> Self:
        """Refuse labels that are fractions or lists, which are of other types; see `Task.with_data_defaults`."""
        assert self.label is not None
        labels = table.columns[self.label]
        if any(isinstance(label, list) for label in labels):
            raise DataError(
                f"{table.source}: column {self.label!r} holds lists of labels. Write a task file of type "
                "multi-label-classification."
            )
        if are_fractions(labels):
            raise DataError(
                f"{table.source}: column {self.label!r} holds numbers with decimals. Write a task file of type "
                "text-regression, with a `tolerance`: the largest error of a right prediction. If they are names of "
                "classes, write one of type text-classification."
            )
        return self

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The column of labels; empty for unlabelled data."""
        return () if self.label is None else (self.label,)

    def read(self, tables: Mapping[str, SourceTable]) -> tuple[tuple[str, ...], dict[str, Split]]:
        """Index classes in the order of `labels`, else of the data set's class names, else sorted; see `Task.read`."""
        names = {split: self._label_names(table) for split, table in tables.items()}
        classes = tables["train"].classes.get(self.label or "")
        labels = self.labels or classes or sort_names(names["train"])
        require_unicode(labels, tables["train"].source)
        splits = {split: self._split(split, table, names[split], labels) for split, table in tables.items()}
        if self.label is not None and len(set(names["train"])) < 2:
            raise DataError(
                f"{tables['train'].source}: every row has the label {names['train'][0]!r}; a task needs two labels or "
                f"more. Check that {self.label!r} is the column of labels."
            )
        return labels, splits

    def strata(self, targets: Targets, labels: Sequence[str]) -> tuple[Targets, list[str]]:
        """Return the classes; see `Task.strata`."""
        return targets, list(labels)

    def chance_prediction(self, targets: Targets, labels: Sequence[str]) -> int:
        """Return the most frequent class, the first of equally frequent ones; see `Task.chance_prediction`."""
        import numpy as np

        return int(np.bincount(targets, minlength=len(labels)).argmax())

    def relabel(self, targets: Targets, output_by_label: Sequence[int]) -> Targets:
        """Replace class indices by output indices; see `Task.relabel`."""
        import numpy as np

        return np.array(output_by_label, dtype=np.int64)[targets]

    def describe(self, target: Any, labels: Sequence[str]) -> str:
        """Return the name of a class; see `Task.describe`."""
        return str(labels[target])

    def comparison_views(
        self, targets: Targets, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return recall and flips by class, and the calibration; see `Task.comparison_views`."""
        classes = compare_classes(targets.tolist(), old.right, new.right, labels)
        return class_views(classes, measure_calibrations(old, new))

    def label_warnings(self, labels: Sequence[str]) -> list[str]:
        """Describe labels that look alike or like missing values; see `Task.label_warnings`."""
        return name_warnings(labels)

    def as_targets(self, predictions: Sequence[Any]) -> Targets:
        """Return the predicted classes; see `Task.as_targets`."""
        import numpy as np

        return np.array(predictions, dtype=np.int64)

    def right(self, targets: Targets, predictions: Sequence[Any]) -> list[bool]:
        """Compare predicted and true classes; see `Task.right`."""
        return [bool(target == prediction) for target, prediction in zip(targets.tolist(), predictions, strict=True)]

    def linear_probe(self) -> Any:
        """Return a logistic regression; see `Task.linear_probe`."""
        return class_probe()

    def target_weakness(self, targets: Targets) -> str | None:
        """Report examples that are all of one class; see `Task.target_weakness`."""
        if len(set(targets.tolist())) > 1:
            return None
        return "examples of a single class, on which always predicting that class is perfect (and mcc is always 0)"

    def _label_names(self, table: SourceTable) -> list[str]:
        """Return the label name of each row; for unlabelled data, the first of `labels` as a placeholder."""
        if self.label is None:
            placeholder = self.labels[0] if self.labels else ""
            return [placeholder] * len(table.row_numbers)
        classes = table.classes.get(self.label)
        names: list[str] = []
        for row, value in zip(table.row_numbers, table.columns[self.label], strict=True):
            try:
                label = decode_label(value, classes)
            except TypeError as error:
                raise DataError(
                    f"{table.source}, row {row}: column {self.label!r}: {error}. Write it as text or as a number."
                ) from None
            if label is None:
                raise DataError(
                    f"{table.source}, row {row}: no label in column {self.label!r} (found {value!r}). Label the row "
                    "or remove it. If a test split hides its labels, use another split."
                )
            names.append(label)
        return names

    def _split(self, split: str, table: SourceTable, names: Sequence[str], labels: Sequence[str]) -> Split:
        """Encode the labels of a split as indices; refuse rows whose label is unknown."""
        import numpy as np

        indices = {name: index for index, name in enumerate(labels)}
        for row, name in zip(table.row_numbers, names, strict=True):
            if name not in indices:
                problem = unknown_label(name, labels, are_listed=self.labels is not None)
                raise DataError(f"{table.source}, row {row}: {problem}")
        targets = np.array([indices[name] for name in names], dtype=np.int64)
        return Split(split, table.source, self.texts(table), targets, np.array(table.row_numbers, dtype=np.int64))

    @field_validator("labels", mode="before")
    @classmethod
    def _normalise_names(cls, labels: Any) -> Any:
        """Normalise the names in the same way as labels in the data."""
        return normalise_names(labels)

    @field_validator("labels")
    @classmethod
    def _validate_labels(cls, labels: tuple[str, ...] | None, validation: ValidationInfo) -> tuple[str, ...] | None:
        """Refuse repeated labels, a single label, and missing labels of unlabelled data."""
        is_unlabelled = "label" in validation.data and validation.data["label"] is None
        return validate_names(labels, is_required=is_unlabelled)


TASK = TextClassification
