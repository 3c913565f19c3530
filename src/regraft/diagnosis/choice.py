"""What to do with old weights, by what is left of their score."""

from __future__ import annotations

from typing import Literal

Choice = Literal["use as is", "training-free", "short tuning", "scratch"]

MIN_SHARE_AS_IS, TRAINING_FREE, SHORT_TUNING = 0.95, 0.80, 0.35
"""The least share of the score above guessing that must be left for each choice."""
ADVICE: dict[str, str] = {
    "use as is": "use the old weights as they are (direct)",
    "training-free": "a method without training should close most of the gap (ridge)",
    "short tuning": "a short tuning from the old weights should close the gap (init+distill, ridge+distill)",
    "scratch": "the upgrade moved far: tune with the old model as teacher (init+distill), or from scratch",
}


def choose(share: float, gain: float = 0.0) -> Choice:
    """Choose by what is left of a score.

    Args:
        share: The new score over the expected one, both above guessing.
        gain: What a probe finds the new base better by: nothing that does no training can have it.

    Returns:
        The choice.
    """
    if share >= MIN_SHARE_AS_IS:
        return "use as is"
    if share >= TRAINING_FREE and gain <= 0:
        return "training-free"
    return "short tuning" if share >= SHORT_TUNING else "scratch"
