"""The choice of how to carry an adaptation over, by the share of its score that survives the upgrade."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from regraft.task import Metric

Choice = Literal["use as is", "training-free", "short tuning", "scratch"]
Conclusion = Literal["use as is", "training-free", "short tuning", "scratch", "unknown"]
"""A choice, or `unknown` without labels."""

# The smallest share of the score above chance that must survive for each choice. Higher thresholds tune more often than
# necessary, lower ones keep worse scores. They are not fitted to experiments/verdict, whose README says how often they
# choose right.
MIN_SHARE_AS_IS = 0.95
MIN_SHARE_TRAINING_FREE = 0.80
MIN_SHARE_SHORT_TUNING = 0.35
ADVICE: dict[Choice, str] = {
    "use as is": "use the old weights as they are (direct)",
    "training-free": "a method without training should close most of the gap (ridge)",
    "short tuning": "a short tuning from the old weights should close the gap (init+distill, ridge+distill)",
    "scratch": "the upgrade moved far: tune with the old model as teacher (init+distill), or from scratch",
}
"""The recommended action of each choice, in words."""
WITHOUT_LABELS = (
    "Without reference answers, neither scores nor flips are known. Add some to the task file to learn whether answers "
    "that changed are worse."
)
"""What a verdict says in place of advice."""


def choose(share: float, gain: float = 0.0, *, within_tolerance: bool | None = None) -> Choice:
    """Choose how to carry an adaptation over.

    Args:
        share: The score on the new base divided by the expected score, both measured above chance.
        gain: The gain of a linear probe's score from the old to the new base, which only training can use.
        within_tolerance: Whether the score on the new base is worse by at most the metric's own tolerance, which then
            decides about `use as is` in place of the share; None for a metric without one.

    Returns:
        The first choice whose threshold the share reaches, but not `training-free` if there is a gain; `scratch` if the
        share reaches no threshold.
    """
    if within_tolerance or (within_tolerance is None and share >= MIN_SHARE_AS_IS):
        return "use as is"
    if share >= MIN_SHARE_TRAINING_FREE and gain <= 0:
        return "training-free"
    return "short tuning" if share >= MIN_SHARE_SHORT_TUNING else "scratch"


def is_within_tolerance(metric: Metric, old: float, new: float) -> bool | None:
    """Return whether a score is worse than the old one by at most the metric's own tolerance.

    Args:
        metric: The metric of the scores; None is returned if it has no tolerance of its own.
        old: The score of the old deployment.
        new: The score on the new base.
    """
    return None if metric.tolerance is None else metric.gain(old, new) <= metric.tolerance
