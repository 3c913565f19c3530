"""How the command line shows what a check or a diagnosis found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from regraft.cli.show import console

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.diagnosis import Check, Diagnosis


def check(result: Check) -> None:
    """Print what a check found, a line a figure, the verdict last.

    Args:
        result: The check.
    """
    from regraft.diagnosis.check import describe

    _columns(describe(result))
    console.print(result.verdict, style="bold", highlight=False, markup=False)


def diagnosis(result: Diagnosis, out: Path | None) -> None:
    """Print what a diagnosis found, a line a figure, the verdict last.

    Args:
        result: The diagnosis.
        out: Where its record is, if it was written.
    """
    from regraft.diagnosis import all_questions

    answered = [question for question in all_questions() if question.name in result.answers]
    lines = [question.describe(result.answers[question.name], result.metric) for question in answered]
    if result.compared != "direct":
        lines.insert(1, [("compared below", f"the old deployment with {result.compared}")])  # after the check
    lines.append([(f"no {name}", why) for name, why in result.left_out.items()])
    _columns([line for several in lines for line in several])
    verdict = f"{result.verdict.choice} ({result.verdict.sure:.0%} sure): {result.verdict.advice}"
    console.print(verdict, style="bold", highlight=False, markup=False)
    if out is not None:
        console.print(f"regraft report {escape(str(out))} --out report.html shows it all", highlight=False)


def _columns(lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        console.print(f"{name:<{width}}  {value}", highlight=False, markup=False)
