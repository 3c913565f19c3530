"""The examples of a task, read and encoded."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError, MismatchError, RecipeError
from regraft.task.labels import listing, matching
from regraft.task.sample import draw
from regraft.task.split import Split  # noqa: TC001 (0.1 had it here)
from regraft.task.types.head import Head
from regraft.task.types.type import DEFAULT_TYPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.task.types.likelihood import Likelihood
    from regraft.task.types.type import Task


@dataclasses.dataclass(frozen=True, eq=False)
class TaskData:
    """A task with its examples.

    Args:
        task: What was declared.
        labels: The label names, in the order of the outputs.
        train: The examples to tune on.
        dev: The examples to choose by.
        test: The examples to report on, if there are any.
        duplicates: How many examples of test have the very inputs of one of train.
        labelled: Whether the examples have targets; if not, those are placeholders and mean nothing.
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
        """The task's name."""
        return self.task.name

    @property
    def metric(self) -> str:
        """What is reported."""
        return self.task.metric

    @property
    def max_length(self) -> int:
        """How many tokens an input is cut to."""
        return self.task.max_length

    @property
    def head(self) -> Head:
        """The head that a model needs for the task."""
        return Head(type(self.task), self.labels)

    @functools.cached_property
    def likelihood(self) -> Likelihood:
        """What a model's outputs are a distribution over."""
        return self.task.likelihood_for(self.train.targets)

    def with_settings(self, **keys: Any) -> TaskData:
        """Return the same examples of a task that declares other keys.

        Args:
            **keys: Those of the task file, as `metric`.
        """
        return dataclasses.replace(self, task=self.task.model_copy(update=keys))

    def with_virtual_tokens(self, tokens: int, longest: int) -> TaskData:
        """Cut inputs so that virtual tokens fit in front of them.

        Args:
            tokens: How many there are.
            longest: The longest input the base takes.

        Returns:
            The task, with a smaller `max_length` where that is needed.
        """
        return self.with_settings(max_length=min(self.max_length, longest - tokens)) if tokens else self

    def require_labels(self, what: str) -> None:
        """Refuse what labels are needed for where there are none.

        Args:
            what: What they are needed for.

        Raises:
            DataError: There are none.
        """
        if not self.labelled:
            raise DataError(
                f"{self.train.source}: task {self.name!r} has no labels, which {what} needs. Name their column under "
                "`label`, or recycle by a method that reads none, such as ridge, label-free or auto -o labels=false."
            )

    def few_shot(self, shots: int, seed: int) -> TaskData:
        """Keep a few examples a class of train and of dev, and all of test.

        Which ones follows from the seed and the examples alone: neither the order of the rows nor any other use of
        random numbers changes it, and a smaller number of shots is a part of a larger one.

        Args:
            shots: Examples a class; dev gives what it has where that is less.
            seed: What the examples are drawn from.

        Returns:
            The smaller task.

        Raises:
            DataError: Train has fewer examples of a class.
            RecipeError: `shots` is less than 1.
        """
        import numpy as np

        self.require_labels("a few examples a class")
        if shots < 1:
            raise RecipeError(f"shots = {shots}: at least 1 example a class is needed.")
        strata, names = self.task.strata(self.train.targets, self.labels)
        counts = np.bincount(strata, minlength=len(names)).tolist()
        if short := [
            f"{name!r} {count:,}"
            for name, count, wanted in zip(names, counts, self.task.counts(shots, counts), strict=True)
            if count < wanted
        ]:
            held_out = " once dev is held out of it" if self.dev.source == self.train.source else ""
            raise DataError(
                f"{self.train.source}: {shots} shots a class are wanted, but train has fewer{held_out} of: "
                f"{', '.join(short)}. Add examples or lower `shots`."
            )
        train, dev = (self.sample(split, shots, seed) for split in (self.train, self.dev))
        return dataclasses.replace(self, train=train, dev=dev, duplicates=len(duplicates(train, self.test)))

    def sample(self, split: Split, size: int, seed: int) -> Split:
        """Draw examples of each stratum, which in classification is a class.

        Args:
            split: What to draw from.
            size: How many examples of each stratum; fewer where the split has fewer.
            seed: What the examples are drawn from.

        Returns:
            The examples, in the order drawn.
        """
        import numpy as np

        strata, names = self.task.strata(split.targets, self.labels)
        counts = self.task.counts(size, np.bincount(strata, minlength=len(names)).tolist())
        return split.take(draw(split, self.task, self.labels, counts, seed))

    def relabel(self, order: Sequence[str]) -> TaskData:
        """Number and name the labels as a model's head does.

        Args:
            order: The labels of the head's outputs. They may be written otherwise than the task's: `True` for `true`,
                `1.0` for `1`, in another case, or with other blanks.

        Returns:
            The task with its labels encoded anew, named as in `order`.

        Raises:
            MismatchError: The labels are not the same, or which of them belong together is not clear.
        """
        pairs = matching(self.labels, order)
        if pairs is None:
            here, there = set(self.labels), set(order)
            only_here = [name for name in self.labels if name not in there]
            only_there = [name for name in order if name not in here]
            raise MismatchError(
                f"{self.train.source}: the labels of task {self.name!r} are not those it is to be used with. "
                f"Only in the task: {listing(only_here)}. Only there: {listing(only_there)}. "
                f"Expected {len(self.labels)} labels, found {len(order)}. "
                + ("Name them alike, in `labels` or in the data." if only_here else "List them all in `labels`.")
            )
        numbers = {name: number for number, name in enumerate(order)}
        of_head = [numbers[pairs[name]] for name in self.labels]

        def encoded(split: Split) -> Split:
            return dataclasses.replace(split, targets=self.task.relabel(split.targets, of_head))

        test = None if self.test is None else encoded(self.test)
        return dataclasses.replace(
            self, labels=tuple(order), train=encoded(self.train), dev=encoded(self.dev), test=test
        )

    def digest(self) -> str:
        """Hash what the task consists of, whatever it is called and wherever it is stored.

        Returns:
            SHA-256 over label names, metric, max_length, and the inputs and targets of every split, in hexadecimal;
            and over the type, but for text classification, whose digests are those of 0.1.
        """
        settings = [self.labels, self.metric, self.max_length]
        if self.task.type != DEFAULT_TYPE:
            settings.append(self.task.type)
        digest = hashlib.sha256(json.dumps(settings).encode())
        for split in (self.train, self.dev, self.test):
            digest.update(b"\nno split\n" if split is None else b"\nsplit\n")
            if split is not None:
                for inputs, target in zip(split.inputs, split.targets.tolist(), strict=True):
                    digest.update(json.dumps([inputs, target]).encode() + b"\n")
        return digest.hexdigest()


def duplicates(train: Split, test: Split | None) -> list[tuple[int, int]]:
    """Find the examples of test whose inputs are in train, letter by letter.

    Args:
        train: The examples tuned on.
        test: The examples reported on, if any.

    Returns:
        Row of train, row of test; one pair for each such example of test.
    """
    if test is None:
        return []
    key = json.dumps  # inputs may be lists, as conversations are
    rows = {key(inputs): row for inputs, row in zip(reversed(train.inputs), reversed(train.rows.tolist()), strict=True)}
    return [
        (rows[key(inputs)], row)
        for inputs, row in zip(test.inputs, test.rows.tolist(), strict=True)
        if key(inputs) in rows
    ]
