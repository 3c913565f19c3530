"""The keys that the task files of every type have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field

from regraft.task.delimited import Quoting
from regraft.task.source import SOURCE_DESCRIPTION, Source, resolve_source
from regraft.task.yaml_file import format_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MIN_TOKENS = 8
"""The smallest `max_length` in tokens, arbitrary: inputs cut to fewer tokens lose nearly all of their text."""
MAX_TOKENS = 10_000_000
"""The largest `max_length` in tokens: longer than any model's context, yet small enough for a tokenizer's integers."""


class TaskKeys(BaseModel):
    """The keys of a task file, apart from those that only some task types have.

    Args:
        name: The name of the task; by default, the task file's name without its suffix.
        train: The source of the training examples.
        dev: The source of the examples that models are selected on; by default, a tenth of train is held out.
        test: The source of the examples that results are reported on; None to report results on dev.
        hold_out_test: Whether to hold out a tenth of train as test if there is no test source.
        metric: The name of the metric that is reported.
        quoting: Whether double quotes in CSV and TSV files enclose fields (`quoted`) or are ordinary characters
            (`plain`). By default, CSV is read as quoted, and TSV as its quotes suggest.
        shots: The number of examples to keep per stratum of train and dev; by default, all are kept.
        max_length: The number of tokens that inputs are truncated to. The default is a trade-off: a higher number
            cuts off less text, but takes more time and memory per step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    name: str = Field(min_length=1, description="a name for the task")
    train: Source = Field(description=SOURCE_DESCRIPTION)
    dev: Source | None = Field(default=None, description=SOURCE_DESCRIPTION)
    test: Source | None = Field(default=None, description=SOURCE_DESCRIPTION)
    hold_out_test: bool = Field(default=False, description="true or false")
    metric: str
    quoting: Quoting | None = Field(default=None, description="quoted or plain, or leave it out")
    shots: int | None = Field(default=None, ge=1, description="a whole number of examples per class, 1 or more")
    max_length: int = Field(
        default=128, ge=MIN_TOKENS, le=MAX_TOKENS, description=f"a whole number of tokens, {MIN_TOKENS} or more"
    )

    def with_shots(self, shots: int | None) -> Self:
        """Return a few-shot version of this task.

        Args:
            shots: The number of examples to keep per stratum; None returns the task unchanged.
        """
        return self if shots is None else self.model_copy(update={"shots": shots})

    def as_yaml(self) -> str:
        """Return the content of a task file that declares this task: all keys that are set, with their values."""
        keys = self.model_dump(mode="json", exclude_unset=True)
        return format_yaml({"type": self.type, **keys, "metric": self.metric})

    def resolve_paths(self, folder: Path) -> Self:
        """Make all relative paths of a task file absolute.

        Args:
            folder: The folder of the task file.
        """
        sources = {split: resolve_source(getattr(self, split), folder) for split in ("train", "dev", "test")}
        return self.model_copy(update=sources).with_absolute_paths(folder)

    def with_absolute_paths(self, folder: Path) -> Self:
        """Make the relative paths of files that the task names, apart from its sources, absolute.

        Args:
            folder: The folder that they start from.
        """
        return self

    @property
    def has_columns(self) -> bool:
        """Whether the task names all of its columns; if not, `with_columns` detects them in its training source."""
        return True

    def with_columns(self, columns: Sequence[str], source: str) -> Self:
        """Complete the columns of a task by those of its training source.

        Args:
            columns: The names of all columns of the source.
            source: The source as messages name it.

        Raises:
            DataError: The type does not read data with these columns.
        """
        return self
