"""The gain of the new base over the old one at the task, measured by linear probes without any adaptation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.diagnosis.question import Question
from regraft.errors import MismatchError
from regraft.task import Interval, paired_difference

if TYPE_CHECKING:
    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import QuestionContext


def probe_gain(pair: DeploymentPair) -> Interval:
    """Compare the dev scores of linear probes of the two bases.

    Args:
        pair: The deployments, of which only the bases, the task and the precision are used.

    Returns:
        The improvement of the probe's score from the old to the new base, with the confidence interval; positive if
        the score on the new base is better.
    """
    from regraft.model.probe import probe

    data = pair.data
    old, new = (probe(base, data, pair.precision) for base in (pair.upgrade.old, pair.upgrade.new))
    return paired_difference(data.scoring, data.dev.targets, new, old)


def _answer(context: QuestionContext) -> Interval:
    if context.direct.data.task.head_in_base:
        raise MismatchError("a linear probe predicts no texts; the bare new base is measured instead")
    return probe_gain(context.direct)


QUESTION = Question("probe", order=90, record=Interval, answer=_answer)
