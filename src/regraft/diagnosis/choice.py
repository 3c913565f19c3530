"""What to do with old weights, by the share of their score that survives the upgrade."""

from __future__ import annotations

from typing import Literal

Choice = Literal["use as is", "training-free", "short tuning", "scratch"]

# Not fitted to the cells of experiments/verdict, whose README says how often these thresholds choose right.
MIN_SHARE_AS_IS, MIN_SHARE_TRAINING_FREE, MIN_SHARE_SHORT_TUNING = 0.95, 0.80, 0.35
"""The smallest share of the score above guessing that must survive for each choice."""
ADVICE: dict[str, str] = {
    "use as is": "use the old weights as they are (direct)",
    "training-free": "a method without training should close most of the gap (ridge)",
    "short tuning": "a short tuning from the old weights should close the gap (init+distill, ridge+distill)",
    "scratch": "the upgrade moved far: tune with the old model as teacher (init+distill), or from scratch",
}


def choose(share: float, gain: float = 0.0) -> Choice:
    """Choose by the share of a score that survives.

    Args:
        share: The new score over the expected one, both above guessing.
        gain: By how much a probe finds the new base better at the task; no method without training can reach that.

    Returns:
        The choice.
    """
    if share >= MIN_SHARE_AS_IS:
        return "use as is"
    if share >= MIN_SHARE_TRAINING_FREE and gain <= 0:
        return "training-free"
    return "short tuning" if share >= MIN_SHARE_SHORT_TUNING else "scratch"
