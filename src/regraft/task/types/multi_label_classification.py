"""The task type `multi-label-classification`: any number of labels per text or pair of texts."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from regraft.errors import DataError
from regraft.task.labels import format_names, label_name, sort_names
from regraft.task.metric import Metric  # noqa: TC001 (pydantic reads annotations)
from regraft.task.split import Split
from regraft.task.types.class_metrics import MACRO_F1, MICRO_F1, SUBSET_ACCURACY
from regraft.task.types.class_views import class_views, measure_calibrations
from regraft.task.types.label_names import (
    decode_label,
    name_warnings,
    normalise_names,
    require_unicode,
    unknown_label,
    validate_names,
)
from regraft.task.types.label_set_views import label_comparison, label_counts
from regraft.task.types.likelihood import BERNOULLI, Likelihood
from regraft.task.types.probes import label_set_probe
from regraft.task.types.texts import ColumnName, TextTask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regraft.task.metric import Floats
    from regraft.task.source import SourceTable
    from regraft.task.split import Integers, Targets
    from regraft.task.types.view import ModelPredictions, View

MetricName = Literal["micro_f1", "macro_f1", "subset_accuracy"]
NO_LABEL = "(no label)"
"""The description of an empty set of labels."""
_PRESENCE_BY_NAME = {"0": False, "false": False, "1": True, "true": True}
"""Whether an example has a label, by the normalised value of the label's own column."""


def _label_tag(value: Any) -> str:
    return "<columns>" if isinstance(value, list | tuple) else "<column>"


_Label = Annotated[
    Annotated[ColumnName, Tag("<column>")] | Annotated[tuple[ColumnName, ...], Tag("<columns>")],
    Discriminator(_label_tag),
]


