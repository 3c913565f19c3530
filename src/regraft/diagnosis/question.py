"""The interface of a diagnosis question, the context it is answered in, and the list of all questions."""

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

    from regraft.diagnosis.pair import DeploymentPair
    from regraft.upgrade import Upgrade

Answer = TypeVar("Answer")
SummaryLines = list[tuple[str, str]]
"""Label and text of each line that a terminal shows."""

MAX_SEGMENT_POINTS, MAX_PLANE_SIZE = 1000, 100  # each point is a pass over the data; no chart shows more


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a diagnosis looks at beyond the two bases, the adaptation and the task.

    Args:
        points: The number of points evaluated on the segment between the deployments.
        counterparts: Outcomes of the same task on the new base. The old deployment is compared with the first one
            instead of with the old weights as they are; the others, of other seeds, measure the noise of flips.
        checkpoints: Bases on the way from the old to the new one, in order.
        text: Unlabelled text of the new base's domain; the task's own texts if empty.
        plane: The number of points along each side of the loss plane; 0 for no plane. A plane needs a counterpart.

    Raises:
        RecipeError: There are too few or too many points, or a plane without a counterpart.
    """

    points: int = 11
    counterparts: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    plane: int = 0

    def __post_init__(self) -> None:
        """Check every number."""
        if not 3 <= self.points <= MAX_SEGMENT_POINTS:
            raise RecipeError(f"a segment takes from 3 to {MAX_SEGMENT_POINTS:,} points, found {self.points}.")
        if self.plane > MAX_PLANE_SIZE:
            raise RecipeError(f"a plane takes up to {MAX_PLANE_SIZE} points a side, found {self.plane}.")
        if self.plane and (self.plane < 3 or not self.counterparts):
            raise RecipeError(
                f"a loss plane goes through the old deployment, the old weights as they are and a counterpart, and has "
                f"at least 3 points a side: found {self.plane} points and {len(self.counterparts)} counterparts."
            )


@dataclasses.dataclass(frozen=True)
class QuestionContext:
    """What a question is answered from.

    Args:
        upgrade: The old and the new base.
        direct: The old deployment, and the old weights on the new base as they are.
        pair: The old deployment, and the one it is compared with: the first counterpart, or the same as in `direct`.
        options: What the diagnosis looks at.
        answers: The answers to the questions asked so far, by the question's name.
    """

    upgrade: Upgrade
    direct: DeploymentPair
    pair: DeploymentPair
    options: Questions
    answers: dict[str, Any]

    @property
    def endpoint_names(self) -> tuple[str, str]:
        """The names of the two deployments of `pair`, as messages and charts show them."""
        counterparts = self.options.counterparts
        return "old deployment", f"new deployment, {Path(counterparts[0]).name if counterparts else 'direct'}"

    def answer_to(self, question: Question[Answer]) -> Answer | None:
        """Look up the answer to a question that comes before this one.

        Args:
            question: The earlier question.

        Returns:
            Its answer; None if it was left out or not asked.
        """
        return self.answers.get(question.name)

    def require_same_tokens(self) -> None:
        """Check that the two models can be compared token by token.

        Raises:
            MismatchError: Their vocabularies differ.
        """
        upgrade = self.pair.upgrade
        if upgrade.row_match is not None or upgrade.new.tokenizer_override is not None:
            raise MismatchError(
                "the two models have different vocabularies, but this question compares them token by token"
            )


@dataclasses.dataclass(frozen=True)
class Question(Generic[Answer]):
    """One question of a diagnosis; every module of this package that defines `QUESTION` adds one.

    Args:
        name: The key of its answer in `diagnosis.json`.
        order: Its position among the questions, ascending: it may read the answers of those before it.
        record: The type of the answer: a frozen dataclass, or a tuple of them.
        answer: Returns the answer, or None if the options do not ask for it. Raises MismatchError if models of this
            kind have no answer.
        is_required: Whether a diagnosis without this answer is an error.
        describe: Summarises the answer for a terminal. Takes the answer and the name of the task's metric.
        section: The module of `regraft.report.sections` that shows the answer, if its name is not the question's.
    """

    name: str
    order: int
    record: Any
    answer: Callable[[QuestionContext], Answer | None]
    is_required: bool = False
    describe: Callable[[Answer, str], SummaryLines] = lambda answer, metric: []
    section: str | None = None


@functools.cache
def all_questions() -> tuple[Question[Any], ...]:
    """Import every question of this package.

    Returns:
        The questions, in the order in which they are asked.
    """
    package = __name__.rpartition(".")[0]
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    questions = [getattr(importlib.import_module(f"{package}.{module.name}"), "QUESTION", None) for module in modules]
    return tuple(sorted(filter(None, questions), key=lambda question: question.order))
