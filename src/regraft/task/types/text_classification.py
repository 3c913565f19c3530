"""`text-classification`: one class a text, or a pair of texts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from regraft.errors import DataError
from regraft.task.file import is_unicode
from regraft.task.labels import folded, label_name, label_order, listing, lookalikes, reads_as_missing
from regraft.task.metric import Metric  # noqa: TC001 (pydantic reads it)
from regraft.task.split import Split
from regraft.task.types.class_metrics import ACCURACY, MACRO_F1, MCC
from regraft.task.types.class_views import calibration, class_views, per_class
from regraft.task.types.likelihood import CATEGORICAL, Likelihood
from regraft.task.types.texts import Column, TextTask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regraft.task.source import Table
    from regraft.task.split import Targets
    from regraft.task.types.view import ModelPredictions, View


class TextClassification(TextTask):
    """A task of one class a text.

    Args:
        label: The column that holds the label; None where there is none: then `labels` are needed, and only methods
            that read no label can be used.
        labels: All label names in the order of the classes; those of train if not given.
        metric: What is reported.
    """

    peft_type: ClassVar[str] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metrics: ClassVar[tuple[Metric, ...]] = (ACCURACY, MACRO_F1, MCC)
    problem_types: ClassVar[tuple[str | None, ...]] = (None, "single_label_classification")
    likelihood: ClassVar[Likelihood] = CATEGORICAL
    guess: ClassVar[str] = "the most frequent class"

    type: Literal["text-classification"] = "text-classification"
    label: Column | None = Field(description="the column that holds the label, or null where there are none")
    labels: tuple[str, ...] | None = Field(
        default=None, validate_default=True, description="a list of label names, each of them text"
    )
    metric: Literal["accuracy", "macro_f1", "mcc"] = Field(
        default="accuracy", description="one of accuracy, macro_f1, mcc"
    )

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The column of labels, if there is one."""
        return () if self.label is None else (self.label,)

    def read(self, tables: Mapping[str, Table]) -> tuple[tuple[str, ...], dict[str, Split]]:
        """Number the labels in the order of `labels`, else of the classes that the data set names, else sorted."""
        names = {split: self._names(table) for split, table in tables.items()}
        classes = tables["train"].classes.get(self.label or "")
        labels = self.labels or classes or label_order(names["train"])
        if broken := [label for label in labels if not is_unicode(label)]:
            raise DataError(f"{tables['train'].source}: the label {broken[0]!r} is not valid Unicode. Rename it.")
        splits = {split: self._split(split, table, names[split], labels) for split, table in tables.items()}
        if self.label is not None and len(present := sorted(set(names["train"]))) < 2:
            raise DataError(
                f"{tables['train'].source}: every row has the label {present[0]!r}; a task needs two labels or more. "
                f"Check that {self.label!r} is the column of labels."
            )
        return labels, splits

    def strata(self, targets: Targets, labels: Sequence[str]) -> tuple[Targets, list[str]]:
        """Return the classes; see `Task.strata`."""
        return targets, list(labels)

    def chance_prediction(self, targets: Targets, labels: Sequence[str]) -> int:
        """Return the most frequent class, the first of those that are as frequent; see `Task.chance`."""
        import numpy as np

        return int(np.bincount(targets, minlength=len(labels)).argmax())

    def relabel(self, targets: Targets, order: Sequence[int]) -> Targets:
        """Number classes as a head does; see `Task.relabel`."""
        import numpy as np

        return np.array(order, dtype=np.int64)[targets]

    def describe(self, target: Any, labels: Sequence[str]) -> str:
        """Return the name of a class."""
        return str(labels[target])

    def comparison_views(
        self, targets: Targets, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return recall and flips by class, and the calibration; see `Task.compare`."""
        sides = (("old", old), ("new", new))
        calibrations = {name: calibration(of.confidence, of.right) for name, of in sides if of.confidence is not None}
        return class_views(per_class(targets.tolist(), old.right, new.right, labels), calibrations)

    def label_warnings(self, labels: Sequence[str]) -> list[str]:
        """Find labels that look alike, or stand for missing ones; see `Task.doubts`."""
        sentences = []
        for group in lookalikes(labels):
            names = " and ".join(map(ascii, group))
            sentences.append(
                f"the labels {names} look alike: they differ only in case, blanks, invisible characters or the way "
                "accents are stored, and count as several classes. Write them alike if they are one."
            )
        if missing := [name for name in labels if reads_as_missing(name)]:
            sentences.append(
                f"the label {missing[0]!r} reads as a missing value, and counts as a class. Remove its rows if they "
                "have no label."
            )
        return sentences

    def as_targets(self, predictions: Sequence[Any]) -> Targets:
        """Return predicted classes as targets."""
        import numpy as np

        return np.array(predictions, dtype=np.int64)

    def right(self, targets: Targets, predictions: Sequence[Any]) -> list[bool]:
        """Say which predictions are the true class."""
        return [bool(target == guess) for target, guess in zip(targets.tolist(), predictions, strict=True)]

    def linear_probe(self) -> Any:
        """Return a logistic regression; see `Task.estimator`."""
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=0.01, max_iter=1000)

    def target_weakness(self, targets: Targets) -> str | None:
        """Say so where all examples are of one class; see `Task.target_weakness`."""
        if len(set(targets.tolist())) > 1:
            return None
        return (
            "examples of a single class, on which guessing that class is perfect (and mcc is 0 whatever is predicted)"
        )

    def _names(self, table: Table) -> list[str]:
        """Name the label of each row; where there is no column of them, the first of all labels stands for none."""
        if self.label is None:
            return [(self.labels or ("",))[0]] * len(table.rows)
        classes = table.classes.get(self.label)

        def name(value: object) -> str | None:
            if classes is None or not isinstance(value, int):
                return label_name(value)
            return classes[value] if 0 <= value < len(classes) else None  # a hidden label is stored as −1

        names: list[str] = []
        for row, value in zip(table.rows, table.columns[self.label], strict=True):
            try:
                label = name(value)
            except TypeError as error:
                raise DataError(
                    f"{table.source}, row {row}: the label in column {self.label!r} is {error}. Write it as text or a "
                    "number."
                ) from None
            if label is None:
                raise DataError(
                    f"{table.source}, row {row}: no label in column {self.label!r} (found {value!r}). "
                    "Label the row or remove it; for a test split without labels, use another one."
                )
            names.append(label)
        return names

    def _split(self, split: str, table: Table, names: Sequence[str], labels: Sequence[str]) -> Split:
        import numpy as np

        numbers = {name: number for number, name in enumerate(labels)}
        for row, name in zip(table.rows, names, strict=True):
            if name not in numbers:
                near = [label for label in labels if folded(label) == folded(name)]
                hint = f" It differs from {near[0]!a} only in case, blanks or what is not visible." if near else ""
                remedy = "Add it to `labels`" if self.labels else "List all labels under `labels` in the task file"
                raise DataError(
                    f"{table.source}, row {row}: the label {name!r} is not among those "
                    f"{'listed' if self.labels else 'of train'}: {listing(labels)}.{hint} {remedy}, or correct the row."
                )
        targets = np.array([numbers[name] for name in names], dtype=np.int64)
        return Split(split, table.source, self.texts(table), targets, np.array(table.rows, dtype=np.int64))

    @field_validator("label")
    @classmethod
    def _apart_from_text(cls, label: str | None, info: ValidationInfo) -> str | None:
        text = info.data.get("text", ())
        if label is not None and label in ([text] if isinstance(text, str) else text):
            raise ValueError(f"names {label!r}, which is a column of text already. Give the column of labels.")
        return label

    @field_validator("labels", mode="before")
    @classmethod
    def _as_names(cls, labels: Any) -> Any:
        """Name labels as those in the data are named."""
        if not isinstance(labels, list | tuple):
            return labels
        return [label_name(label) if isinstance(label, str | int | float) else label for label in labels]

    @field_validator("labels")
    @classmethod
    def _at_least_two(cls, labels: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if labels is None:
            if "label" in info.data and info.data["label"] is None:
                raise ValueError("are needed where there is no column of them. List the names that the old head has.")
            return None
        if twice := sorted(name for name, count in Counter(labels).items() if count > 1):
            raise ValueError(f"lists {listing(twice)} more than once. List each label once.")
        if len(labels) < 2:
            raise ValueError(f"lists {len(labels)} label. List two or more, or leave the key out.")
        return labels


TASK = TextClassification
