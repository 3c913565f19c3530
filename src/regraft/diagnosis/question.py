"""What a question of a diagnosis is, what it may draw on, and every question there is."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from regraft.errors import MismatchError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from regraft.diagnosis.pair import Pair
    from regraft.upgrade import Upgrade

Answer = TypeVar("Answer")
Lines = list[tuple[str, str]]

MOST_POINTS, MOST_A_SIDE = 1000, 100  # each point is a pass over the data; no picture shows more


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a diagnosis looks at beyond the two bases, the adaptation and the task.

    Args:
        points: How many points of the segment between the deployments are evaluated.
        counterparts: Outcomes of the same task on the new base. The old deployment is compared with the first rather
            than with the old weights as they are; further ones, of other seeds, tell the noise of flips.
        checkpoints: Bases on the way from the old to the new one, in order.
        text: Unlabelled text of the new base's domain; none for the task's own.
        plane: How many points a side the loss plane has; 0 for none. It takes a counterpart.

    Raises:
        RecipeError: There are too few points, or a plane without a counterpart.
    """

    points: int = 11
    counterparts: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    plane: int = 0

    def __post_init__(self) -> None:
        """Check every number."""
        if not 3 <= self.points <= MOST_POINTS:
            raise RecipeError(f"a segment takes from 3 to {MOST_POINTS:,} points, found {self.points}.")
        if self.plane > MOST_A_SIDE:
            raise RecipeError(f"a plane takes up to {MOST_A_SIDE} points a side, found {self.plane}.")
        if self.plane and (self.plane < 3 or not self.counterparts):
            raise RecipeError(
                f"a loss plane goes through the old deployment, the old weights as they are and a counterpart, and has "
                f"at least 3 points a side: found {self.plane} points and {len(self.counterparts)} counterparts."
            )


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a question may draw on.

    Args:
        upgrade: The two bases.
        direct: The old deployment, and the old weights on the new base as they are.
        pair: The old deployment, and what it is compared with: the first counterpart, or the same as in `direct`.
        options: What the diagnosis looks at.
        answers: What the questions before have found, by name.
    """

    upgrade: Upgrade
    direct: Pair
    pair: Pair
    options: Questions
    answers: dict[str, Any]

    @property
    def ends(self) -> tuple[str, str]:
        """What the two deployments of `pair` are called."""
        first = self.options.counterparts[:1]
        return "old deployment", f"new deployment, {Path(first[0]).name if first else 'direct'}"

    def answer(self, question: Question[Answer]) -> Answer | None:
        """Look up what a question before this one has found.

        Args:
            question: The question.

        Returns:
            Its answer; None where it was left out or not asked.
        """
        return self.answers.get(question.name)

    def require_same_tokens(self) -> None:
        """Refuse a question that compares two models token by token, where their vocabularies differ.

        Raises:
            MismatchError: They differ.
        """
        upgrade = self.pair.upgrade
        if upgrade.rows is not None or upgrade.new.own_tokenizer is not None:
            raise MismatchError(
                "the two models have different vocabularies, and this holds them against each other by token"
            )


@dataclasses.dataclass(frozen=True)
class Question(Generic[Answer]):
    """A question of a diagnosis; every module of this package that defines `QUESTION` is one.

    Args:
        name: What its answer is called in the record; its section of a report is the module of that name.
        order: Its place among the questions, ascending: it may read the answers of those before it.
        record: The answer's type, a frozen dataclass or a tuple of some.
        ask: Returns the answer; None where the options do not ask for it. A MismatchError says that models of this
            kind have none.
        is_required: Whether there is no diagnosis without its answer.
        describe: Returns what the answer comes to, as names and figures for a terminal; takes the metric's name too.
    """

    name: str
    order: int
    record: Any
    ask: Callable[[Asked], Answer | None]
    is_required: bool = False
    describe: Callable[[Answer, str], Lines] = lambda answer, metric: []


@functools.cache
def all_questions() -> tuple[Question[Any], ...]:
    """Find every question.

    Returns:
        The questions in their order.
    """
    package = __name__.rpartition(".")[0]
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    questions = [getattr(importlib.import_module(f"{package}.{module.name}"), "QUESTION", None) for module in modules]
    return tuple(sorted(filter(None, questions), key=lambda question: question.order))
