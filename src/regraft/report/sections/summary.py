"""The card at the top of a part: the verdict or the best method, with the figures behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.page import Card
from regraft.report.wording import duration, integer, percent, score_text
from regraft.task import find_metric

if TYPE_CHECKING:
    from regraft.diagnosis import Diagnosis
    from regraft.report.page import Fact
    from regraft.report.summaries import Setting

TONES = {"use as is": "good", "training-free": "good", "short tuning": "fair", "scratch": "poor", "unknown": "plain"}
_TITLES = {
    "use as is": "Use as is",
    "training-free": "Recycle without training",
    "short tuning": "Tune a little",
    "scratch": "Tune from scratch",
    "unknown": "Unknown",
}


def verdict_card(diagnosis: Diagnosis) -> Card:
    """Return the card of a diagnosis: the verdict and its reasons.

    Args:
        diagnosis: A diagnosis, whose verdict is shown.
    """
    verdict = diagnosis.verdict
    return Card(
        label="Verdict",
        choice=_TITLES[verdict.choice],
        tone=TONES[verdict.choice],
        advice=_sentence(verdict.advice),
        sure=None if verdict.predicted is None else verdict.sure,
        predicted=verdict.predicted,
        reasons=tuple((reason.name, reason.value, reason.says) for reason in verdict.reasons),
    )


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def outcome_card(settings: list[Setting]) -> Card:
    """Return the card of a part without a diagnosis: the best method of the first setting, apart from scratch.

    If no such method has a score, the card shows the first method.

    Args:
        settings: The settings of one task, at least one.
    """
    setting = settings[0]
    recycled = [summary for summary in setting.summaries if summary.score is not None and summary.method != "scratch"]
    if not recycled:
        summary = setting.summaries[0]
        cost = f"{integer(summary.steps)} steps, {duration(summary.seconds)}"
        num_methods = len(setting.summaries)
        advice = f"It is the only method here: {cost}."
        if num_methods > 1:
            advice = f"It is the first of {num_methods} methods, of which none has a score to compare: {cost}."
        return _measured_card("Outcome", summary.method, advice, _reference_scores(setting))
    best = recycled[0]
    advice = f"It has the best {setting.metric} on {setting.split} of {len(setting.summaries)} methods"
    if best.recovery is not None:
        advice += f" and recovers {percent(best.recovery, 0)} of what tuning from scratch gains"
    reasons = [
        (
            f"{setting.metric} on {setting.split}",
            score_text(best.score, find_metric(setting.metric)),
            "the best of the recycled",
        )
    ]
    if best.steps_to_scratch is not None:
        reasons.append(
            ("steps to scratch", integer(best.steps_to_scratch), f"until {setting.dev} is where scratch ends")
        )
    if best.negative_flips is not None:
        reasons.append(("negative flips", percent(best.negative_flips), "right before the upgrade, wrong after it"))
    return _measured_card("Best method", best.method, f"{advice}.", (*reasons, *_reference_scores(setting)))


def _measured_card(label: str, method: str, advice: str, reasons: tuple[Fact, ...]) -> Card:
    return Card(label, method, "plain", advice, sure=None, predicted=None, reasons=reasons)


def _reference_scores(setting: Setting) -> tuple[Fact, ...]:
    scores = (
        ("old deployment", setting.old_score, "old weights on the old base"),
        (setting.chance_name, setting.chance, "0 %"),
    )
    metric = find_metric(setting.metric)
    return tuple((name, score_text(score, metric), meaning) for name, score, meaning in scores if score is not None)
