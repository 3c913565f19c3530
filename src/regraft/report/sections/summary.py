"""What comes first: the verdict and what it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.page import Card
from regraft.report.wording import number, percent, seconds, whole

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis
    from regraft.report.summaries import Setting

TONES = {"use as is": "good", "training-free": "good", "short tuning": "fair", "scratch": "poor"}
_NAMES = {
    "use as is": "Use as is", "training-free": "Recycle without training", "short tuning": "Tune a little",
    "scratch": "Tune from scratch",
}  # fmt: skip


def verdict_card(diagnosis: Diagnosis) -> Card:
    """Return what a diagnosis comes to.

    Args:
        diagnosis: The diagnosis.

    Returns:
        The card.
    """
    verdict = diagnosis.verdict
    return Card(
        label="Verdict",
        choice=_NAMES[verdict.choice],
        tone=TONES[verdict.choice],
        advice=_sentence(verdict.advice),
        sure=verdict.sure,
        predicted=verdict.predicted,
        reasons=tuple((reason.name, reason.value, reason.says) for reason in verdict.reasons),
    )


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def outcome_card(settings: list[Setting]) -> Card:
    """Return what outcomes come to, where there is no diagnosis: the best of the first setting.

    Args:
        settings: The task's.

    Returns:
        The card.
    """
    setting = settings[0]
    recycled = [
        standing for standing in setting.standings if standing.test is not None and standing.method != "scratch"
    ]
    if not recycled:
        first = setting.standings[0]
        advice = f"It is the only method here: {whole(first.steps)} steps, {seconds(first.seconds)}."
        return Card("Outcome", first.method, "plain", advice, None, None, _scores(setting))
    best = recycled[0]
    advice = f"It has the best {setting.metric} on {setting.split} of {len(setting.standings)} methods"
    if best.recovery is not None:
        advice += f" and recovers {percent(best.recovery, 0)} of what tuning from scratch gains"
    reasons = [(f"{setting.metric} on {setting.split}", number(best.test), "the best of the recycled")]
    if best.steps_to_scratch is not None:
        reasons.append(("steps to scratch", whole(best.steps_to_scratch), "until dev is where scratch ends"))
    if best.negative_flips is not None:
        reasons.append(("negative flips", percent(best.negative_flips), "right before the upgrade, wrong after it"))
    return Card("Best method", best.method, "plain", f"{advice}.", None, None, (*reasons, *_scores(setting)))


def _scores(setting: Setting) -> tuple[tuple[str, str, str], ...]:
    levels = (("old deployment", setting.old, "old weights on the old base"), ("guessing", setting.floor, "0 %"))
    return tuple((name, number(value), says) for name, value, says in levels if value is not None)
