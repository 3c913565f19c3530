"""The examples of a task, read and encoded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING

from regraft.errors import DataError, MismatchError, RecipeError
from regraft.task.labels import listing, matching
from regraft.task.sample import draw
from regraft.task.split import Split  # noqa: TC001 (it could be imported from here before)

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, eq=False)
class TaskData:
    """A task with its examples.

    Args:
        name: The task's name.
        metric: What is reported: `accuracy`, `macro_f1` or `mcc`.
        max_length: How many tokens a text is cut to.
        labels: The label names, in the order of the classes.
        train: The examples to tune on.
        dev: The examples to choose by.
        test: The examples to report on, if there are any.
        duplicates: How many examples of test have the very texts of one of train.
        labelled: Whether the examples have labels; if not, every class is 0 and means nothing.
    """

    name: str
    metric: str
    max_length: int
    labels: tuple[str, ...]
    train: Split
    dev: Split
    test: Split | None
    duplicates: int
    labelled: bool = True

    def with_room(self, tokens: int, longest: int) -> TaskData:
        """Cut texts so that virtual tokens fit in front of them.

        Args:
            tokens: How many there are.
            longest: The longest input the base takes.

        Returns:
            The task, with a smaller `max_length` where that is needed.
        """
        return dataclasses.replace(self, max_length=min(self.max_length, longest - tokens)) if tokens else self

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

        Which ones follows from the seed and the texts alone: neither the order of the rows nor any other use of
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
        counts = np.bincount(self.train.labels, minlength=len(self.labels))
        if short := [
            f"{label!r} {count:,}" for label, count in zip(self.labels, counts.tolist(), strict=True) if count < shots
        ]:
            held_out = " once dev is held out of it" if self.dev.source == self.train.source else ""
            raise DataError(
                f"{self.train.source}: {shots} shots a class are wanted, but train has fewer{held_out} of: "
                f"{', '.join(short)}. Add examples or lower `shots`."
            )
        wanted = [shots] * len(self.labels)
        train = self.train.take(draw(self.train, self.labels, wanted, seed))
        dev = self.dev.take(draw(self.dev, self.labels, wanted, seed))
        return dataclasses.replace(self, train=train, dev=dev, duplicates=len(duplicates(train, self.test)))

    def relabel(self, order: Sequence[str]) -> TaskData:
        """Number and name the classes as a model's head does.

        Args:
            order: The labels of the head's outputs. They may be written otherwise than the task's: `True` for `true`,
                `1.0` for `1`, in another case, or with other blanks.

        Returns:
            The task with its labels encoded anew, named as in `order`.

        Raises:
            MismatchError: The labels are not the same, or which of them belong together is not clear.
        """
        import numpy as np

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
        places = np.array([numbers[pairs[name]] for name in self.labels], dtype=np.int64)

        def encoded(split: Split) -> Split:
            return dataclasses.replace(split, labels=places[split.labels])

        test = None if self.test is None else encoded(self.test)
        return dataclasses.replace(
            self, labels=tuple(order), train=encoded(self.train), dev=encoded(self.dev), test=test
        )

    def digest(self) -> str:
        """Hash what the task consists of, whatever it is called and wherever it is stored.

        Returns:
            SHA-256 over label names, metric, max_length, and the texts and labels of every split, in hexadecimal.
        """
        digest = hashlib.sha256(json.dumps([self.labels, self.metric, self.max_length]).encode())
        for split in (self.train, self.dev, self.test):
            digest.update(b"\nno split\n" if split is None else b"\nsplit\n")
            if split is not None:
                for texts, label in zip(split.texts, split.labels.tolist(), strict=True):
                    digest.update(json.dumps([texts, label]).encode() + b"\n")
        return digest.hexdigest()

    def majority(self) -> int:
        """Return the class that most examples of train have.

        Returns:
            The class; the first of them where several are as frequent.
        """
        import numpy as np

        return int(np.bincount(self.train.labels, minlength=len(self.labels)).argmax())


def duplicates(train: Split, test: Split | None) -> list[tuple[int, int]]:
    """Find the examples of test whose texts are in train, letter by letter.

    Args:
        train: The examples tuned on.
        test: The examples reported on, if any.

    Returns:
        Row of train, row of test; one pair for each such example of test.
    """
    if test is None:
        return []
    seen = {texts: row for texts, row in zip(reversed(train.texts), reversed(train.rows.tolist()), strict=True)}
    return [(seen[texts], row) for texts, row in zip(test.texts, test.rows.tolist(), strict=True) if texts in seen]
