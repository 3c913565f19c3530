"""Which examples changed, class by class, and whether the model is as sure as it is right."""

from __future__ import annotations

from typing import Any

from regraft.report.charts import draw_calibration
from regraft.report.page import Block, Browser, Chart, Charts, Facts, Section, Table
from regraft.report.wording import number, percent, whole

MARGIN = 0.05
"""The usual level of significance."""


def regression_sections(diagnosis: dict[str, Any], part: str) -> list[Section]:
    """Show flips, classes and calibration.

    Args:
        diagnosis: Its content.
        part: The part's name, for those of the charts.

    Returns:
        Regressions and calibration; none if it was not asked.
    """
    found = diagnosis["regressions"]
    if not found:
        return []
    examples = found["examples"] or 1
    facts = [
        (
            "negative flips",
            f"{found['negative']:,} ({percent(found['negative'] / examples)})",
            "right before, wrong now",
        ),
        (
            "positive flips",
            f"{found['positive']:,} ({percent(found['positive'] / examples)})",
            "wrong before, right now",
        ),
        ("McNemar's test", f"p = {_p(found['mcnemar'])}", _significance(found["mcnemar"])),
    ]
    if found["noise"] is not None:
        facts.append(("noise floor", percent(found["noise"]), "negative flips between two seeds of one recipe"))
    blocks: list[Block] = [Facts(tuple(facts))]
    if found["classes"]:
        blocks.append(_classes(found))
    if found["flips"]:
        blocks.append(Browser(tuple(found["flips"])))
    lead = f"Predictions on {found['examples']:,} examples of {found['split']} that changed with the upgrade."
    sections = [Section("regressions", "Regressions", lead, tuple(blocks))]
    calibration = {name: entry for name, entry in found["calibration"].items() if entry["bins"]}
    if calibration:
        sections.append(_calibration(calibration, part))
    return sections


def _classes(found: dict[str, Any]) -> Table:
    head = ("class", "examples", "recall before", "recall after", "change", "negative flips", "positive flips")
    rows = tuple(
        (
            one["label"], whole(one["examples"]), number(one["before"]), number(one["after"]),
            _signed(one["after"] - one["before"]), whole(one["negative"]), whole(one["positive"]),
        )
        for one in found["classes"]
    )  # fmt: skip
    return Table("Recall and flips by class", head, rows)


def _calibration(calibration: dict[str, Any], part: str) -> Section:
    told = ", ".join(f"{name} model {number(entry['ece'])}" for name, entry in calibration.items())
    rows = tuple(
        (
            name, f"{number(one['low'], 2)} to {number(one['high'], 2)}", whole(one["count"]),
            number(one["confidence"]) if one["count"] else "–", number(one["accuracy"]) if one["count"] else "–",
        )
        for name, entry in calibration.items()
        for one in entry["bins"]
    )  # fmt: skip
    head = ("model", "confidence from", "examples", "mean confidence", "share right")
    table = Table("Calibration by bin", head, rows, prose=2)
    figure = draw_calibration(calibration)
    finding = f"Expected calibration error: {told}."
    chart = Chart(f"{part}-calibration", "Calibration", finding, figure, table)
    lead = "On the dotted line a model is as sure as it is right; below it, too sure. Larger marks hold more examples."
    return Section("calibration", "Calibration", lead, (Charts((chart,)),))


def _p(value: float) -> str:
    return number(value) if value >= 0.001 else f"{value:.1e}".replace("-", "−")


def _significance(p: float) -> str:
    return "more than chance explains" if p < MARGIN else "chance alone could explain the difference"


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)
