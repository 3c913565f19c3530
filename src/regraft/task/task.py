"""A task as users declare it: where its examples are, which columns to read, how to score."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator

from regraft.task.labels import label_name, listing
from regraft.task.yaml_file import read_yaml, validate


class HubSplit(BaseModel):
    """A split of a data set that `datasets` loads: one of the Hugging Face Hub, or a local folder of data files.

    Args:
        dataset: Its name on the Hub, or a folder.
        split: The split, also a slice of it such as `train[:1000]`.
        config: The configuration (subset), where it has several.
        revision: A branch, tag or commit on the Hub.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(min_length=1, description="the name of a data set on the Hugging Face Hub, or a folder")
    split: str = Field(min_length=1, description="a split of the data set, such as train")
    config: str | None = Field(default=None, description="the name of a configuration of the data set")
    revision: str | None = Field(default=None, description="a branch, tag or commit of the data set")

    def __str__(self) -> str:
        parts = [self.dataset, self.config and f"config {self.config}", f"split {self.split}"]
        return ", ".join(part for part in parts if part)


_File = Annotated[str, Field(min_length=1), BeforeValidator(lambda at: os.fspath(at) if isinstance(at, Path) else at)]
_Column = Annotated[str, Field(min_length=1)]


def _kind_of_source(value: Any) -> str:
    return "<data set>" if isinstance(value, dict | HubSplit) else "<file>"


def _kind_of_text(value: Any) -> str:
    return "<pair>" if isinstance(value, list | tuple) else "<column>"


Source = Annotated[
    Annotated[_File, Tag("<file>")] | Annotated[HubSplit, Tag("<data set>")], Discriminator(_kind_of_source)
]
_Text = Annotated[
    Annotated[_Column, Tag("<column>")] | Annotated[tuple[_Column, _Column], Tag("<pair>")],
    Discriminator(_kind_of_text),
]
_SOURCE = "a file (.csv, .tsv, .jsonl, .json, .parquet) or {dataset: NAME, split: SPLIT}"
_LONGEST = 10_000_000  # tokens: more than any model takes, and few enough for a tokenizer to count


class Task(BaseModel):
    """A classification task, as a task file declares it.

    Args:
        name: What the task is called; the stem of the task file if that names none.
        train: The examples to tune on.
        dev: The examples to choose by; a tenth of train is held out if there is none.
        test: The examples to report on.
        text: The column that holds the text, or two columns for a pair of texts.
        label: The column that holds the label; None where there is none: then `labels` are needed, and only methods
            that read no label can be used.
        labels: All label names in the order of the classes; found in train if not given.
        metric: What is reported.
        quoting: Whether fields of CSV and TSV files are in double quotes where they hold delimiters (`quoted`) or
            quotes are characters like others (`plain`). If not given, CSV is quoted, and of TSV its quotes decide.
        shots: Examples a class to keep of train and of dev; all of them if not given.
        max_length: How many tokens a text is cut to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="a name for the task")
    train: Source = Field(description=_SOURCE)
    dev: Source | None = Field(default=None, description=_SOURCE)
    test: Source | None = Field(default=None, description=_SOURCE)
    text: _Text = Field(description="the column that holds the text, or a list of two columns for a pair of texts")
    label: _Column | None = Field(description="the column that holds the label, or null where there are none")
    labels: tuple[str, ...] | None = Field(
        default=None, validate_default=True, description="a list of label names, each of them text"
    )
    metric: Literal["accuracy", "macro_f1", "mcc"] = Field(
        default="accuracy", description="one of accuracy, macro_f1, mcc"
    )
    quoting: Literal["quoted", "plain"] | None = Field(default=None, description="quoted or plain, or leave it out")
    shots: int | None = Field(default=None, ge=1, description="a whole number of examples a class, 1 or more")
    max_length: int = Field(default=128, ge=8, le=_LONGEST, description="a whole number of tokens, 8 or more")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold text, one or two."""
        return (self.text,) if isinstance(self.text, str) else self.text

    def with_shots(self, shots: int | None) -> Task:
        """Return this task with a few training examples a class.

        Args:
            shots: Examples a class; None leaves the task as it is.

        Returns:
            The task.
        """
        return self if shots is None else self.model_copy(update={"shots": shots})

    @classmethod
    def load(cls, path: str | Path) -> Task:
        """Read a task file.

        Args:
            path: A YAML file; relative paths in it start from its folder.

        Returns:
            The task, with absolute paths.

        Raises:
            DataError: The file cannot be read, or a key is unknown, missing or of no use; the message names it.
        """
        path = Path(path)
        values = {"name": path.stem, **read_yaml(path)}
        task = validate(cls, values, str(path))
        return task.model_copy(
            update={key: _resolved(getattr(task, key), path.absolute().parent) for key in ("train", "dev", "test")}
        )

    @field_validator("text")
    @classmethod
    def _two_columns(cls, text: str | tuple[str, str]) -> str | tuple[str, str]:
        if not isinstance(text, str) and text[0] == text[1]:
            raise ValueError(f"names {text[0]!r} twice. Give two columns, or one alone.")
        return text

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


def _resolved(source: str | HubSplit | None, folder: Path) -> str | HubSplit | None:
    if isinstance(source, str):
        return os.path.abspath(folder / os.path.expanduser(source))
    if source is not None and os.path.isdir(beside := folder / os.path.expanduser(source.dataset)):
        return source.model_copy(update={"dataset": os.path.abspath(beside)})
    return source
