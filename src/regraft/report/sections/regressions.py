"""Which examples changed, class by class, and whether the model is as sure as it is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_calibration
from regraft.report.page import Block, Browser, Chart, Charts, Facts, Section, Table
from regraft.report.wording import number, percent, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regraft.diagnosis import Diagnosis, Regressions
    from regraft.diagnosis.regressions import Calibration

ORDER = 90
MARGIN = 0.05
"""The usual level of significance."""


def show(regressions: Regressions, diagnosis: Diagnosis, part: str) -> list[Section]:
    """Show flips, classes and calibration.

    Args:
        regressions: The answer.
        diagnosis: The whole diagnosis.
        part: The part's name, for those of the charts.

    Returns:
        Regressions, and calibration where it was measured.
    """
    examples = regressions.examples or 1
    facts = [
        (
            "negative flips",
            f"{regressions.negative:,} ({percent(regressions.negative / examples)})",
            "right before, wrong now",
        ),
        (
            "positive flips",
            f"{regressions.positive:,} ({percent(regressions.positive / examples)})",
            "wrong before, right now",
        ),
        ("McNemar's test", f"p = {_p(regressions.mcnemar)}", _significance(regressions.mcnemar)),
    ]
    if regressions.noise is not None:
        facts.append(("noise floor", percent(regressions.noise), "negative flips between two seeds of one recipe"))
    blocks: list[Block] = [Facts(tuple(facts))]
    if regressions.classes:
        blocks.append(_classes(regressions))
    if regressions.flips:
        blocks.append(Browser(regressions.flips))
    lead = f"Predictions on {regressions.examples:,} examples of {regressions.split} that changed with the upgrade."
    sections = [Section("regressions", "Regressions", lead, tuple(blocks))]
    calibration = {name: curve for name, curve in regressions.calibration.items() if curve.bins}
    if calibration:
        sections.append(_calibration(calibration, part))
    return sections


def _classes(regressions: Regressions) -> Table:
    head = ("class", "examples", "recall before", "recall after", "change", "negative flips", "positive flips")
    rows = tuple(
        (
            row.label, whole(row.examples), number(row.before), number(row.after), _signed(row.after - row.before),
            whole(row.negative), whole(row.positive),
        )
        for row in regressions.classes
    )  # fmt: skip
    return Table("Recall and flips by class", head, rows)


def _calibration(calibration: Mapping[str, Calibration], part: str) -> Section:
    errors = ", ".join(f"{name} model {number(curve.ece)}" for name, curve in calibration.items())
    rows = tuple(
        (
            name, f"{number(bin.low, 2)} to {number(bin.high, 2)}", whole(bin.count), number(bin.confidence),
            number(bin.accuracy),
        )
        for name, curve in calibration.items()
        for bin in curve.bins
    )  # fmt: skip
    head = ("model", "confidence from", "examples", "mean confidence", "share right")
    table = Table("Calibration by bin", head, rows, prose=2)
    figure = draw_calibration(calibration)
    finding = f"Expected calibration error: {errors}."
    chart = Chart(f"{part}-calibration", "Calibration", finding, figure, table)
    lead = "On the dotted line a model is as sure as it is right; below it, too sure. Larger marks hold more examples."
    return Section("calibration", "Calibration", lead, (Charts((chart,)),))


def _p(value: float) -> str:
    return number(value) if value >= 0.001 else f"{value:.1e}".replace("-", "−")


def _significance(p: float) -> str:
    return "more than chance explains" if p < MARGIN else "chance alone could explain the difference"


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)
