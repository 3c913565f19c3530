"""The interface of a diagnosis's questions, the context in which they are answered, and the list of all questions."""

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
"""The label and the text of each line that a terminal shows."""

MISSING = "–"
"""What a terminal shows in place of a figure that is not known."""
SEGMENT_POINTS = 11
"""The default number of points on a segment, 0.1 apart; each point takes a pass over the data."""
MIN_SEGMENT_POINTS = 3
"""The least number of points on a segment: both ends and one between them, without which there is no barrier."""
MIN_PLANE_SIZE = 3
"""The least number of points along each side of a plane; 2 points would be its edges alone."""
# Each point takes a pass over the data, and the charts are too small to show more points apart.
MAX_SEGMENT_POINTS = 1000
MAX_PLANE_SIZE = 100


@dataclasses.dataclass(frozen=True)
class Questions:
    """The options of a diagnosis's questions.

    Args:
        points: The number of points evaluated on the segment between the deployments, from 3 to 1,000.
        counterparts: Folders of outcomes for the same task on the new base. Regressions, connectivity, similarity
            and retention compare the old deployment with the first one instead of the same adaptation on the new base,
            and a plane goes through the first one. The others, tuned with different seeds, measure the noise of flips.
        checkpoints: Bases between the old and the new one, in order of pre-training.
        text: Files or data sets of unlabelled text of the new base's domain; the task's training texts if empty.
        plane: The number of points along each side of the loss plane, from 3 to 100; 0 for no plane. A plane needs a
            counterpart.

    Raises:
        RecipeError: There are too few or too many points, or a plane without a counterpart.
    """

    points: int = SEGMENT_POINTS
    counterparts: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    plane: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers of points out of their ranges, and a plane without a counterpart."""
        if not MIN_SEGMENT_POINTS <= self.points <= MAX_SEGMENT_POINTS:
            raise RecipeError(
                f"a segment takes from {MIN_SEGMENT_POINTS} to {MAX_SEGMENT_POINTS:,} points, found {self.points}."
            )
        if self.plane > MAX_PLANE_SIZE:
            raise RecipeError(f"a plane takes up to {MAX_PLANE_SIZE} points per side, found {self.plane}.")
        if self.plane and (self.plane < MIN_PLANE_SIZE or not self.counterparts):
            raise RecipeError(
                f"a loss plane goes through the old deployment, the old weights as they are and a counterpart, and has "
                f"at least {MIN_PLANE_SIZE} points per side: found {self.plane} points and {len(self.counterparts)} "
                "counterparts."
            )


@dataclasses.dataclass(frozen=True)
class QuestionContext:
    """The deployments, options and earlier answers that questions are answered from.

    Args:
        upgrade: The old and the new base, without the tokens that only the adaptation has.
        direct: The old deployment, and the same adaptation on the new base without further tuning.
        pair: The old deployment, and the first counterpart; without counterparts, the same as `direct`.
        options: The options of the questions.
        answers: The answers so far, by the question's name; the diagnosis adds each answer.
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
        """Look up the answer to an earlier question.

        Args:
            question: A question whose `order` is lower than that of the question being answered.

        Returns:
            The answer; None if the question was left out or not asked.
        """
        return self.answers.get(question.name)

    def require_labels(self) -> None:
        """Check that the examples have labels.

        Raises:
            MismatchError: The examples are prompts alone.
        """
        if not self.pair.data.labelled:
            raise MismatchError("the examples have no reference answers, which this question needs")

    def require_same_tokens(self) -> None:
        """Check that the two models can be compared token by token.

        Raises:
            MismatchError: The bases have different vocabularies, or the adaptation has tokens of its own.
        """
        upgrade = self.pair.upgrade
        if upgrade.row_match is not None or upgrade.new.rows_override is not None:
            raise MismatchError(
                "the two models have different vocabularies, but this question compares them token by token"
            )


def _no_lines(_answer: Any, _metric: str) -> SummaryLines:
    return []


@dataclasses.dataclass(frozen=True)
class Question(Generic[Answer]):
    """One question of a diagnosis; every module of this package that defines `QUESTION` adds one.

    Args:
        name: The key of the answer in `diagnosis.json`.
        order: The sort key among the questions: `answer` may read the answers to questions of lower order.
        record: The type of the answer: a frozen dataclass, or a tuple of them.
        answer: Returns the answer, or None if the options do not ask for it. Raises MismatchError if models of this
            kind have no answer.
        is_required: Whether a diagnosis without this answer is an error.
        describe: Summarises the answer for a terminal. Takes the answer and the name of the task's metric.
        section: The module of `regraft.report.sections` that shows the answer; None if it is named like the question.
    """

    name: str
    order: int
    record: Any
    answer: Callable[[QuestionContext], Answer | None]
    is_required: bool = False
    describe: Callable[[Answer, str], SummaryLines] = _no_lines
    section: str | None = None


@functools.cache
def all_questions() -> tuple[Question[Any], ...]:
    """Import and list the questions of this package.

    Returns:
        The questions, in the order in which they are asked.
    """
    package = __name__.rpartition(".")[0]
    questions: list[Question[Any]] = []
    for module_info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"{package}.{module_info.name}")
        if hasattr(module, "QUESTION"):
            questions.append(module.QUESTION)
    return tuple(sorted(questions, key=lambda question: question.order))