class MultiLabelClassification(TextTask):
    """A task of predicting any number of labels per text or pair of texts.

    Args:
        label: The column of lists of labels; or several columns of 0 and 1, each of which is named like its label; or
            None for unlabelled data, which requires `labels` and restricts the methods to those that read no labels.
        labels: The names of all labels, in the order of the outputs, also of labels that no example has; by default,
            the names of the columns of 0 and 1, or the class names of the data set, else the sorted labels of the
            training examples.
        metric: The name of the metric that is reported.
        shots: The number of training examples to keep for each label, among the examples of which it is the rarest
            label; dev is limited to as many. By default, all are kept.
    """

    peft_task_type: ClassVar[str] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline_tag: ClassVar[str] = "text-classification"
    metrics: ClassVar[tuple[Metric, ...]] = (MICRO_F1, MACRO_F1, SUBSET_ACCURACY)
    problem_types: ClassVar[tuple[str | None, ...]] = ("multi_label_classification",)
    likelihood: ClassVar[Likelihood] = BERNOULLI
    guess: ClassVar[str] = "the best single set of labels"

    type: Literal["multi-label-classification"] = "multi-label-classification"
    label: _Label | None = Field(
        description="the column that holds lists of labels, or a list of columns of 0 and 1, one per label, or null "
        "where there are none"
    )
    labels: tuple[str, ...] | None = Field(
        default=None, validate_default=True, description="a list of label names, each of them text"
    )
    metric: MetricName = Field(default="micro_f1", description=f"one of {', '.join(get_args(MetricName))}")
    shots: int | None = Field(default=None, ge=1, description="a whole number of examples per label, 1 or more")

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The column of lists, or the columns of 0 and 1; empty for unlabelled data."""
        if self.label is None:
            return ()
        return (self.label,) if isinstance(self.label, str) else self.label

    def read(self, tables: Mapping[str, SourceTable]) -> tuple[tuple[str, ...], dict[str, Split]]:
        """Order labels as `labels`, else the columns, else the data set's class names, else sorted; see `Task.read`."""
        import numpy as np

        source = tables["train"].source
        names = {split: self._label_lists(table) for split, table in tables.items()}
        if self.labels or self.label is None or isinstance(self.label, str):
            classes = tables["train"].classes.get(self.label) if isinstance(self.label, str) else None
            labels = self.labels or classes or sort_names(name for row in names["train"] for name in row)
        else:
            labels = tuple(_column_label(column) for column in self.label)
        require_unicode(labels, source)
        if len(labels) < 2:
            raise DataError(
                f"{source}: the rows have {format_names(labels)} as only label; a task needs two labels or more. Check "
                f"that {self.label!r} is the column of labels, or list all labels under `labels`."
            )
        splits = {}
        for split, table in tables.items():
            row_numbers = np.array(table.row_numbers, dtype=np.int64)
            targets = self._encode(table, names[split], labels)
            splits[split] = Split(split, table.source, self.texts(table), targets, row_numbers)
        targets = splits["train"].targets
        if self.label is not None and (targets == targets[0]).all():
            raise DataError(
                f"{source}: every row has the same labels, {self.describe(targets[0], labels)}. Check that "
                f"{format_names(self.target_columns)} contains the labels."
            )
        return labels, splits

    def strata(self, targets: Targets, labels: Sequence[str]) -> tuple[Integers, list[str]]:
        """Divide examples by their rarest label, of equally rare ones the first by name; see `Task.strata`."""
        import numpy as np

        by_name = np.argsort(labels)  # so that samples do not depend on the order of the labels
        frequencies = np.where(targets == 1, targets.sum(axis=0), len(targets) + 1)
        rarest = by_name[frequencies[:, by_name].argmin(axis=1)]
        strata = np.where(targets.any(axis=1), rarest, len(labels))
        return strata.astype(np.int64), [*(f"{label} (rarest)" for label in labels), NO_LABEL]

    def sample_counts(self, size: int, stratum_sizes: Sequence[int]) -> list[int]:
        """Draw whole strata that are smaller, because an example of them has other labels too; see `Task`."""
        return [min(size, available) for available in stratum_sizes]

    def initial_outputs(self, targets: Targets) -> Floats:
        """Return the log-odds of the labels' frequencies; see `Task.initial_outputs`.

        From outputs of 0, the first steps would only learn that most labels are rare, and could destroy a base's
        features before anything else is learnt. Source: Lin et al., 2017 (arXiv:1708.02002), section 3.3.
        """
        import numpy as np

        counts = targets.sum(axis=0)
        return np.asarray(np.log((counts + 0.5) / (len(targets) - counts + 0.5)))

    def chance_prediction(self, targets: Targets, labels: Sequence[str]) -> list[int]:
        """Return the set of labels with the best score on the training examples; see `Task.chance_prediction`.

        By micro F1, the best set of k labels is that of the k most frequent ones, so one set of each size is compared;
        by macro F1, every label that occurs adds to the score; by subset accuracy, it is the most frequent set.
        """
        import numpy as np

        if self.metric == MACRO_F1.name:
            return [int(occurs) for occurs in targets.max(axis=0)]
        if self.metric == SUBSET_ACCURACY.name:
            sets, counts = np.unique(targets, axis=0, return_counts=True)
            return [int(is_present) for is_present in sets[counts.argmax()]]
        frequencies = targets.sum(axis=0)
        order = np.argsort(-frequencies, kind="stable")
        num_predicted = len(targets) * np.arange(1, len(labels) + 1)
        f1 = 2 * np.cumsum(frequencies[order]) / (num_predicted + frequencies.sum())
        prediction = np.zeros(len(labels), dtype=np.int64)
        prediction[order[: int(f1.argmax()) + 1]] = 1
        chance: list[int] = prediction.tolist()
        return chance

    def relabel(self, targets: Targets, output_by_label: Sequence[int]) -> Targets:
        """Permute the columns of the labels; see `Task.relabel`."""
        import numpy as np

        relabelled = np.zeros_like(targets)
        relabelled[:, list(output_by_label)] = targets
        return relabelled

    def describe(self, target: Any, labels: Sequence[str]) -> str:
        """Return the names of the labels, sorted; see `Task.describe`."""
        return ", ".join(sort_names(itertools.compress(labels, target))) or NO_LABEL

    def as_targets(self, predictions: Sequence[Any]) -> Targets:
        """Return the predicted sets, examples × labels; see `Task.as_targets`."""
        import numpy as np

        return np.array(predictions, dtype=np.int64)

    def right(self, targets: Targets, predictions: Sequence[Any]) -> list[bool]:
        """Compare whole sets of labels; see `Task.right`."""
        return [target == list(prediction) for target, prediction in zip(targets.tolist(), predictions, strict=True)]

    def linear_probe(self) -> Any:
        """Return a logistic regression per label; see `Task.linear_probe`."""
        return label_set_probe()

    def label_warnings(self, labels: Sequence[str]) -> list[str]:
        """Describe labels that look alike or like missing values; see `Task.label_warnings`."""
        return name_warnings(labels)

    def target_weakness(self, targets: Targets) -> str | None:
        """Report examples that all have the same labels; see `Task.target_weakness`."""
        is_varied = (targets != targets[0]).any()
        return None if is_varied else "examples that all have the same labels, which a constant prediction gets right"

    def comparison_views(
        self, targets: Targets, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return F1 and flips by label, and the calibration of whole sets; see `Task.comparison_views`."""
        old_sets, new_sets = (self.as_targets(model.predictions) for model in (old, new))
        comparison = label_comparison(targets, old_sets, new_sets, labels)
        return (comparison, *class_views((), measure_calibrations(old, new)))

    def example_views(self, split: Split, labels: Sequence[str]) -> tuple[View, ...]:
        """Return the number of examples by label, and by number of labels; see `Task.example_views`."""
        return label_counts(split, labels)

    def _label_lists(self, table: SourceTable) -> list[list[str]]:
        """Return the names of the labels of each row."""
        if self.label is None:
            return [[] for _ in table.row_numbers]
        if not isinstance(self.label, str):
            presence = zip(*(_read_presence(table, column) for column in self.label), strict=True)
            column_labels = [_column_label(column) for column in self.label]
            return [list(itertools.compress(column_labels, row)) for row in presence]
        classes = table.classes.get(self.label)
        lists = []
        for row, value in zip(table.row_numbers, table.columns[self.label], strict=True):
            values = _parse_list(value)
            if values is None:
                raise DataError(
                    f"{table.source}, row {row}: expected a list of labels in column {self.label!r}, found "
                    f'{value!r:.80}. Write a list such as ["a", "b"], or [] if the row has no label; or give each '
                    "label a column of 0 and 1, and list the columns under `label`."
                )
            try:
                names = [decode_label(item, classes) for item in values]
            except TypeError as error:
                raise DataError(f"{table.source}, row {row}: column {self.label!r}: {error}.") from None
            if None in names:
                raise DataError(
                    f"{table.source}, row {row}: a label in column {self.label!r} is missing (found {value!r:.80}). "
                    "Remove it from the list. If a test split hides its labels, use another split."
                )
            lists.append([name for name in names if name is not None])
        return lists

    def _encode(self, table: SourceTable, names: Sequence[Sequence[str]], labels: Sequence[str]) -> Targets:
        """Encode sets of labels as 0 and 1, examples × labels; refuse rows that have an unknown label."""
        import numpy as np

        indices = {label: index for index, label in enumerate(labels)}
        targets = np.zeros((len(names), len(labels)), dtype=np.int64)
        for example, (row, row_names) in enumerate(zip(table.row_numbers, names, strict=True)):
            unknown = [name for name in row_names if name not in indices]
            if unknown:
                problem = unknown_label(unknown[0], labels, are_listed=self.labels is not None)
                raise DataError(f"{table.source}, row {row}: {problem}")
            targets[example, [indices[name] for name in row_names]] = 1
        return targets

    @field_validator("label")
    @classmethod
    def _validate_columns(cls, label: Any) -> Any:
        """Refuse a single column of 0 and 1, and columns of the same label."""
        if isinstance(label, tuple):
            validate_names(tuple(_column_label(column) for column in label), is_required=True)
        return label

    @field_validator("labels", mode="before")
    @classmethod
    def _normalise_names(cls, labels: Any) -> Any:
        """Normalise the names in the same way as labels in the data."""
        return normalise_names(labels)

    @field_validator("labels")
    @classmethod
    def _validate_labels(cls, labels: tuple[str, ...] | None, validation: ValidationInfo) -> tuple[str, ...] | None:
        """Refuse repeated labels, a single label, missing labels of unlabelled data, and names without some column."""
        label = validation.data.get("label", ())
        labels = validate_names(labels, is_required=label is None)
        columns = [_column_label(column) for column in label] if isinstance(label, tuple) else []
        unlisted = [name for name in columns if name not in labels] if labels else []
        if unlisted:
            raise ValueError(f"lacks {format_names(unlisted)}, columns under `label`. List them too.")
        return labels


def _column_label(column: str) -> str:
    """Return the label that a column of 0 and 1 is for."""
    return label_name(column) or column


def _read_presence(table: SourceTable, column: str) -> list[bool]:
    """Return for each row whether it has the label of a column of 0 and 1."""
    classes = table.classes.get(column)
    presence = []
    for row, value in zip(table.row_numbers, table.columns[column], strict=True):
        try:
            name = decode_label(value, classes)
        except TypeError:
            name = None
        if name is None or name.lower() not in _PRESENCE_BY_NAME:
            raise DataError(
                f"{table.source}, row {row}: expected 0 or 1 in column {column!r}, found {value!r:.80}. Write 1 if the "
                "row has the label, else 0."
            )
        presence.append(_PRESENCE_BY_NAME[name.lower()])
    return presence


def _parse_list(value: object) -> list[Any] | None:
    """Return a list, which files of text store as JSON; None if the value is no list."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return list(value) if isinstance(value, list | tuple) else None


TASK = MultiLabelClassification
