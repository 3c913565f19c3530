"""Is the new base better at the task than the old one, regardless of any adaptation?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.diagnosis.question import Question
from regraft.task import Interval, paired_difference

if TYPE_CHECKING:
    from regraft.diagnosis.pair import DeploymentPair


def probe_gain(pair: DeploymentPair) -> Interval:
    """Compare linear probes of the two bases on dev.

    Args:
        pair: The deployments; only their bases and the task are used.

    Returns:
        The new base's probe score minus the old one's, with its interval.
    """
    from regraft.model.probe import probe

    data = pair.data
    old, new = (probe(base, data, pair.precision) for base in (pair.upgrade.old, pair.upgrade.new))
    return paired_difference(data.task.scoring, data.dev.targets, new, old)


QUESTION = Question("probe", 90, Interval, lambda context: probe_gain(context.direct))
