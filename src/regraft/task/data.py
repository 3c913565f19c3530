"""The data of a task: its labels, and its splits with encoded targets."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError, MismatchError, RecipeError
from regraft.task.labels import format_names, pair_names
from regraft.task.sample import draw_indices
from regraft.task.split import Split  # noqa: TC001 (regraft 0.1 exported it here)
from regraft.task.types.head import Head
from regraft.task.types.type import DEFAULT_TYPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.task.metric import Metric
    from regraft.task.types.likelihood import Likelihood
    from regraft.task.types.type import Task


@dataclasses.dataclass(frozen=True, eq=False)
class TaskData:
    """A task with its examples.

    Args:
        task: The task as declared in its task file.
        labels: The label names, in the order of a model's outputs.
        train: The examples to train on.
        dev: The examples to select models on.
        test: The examples to report results on, if there are any.
        duplicates: The number of test examples whose inputs are also in train.
        labelled: Whether the examples have targets; if not, `targets` of the splits are meaningless placeholders.
    """

    task: Task
    labels: tuple[str, ...]
    train: Split
    dev: Split
    test: Split | None
    duplicates: int
    labelled: bool = True

    @property
    def name(self) -> str:
        """The name of the task."""
        return self.task.name

    @property
    def metric(self) -> str:
        """The name of the metric that is reported."""
        return self.task.metric

    @property
    def scoring(self) -> Metric:
        """The metric that is reported, for targets in terms of `labels`."""
        return self.task.bind_metric(self.task.scoring, self.labels)

    @property
    def selection(self) -> Metric:
        """The metric by which a training selects its best weights."""
        return self.task.selection_metric or self.scoring

    @property
    def max_length(self) -> int:
        """The number of tokens that inputs are truncated to."""
        return self.task.max_length

    @property
    def head(self) -> Head:
        """The head that a model needs for the task."""
        return Head(type(self.task), self.labels)

    @functools.cached_property
    def likelihood(self) -> Likelihood:
        """The distribution over targets that a model's outputs parametrise."""
        return self.task.likelihood_for(self.train.targets)

    def with_settings(self, **settings: Any) -> TaskData:
        """Return the same examples with some keys of the task replaced.

        Args:
            **settings: The new values, by key of the task file, such as `metric`; they are not validated.
        """
        return dataclasses.replace(self, task=self.task.model_copy(update=settings))

    def with_virtual_tokens(self, count: int, max_tokens: int) -> TaskData:
        """Truncate inputs further if that is needed to fit virtual tokens in front of them.

        Args:
            count: The number of virtual tokens, which prompt and prefix tuning put in front of each input.
            max_tokens: The longest input that the base takes, in tokens.

        Returns:
            The same examples, possibly with a smaller `max_length`.
        """
        if not count:
            return self
        return self.with_settings(max_length=min(self.max_length, max_tokens - count))

    def require_labels(self, purpose: str) -> None:
        """Check that the examples are labelled.

        Args:
            purpose: The operation that needs the labels, a noun phrase for the error message.

        Raises:
            DataError: The examples are not labelled.
        """
        if not self.labelled:
            raise DataError(
                f"{self.train.source}: task {self.name!r} has no labels, which {purpose} needs. Name their column "
                "in the task file, or recycle with a method that reads no labels, such as ridge, label-free or "
                "auto -o labels=false."
            )

    def few_shot(self, shots: int, seed: int) -> TaskData:
        """Keep a few examples of each stratum of train and dev, and all of test; in classification, strata are classes.

        The sample depends on the seed and the content of the examples alone, not on the order of the rows. Samples of
        the same seed are nested: fewer shots are a subset of more.

        Args:
            shots: The number of examples to keep of each stratum; dev keeps all of a stratum that has fewer.
            seed: The seed of the sample.

        Returns:
            The same task's data with fewer examples of train and dev.

        Raises:
            DataError: A stratum of train has fewer examples, or the examples are not labelled.
            RecipeError: `shots` is less than 1.
        """
        import numpy as np

        self.require_labels("a few-shot sample")
        if shots < 1:
            raise RecipeError(f"shots must be at least 1, found {shots}.")
        strata, names = self.task.strata(self.train.targets, self.labels)
        counts = np.bincount(strata, minlength=len(names)).tolist()
        required = self.task.sample_counts(shots, counts)
        shortfalls = []
        for name, count, minimum in zip(names, counts, required, strict=True):
            if count < minimum:
                shortfalls.append(f"{name!r} {count:,}")
        if shortfalls:
            dev_note = " once dev is held out of it" if self.dev.source == self.train.source else ""
            raise DataError(
                f"{self.train.source}: {shots} shots are requested, but train has fewer{dev_note} of: "
                f"{', '.join(shortfalls)}. Add examples or lower `shots`."
            )
        train = self.sample(self.train, shots, seed)
        dev = self.sample(self.dev, shots, seed)
        return dataclasses.replace(self, train=train, dev=dev, duplicates=len(find_duplicates(train, self.test)))

    def sample(self, split: Split, size: int, seed: int) -> Split:
        """Draw a stratified sample; in classification, strata are classes.

        Args:
            split: The examples to draw from.
            size: The number of examples to draw per stratum, as `Task.sample_counts` takes it; a stratum that has
                fewer is drawn whole.
            seed: The seed of the sample.

        Returns:
            The examples, in the order drawn.
        """
        import numpy as np

        strata, names = self.task.strata(split.targets, self.labels)
        counts = self.task.sample_counts(size, np.bincount(strata, minlength=len(names)).tolist())
        return split.take(draw_indices(split, self.task, self.labels, counts, seed))

    def relabel(self, head_labels: Sequence[str]) -> TaskData:
        """Rename and reorder the labels to match the outputs of a head.

        Args:
            head_labels: The label names of the head's outputs, in their order. Their spelling may differ from the
                task's in case and whitespace, and in how booleans (`True`, `true`) and whole numbers (`1.0`, `1`) are
                written.

        Returns:
            The task's data with the labels `head_labels`, and targets encoded accordingly.

        Raises:
            MismatchError: The labels are different, or can be paired in more than one way.
        """
        head_names = pair_names(self.labels, head_labels)
        if head_names is None:
            only_task = [name for name in self.labels if name not in head_labels]
            only_head = [name for name in head_labels if name not in self.labels]
            remedy = "Spell them alike, in `labels` or in the data." if only_task else "List them all in `labels`."
            raise MismatchError(
                f"{self.train.source}: the labels of task {self.name!r} are not those of the head. "
                f"Only in the task: {format_names(only_task)}. Only in the head: {format_names(only_head)}. "
                f"Expected {len(self.labels)} labels, found {len(head_labels)}. {remedy}"
            )
        output_by_name = {name: output for output, name in enumerate(head_labels)}
        output_by_label = [output_by_name[head_names[name]] for name in self.labels]

        def reencode(split: Split) -> Split:
            return dataclasses.replace(split, targets=self.task.relabel(split.targets, output_by_label))

        return dataclasses.replace(
            self,
            labels=tuple(head_labels),
            train=reencode(self.train),
            dev=reencode(self.dev),
            test=None if self.test is None else reencode(self.test),
        )

    def digest(self) -> str:
        """Hash the content of the task, independently of its name and location.

        Returns:
            The hexadecimal SHA-256 of the label names, the metric, `max_length`, the inputs and targets of all splits,
            and the task type with its `digest_keys`. The type is left out for text classification, the only type in
            regraft 0.1.
        """
        settings = [self.labels, self.metric, self.max_length]
        if self.task.type != DEFAULT_TYPE:
            settings += [self.task.type, *(getattr(self.task, key) for key in self.task.digest_keys)]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for split in (self.train, self.dev, self.test):
            digest.update(b"\nno split\n" if split is None else b"\nsplit\n")
            if split is not None:
                for inputs, target in zip(split.inputs, split.targets.tolist(), strict=True):
                    digest.update(json.dumps([inputs, target]).encode() + b"\n")
        return digest.hexdigest()


def find_duplicates(train: Split, test: Split | None) -> list[tuple[int, int]]:
    """Find the test examples whose inputs are also in train, character by character.

    Args:
        train: The training examples.
        test: The test examples; None if the task has no test split.

    Returns:
        One pair per such test example: the row number of the first training example with the same inputs, and the test
        example's row number.
    """
    if test is None:
        return []
    train_row_by_inputs: dict[str, int] = {}
    for inputs, train_row in zip(train.inputs, train.row_numbers.tolist(), strict=True):
        # inputs may be lists, which have no hash, so their JSON is the key
        train_row_by_inputs.setdefault(json.dumps(inputs), train_row)
    pairs = []
    for inputs, test_row in zip(test.inputs, test.row_numbers.tolist(), strict=True):
        key = json.dumps(inputs)
        if key in train_row_by_inputs:
            pairs.append((train_row_by_inputs[key], test_row))
    return pairs
