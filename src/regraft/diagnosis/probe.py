"""Is the new base better at a task than the old one, whatever was tuned on it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.diagnosis.question import Question
from regraft.task import Interval, paired_difference

if TYPE_CHECKING:
    from regraft.diagnosis.pair import Pair


def probe_gain(pair: Pair) -> Interval:
    """Find out whether the new base is better at a task than the old one, by a linear probe on dev.

    Args:
        pair: The deployments; only their bases and the task count.

    Returns:
        The difference of the probes' scores, with its interval.
    """
    from regraft.model.probe import probe

    data = pair.data
    old, new = (probe(base, data, pair.precision) for base in (pair.upgrade.old, pair.upgrade.new))
    return paired_difference(data.task.scoring, data.dev.targets, new, old)


QUESTION = Question("probe", 90, Interval, lambda asked: probe_gain(asked.direct))
