"""The section on the upgrade's effect on the adaptation, not tuned again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.page import Facts, Section
from regraft.report.wording import MISSING, join_words, percent, score_text
from regraft.task import find_metric

if TYPE_CHECKING:
    from regraft.diagnosis import Check, Diagnosis
    from regraft.report.page import Fact
    from regraft.task import Metric

ORDER = 10


def show(check: Check, diagnosis: Diagnosis, prefix: str) -> list[Section]:
    """Show the scores before and after the upgrade, and the flips between them.

    Args:
        check: The scores, flips and distances.
        diagnosis: The diagnosis that the answer belongs to.
        prefix: Unused, because the section has no charts.

    Returns:
        A single section.
    """
    metric = find_metric(check.metric)
    facts = [
        ("before", score_text(check.old, metric), f"{check.metric} of the old weights on the old base"),
        ("after", score_text(check.new, metric), "the same weights on the new base, as they are"),
        _floor_fact(check, metric),
        ("survives", percent(check.retained, 0), f"of the score above {check.floor_name}"),
        ("negative flips", percent(check.negative_flips), "right before, wrong after"),
        ("positive flips", percent(check.positive_flips), "wrong before, right after"),
        ("agreement", percent(check.agreement), "between the predictions before and after"),
        ("effect", percent(check.effect), "how much the adaptation changes what the head reads"),
        ("lineage", check.lineage, "whether the adaptation records this old base"),
    ]
    lead = check.verdict
    if diagnosis.left_out:
        names = join_words(sorted(diagnosis.left_out))
        lead += f" Not answered here: {names}; the reasons are under provenance."
    return [
        Section(
            "upgrade",
            "Old weights on the new base",
            lead,
            (Facts(tuple(fact for fact in facts if fact[1] != MISSING)),),
        )
    ]


def _floor_fact(check: Check, metric: Metric) -> Fact:
    meaning = f"always {check.guess}" if check.floor_name == "guessing" else check.guess
    return check.floor_name.removeprefix("the "), score_text(check.floor, metric), meaning
